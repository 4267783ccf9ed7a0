"""Conversations -> text, by a chat template: the tokenizer's own, or a given file.

The generation prompt belongs to the prompt, since that is what the model is given when it answers; all that the
template writes after it, the end-of-turn token too, is the answer, and is in the loss.
"""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dpo_lightning.data.preference import Conversation, Message, Preference, RowFault
from dpo_lightning.errors import InputError
from dpo_lightning.paths import path_of

#: What a template's own code may end in.
FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def use_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Give a tokenizer the template in a file; it is saved with it from then on.

    Raises:
        InputError: if there is no such file, or it is no template in Jinja.
    """
    try:
        template = path_of(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.chat_template: {path} cannot be read ({error}); give a file with a template") from error
    tokenizer.chat_template = template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except FAILURES as error:
        if type(error) is not TemplateError:  # a template's own refusal, as of a conversation without a system text
            raise InputError(f"data.chat_template: {path} is no chat template: {error}; mend it") from error


class ChatTemplate:
    """Renders conversations as a tokenizer's template says.

    Args:
        tokenizer: whose template it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.special = tuple(tokenizer.get_added_vocab())

    def __call__(self, conversation: Conversation) -> Preference:
        """Prompt, generation prompt included, and answers, end of turn included.

        Raises:
            InputError: if the tokenizer has no template.
            RowFault: if the template refuses the conversation, or what it writes for an answer does not follow what it
                writes for the prompt.
        """
        template = self.tokenizer.chat_template
        if template is None:
            raise InputError(
                f"the rows are conversations, but the tokenizer {self.tokenizer.name_or_path} has no chat template; "
                "set data.chat_template to a file, or model.tokenizer to that of a chat model"
            )
        if conversation.tools and "tools" not in str(template):
            raise RowFault("the row has tools, but the chat template has no place for them")
        prompt = self._render(conversation, [], generation=True)
        answers = (conversation.chosen, conversation.rejected)
        chosen, rejected = (
            None if answer is None else self._answer(conversation, prompt, answer) for answer in answers
        )
        return Preference(prompt, chosen, rejected, templated=True)

    def _answer(self, conversation: Conversation, prompt: str, answer: str) -> str:
        """What the template writes for an answer after the prompt.

        White space after the last special token is left out: the turn has ended there.
        """
        if self.tokenizer.eos_token:
            answer = answer.removesuffix(self.tokenizer.eos_token)  # written already: it gets no second one
        whole = self._render(conversation, [{"role": "assistant", "content": answer}])
        if not whole.startswith(prompt):
            raise RowFault("with an answer the chat template writes another prompt than without one")
        rendered = whole[len(prompt) :]
        if answer.strip() not in rendered:
            raise RowFault("the chat template changes or leaves out the answer")
        ended = rendered.rstrip()
        return ended if ended.endswith(self.special) else rendered

    def _render(self, conversation: Conversation, answer: list[Message], generation: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [*conversation.prompt, *answer],
                tools=list(conversation.tools) or None,
                add_generation_prompt=generation,
                tokenize=False,
            )
        except FAILURES as error:
            raise RowFault(f"the chat template refuses the conversation: {error}") from None
