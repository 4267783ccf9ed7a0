"""A conversation becomes what its chat template writes: the prompt that a model is asked with, and the answer to it.

The oracle is `apply_chat_template` on the whole conversation, and on the prompt alone; for templates that are written
in `chat_families` it is also the text as it is spelled out here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_lightning.data.chat import ChatTemplate, use_template
from dpo_lightning.data.preference import Conversation, Message, Preference, RowFault
from dpo_lightning.data.tokenization import Encoded, PairTokenizer
from dpo_lightning.errors import InputError
from tests.chat_families import CHATML, FAMILIES, LLAMA2, TOOLS, WRITTEN, Family, released, turns
from tests.tokenizers_built import adds_both, byte_level, spell

few = settings(max_examples=25, deadline=None)

TOKENIZERS = {name: family.tokenizer() for name, family in FAMILIES.items()}

LONG = 1_000_000


def turn(role: str, content: str, **more: object) -> Message:
    return {"role": role, "content": content, **more}


HELLO = Conversation((turn("user", "Hello"),), "world", "a")
SYSTEM = Conversation((turn("system", "Be kind."), turn("user", "Hello")), "world", "a")
EARLIER = Conversation((turn("user", "Hello"), turn("assistant", "a"), turn("user", "é\n")), " world ", "\n\nworld")
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {"type": "object"}}}

PIECES = ["Hello", " world", "world", "a", ".", " ", "\n", "\n\n", "é", "漢", "😀"]
said = st.lists(st.sampled_from(PIECES), max_size=5).map("".join).filter(str.strip)
conversations = st.builds(
    lambda opening, earlier, last, chosen, rejected: Conversation(
        (
            *(turn("system", text) for text in opening),
            *(t for q, a in earlier for t in (turn("user", q), turn("assistant", a))),
            turn("user", last),
        ),
        chosen,
        rejected,
    ),
    st.lists(said, max_size=1),
    st.lists(st.tuples(said, said), max_size=2),
    said,
    said,
    said,
)


def with_template(text: str | dict[str, str] | None, name: str = "") -> PreTrainedTokenizerFast:
    tokenizer = WRITTEN["chatml_eos"].tokenizer()
    tokenizer.chat_template = text
    tokenizer.name_or_path = name
    return tokenizer


def written(tokenizer: PreTrainedTokenizerFast, prompt: Sequence[Message], answer: str | None, tools: Any = ()) -> str:
    """What transformers writes for a whole conversation, or for a prompt that is to be answered."""
    answers = [] if answer is None else [turn("assistant", answer)]
    options = {"tools": list(tools) or None, "add_generation_prompt": answer is None}
    return tokenizer.apply_chat_template([*prompt, *answers], tokenize=False, **options)


# Text


@pytest.mark.parametrize(
    ("name", "conversation", "prompt", "chosen"),
    [
        ("chatml", HELLO, "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", "world<|im_end|>"),
        (
            "chatml_eos",
            EARLIER,
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
            "<|im_start|>user\né\n<|im_end|>\n<|im_start|>assistant\n",
            " world <|im_end|>",
        ),
        ("llama2", SYSTEM, "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHello [/INST]", " world </s>"),
        ("llama2", EARLIER, "<s>[INST] Hello [/INST] a </s>[INST] é [/INST]", " world </s>"),
        ("zephyr", SYSTEM, "<|system|>\nBe kind.</s>\n<|user|>\nHello</s>\n<|assistant|>\n", "world</s>"),
        ("plain", HELLO, "### user:\nHello\n\n### assistant:\n", "world\n\n"),
        ("strips", EARLIER, "<|user|>Hello<|end|><|assistant|>a<|end|><|user|>é<|end|><|assistant|>", "world<|end|>"),
        (
            "llama3",
            HELLO,
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "world<|eot_id|>",
        ),
        (
            "gemma",
            EARLIER,
            "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
            "<start_of_turn>user\né<end_of_turn>\n<start_of_turn>model\n",
            "world<end_of_turn>",
        ),
    ],
)
def test_prompt_and_answer_are_spelled_as_the_model_knows_them(
    name: str, conversation: Conversation, prompt: str, chosen: str
) -> None:
    found = ChatTemplate(TOKENIZERS[name])(conversation)
    assert (found.prompt, found.chosen, found.templated) == (prompt, chosen, True)


@pytest.mark.parametrize("name", FAMILIES)
@few
@given(conversation=conversations)
@example(conversation=EARLIER)
def test_prompt_and_answer_are_the_whole_conversation_but_for_blanks_after_its_end(
    name: str, conversation: Conversation
) -> None:
    assume(FAMILIES[name].system or conversation.prompt[0]["role"] != "system")
    tokenizer = TOKENIZERS[name]
    found = ChatTemplate(tokenizer)(conversation)
    assert found.prompt == written(tokenizer, conversation.prompt, None)
    for text, rendered in ((conversation.chosen, found.chosen), (conversation.rejected, found.rejected)):
        whole = written(tokenizer, conversation.prompt, text)
        ends = whole.rstrip().endswith(tuple(tokenizer.all_special_tokens))
        assert found.prompt + rendered == (whole.rstrip() if ends else whole)
        assert ends == (FAMILIES[name].turn is not None)
        assert text.strip() in rendered


def test_a_supervised_conversation_has_no_rejected_text() -> None:
    found = ChatTemplate(TOKENIZERS["chatml"])(Conversation(HELLO.prompt, "world", None))
    assert (found.chosen, found.rejected) == ("world<|im_end|>", None)


@pytest.mark.parametrize("name", ["tools", "qwen2_5", "qwen3", "llama3_1", "lfm2", "gptoss", "glm4moe"])
def test_tools_stand_in_the_prompt_as_the_template_puts_them(name: str) -> None:
    prompt = (*HELLO.prompt, turn("assistant", "", tool_calls=[CALL]), turn("tool", "12:00", name="clock"))
    found = ChatTemplate(TOKENIZERS[name])(Conversation(prompt, "world", "a", (TOOL,)))
    assert found.prompt == written(TOKENIZERS[name], prompt, None, [TOOL])
    assert found.prompt + found.chosen == written(TOKENIZERS[name], prompt, "world", [TOOL]).rstrip()
    without = ChatTemplate(TOKENIZERS[name])(Conversation(prompt, "world", "a"))
    assert "clock" in found.prompt and len(without.prompt) < len(found.prompt)
    assert without.chosen == found.chosen


def test_of_several_templates_the_one_for_tools_is_taken_where_there_are_some() -> None:
    chat = ChatTemplate(with_template({"default": CHATML, "tool_use": TOOLS}))
    assert "clock" not in chat(HELLO).prompt
    assert "clock" in chat(Conversation(HELLO.prompt, "world", "a", (TOOL,))).prompt


# What a template cannot write

THINKS = turns("<|im_start|>ROLE\\n", "<|im_end|>\\n", generate="<|im_start|>assistant\\n<think>\\n")


def called(arguments: object) -> Conversation:
    call = {"type": "function", "function": {"name": "clock", "arguments": arguments}}
    return Conversation((*HELLO.prompt, turn("assistant", "", tool_calls=[call]), turn("tool", "12:00")), "b", "c")


@pytest.mark.parametrize(
    ("template", "conversation", "reason"),
    [
        (THINKS, HELLO, "with an answer the chat template writes another prompt"),
        (released("deepseek_r1_distill"), HELLO, "with an answer the chat template writes another prompt"),
        (released("nemotron_3_nano"), HELLO, "with an answer the chat template writes another prompt"),
        (turns("<|im_start|>ROLE\\n", "<|im_end|>\\n", content="'...'"), HELLO, "changes or leaves out the answer"),
        (turns("<|im_start|>ROLE\\n", "<|im_end|>", content="message.content | upper"), HELLO, "changes or leaves out"),
        ("{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}", HELLO, "another prompt|leaves out"),
        (released("idefics3"), HELLO, "changes or leaves out the answer"),  # it writes contents in parts alone
        (released("gemma"), SYSTEM, "refuses the conversation: System role not supported"),
        (released("gemma"), Conversation(EARLIER.prompt[:2], "b", "c"), "refuses the conversation: .*must alternate"),
        (turns("", "", content="message.content.text.strip()"), HELLO, "refuses the conversation: .*text"),
        (CHATML, Conversation(HELLO.prompt, "b", "c", (TOOL,)), "has tools, but the chat template has no place"),
        (LLAMA2, Conversation(HELLO.prompt, "b", "c", (TOOL,)), "has tools, but the chat template has no place"),
        (released("qwen3_5_think"), called('{"city": "Paris"}'), "refuses the conversation"),  # it goes through items
        (released("deepseekv3"), called({"city": "Paris"}), "refuses the conversation"),  # it expects a text
    ],
)
def test_a_conversation_that_a_template_cannot_write_is_a_fault(
    template: str, conversation: Conversation, reason: str
) -> None:
    with pytest.raises(RowFault, match=reason):
        ChatTemplate(with_template(template))(conversation)


def test_without_a_template_the_error_names_the_tokenizer_and_the_option() -> None:
    with pytest.raises(InputError, match=r"some/model has no chat template; set data\.chat_template"):
        ChatTemplate(with_template(None, "some/model"))(HELLO)


# Ids


def encode(tokenizer: PreTrainedTokenizerFast, preference: Preference) -> Encoded:
    [row] = PairTokenizer(tokenizer, LONG)([preference])
    assert isinstance(row, Encoded), row
    return row


@pytest.mark.parametrize("name", FAMILIES)
@few
@given(conversation=conversations)
@example(conversation=EARLIER)
def test_ids_are_the_prompts_that_generation_starts_from_and_what_the_template_writes_next(
    name: str, conversation: Conversation
) -> None:
    assume(FAMILIES[name].system or conversation.prompt[0]["role"] != "system")
    assume(conversation.chosen.strip() != conversation.rejected.strip())
    tokenizer, family = TOKENIZERS[name], FAMILIES[name]
    preference = ChatTemplate(tokenizer)(conversation)
    row = encode(tokenizer, preference)
    assert row.text == ""
    assert row.prompt == tokenizer.apply_chat_template(
        list(conversation.prompt), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    for ids, text in ((row.chosen, preference.chosen), (row.rejected, preference.rejected)):
        assert spell(tokenizer, ids).decode() == text.removesuffix(family.eos) + family.eos
        joint = tokenizer(preference.prompt + text.removesuffix(family.eos), add_special_tokens=False).input_ids
        assert row.boundary or row.prompt + ids[:-1] == joint
        assert_ends(tokenizer, family, ids)
    ids = row.prompt + row.chosen + row.rejected
    assert ids.count(tokenizer.bos_token_id) == ("bos_token" in family.text)
    assert "bos_token" not in family.text or ids[0] == tokenizer.bos_token_id


def assert_ends(tokenizer: PreTrainedTokenizerFast, family: Family, answer: list[int]) -> None:
    """The answer teaches the end of its turn, and stops with one EOS, which may be the same token."""
    assert answer[-1] == tokenizer.eos_token_id and answer.count(tokenizer.eos_token_id) == 1
    if family.turn is not None:
        assert answer.count(tokenizer.convert_tokens_to_ids(family.turn)) == 1


def test_llama2s_bos_and_eos_stand_once_with_its_own_kind_of_tokenizer_too() -> None:
    tokenizer = adds_both()
    tokenizer.chat_template = LLAMA2
    row = encode(tokenizer, ChatTemplate(tokenizer)(SYSTEM))
    assert row.prompt[0] == tokenizer.bos_token_id and row.chosen[-1] == tokenizer.eos_token_id
    ids = row.prompt + row.chosen
    assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)
    assert spell(tokenizer, row.chosen).decode() == " world </s>"
    assert row.prompt == tokenizer.apply_chat_template(list(SYSTEM.prompt), tokenize=True, return_dict=False)


def test_answers_that_differ_in_blanks_that_the_template_strips_are_identical() -> None:
    preference = ChatTemplate(TOKENIZERS["strips"])(Conversation(HELLO.prompt, "world", " world\n"))
    [fault] = PairTokenizer(TOKENIZERS["strips"], LONG)([preference])
    assert isinstance(fault, RowFault) and "identical" in str(fault)


# A template in a file


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
def test_a_template_in_a_file_is_the_tokenizers_from_then_on_and_is_saved_with_it(name: str, tmp_path: Path) -> None:
    tokenizer, file = FAMILIES[name].tokenizer(), tmp_path / "chat.jinja"
    file.write_text(FAMILIES[name].text, encoding="utf-8")
    tokenizer.chat_template = TOOLS
    use_template(tokenizer, str(file))
    assert ChatTemplate(tokenizer)(HELLO) == ChatTemplate(TOKENIZERS[name])(HELLO)
    tokenizer.save_pretrained(tmp_path / "export")
    exported = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert exported.chat_template == FAMILIES[name].text
    assert ChatTemplate(exported)(HELLO) == ChatTemplate(tokenizer)(HELLO)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "cannot be read.*No such file.*give a file"),
        (b"\xff\xfe{", "cannot be read"),
        (b"{% for m in messages %}{{ m.content }}", "is no chat template: .*endfor"),
        (b"{{ messages[0].content | no_such_filter }}", "is no chat template: .*no_such_filter"),
        (b"{{ messages[7].content.x }}", "is no chat template: .*"),
        (b"{{ 1 / 0 }}", "is no chat template: division by zero"),
        (b"{{ messages[0].content + 1 }}", "is no chat template: .*concatenate"),
    ],
)
def test_a_file_that_is_no_template_is_an_error_that_names_it(
    content: bytes | None, cause: str, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=rf"data\.chat_template: {file} {cause}"):
        use_template(byte_level(), str(file))
    with pytest.raises(InputError, match=rf"data\.chat_template: {tmp_path} cannot be read"):
        use_template(byte_level(), str(tmp_path))
