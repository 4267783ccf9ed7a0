"""Chat templates of families of models, each with a byte-level tokenizer that has its special tokens.

Some are written here, short, for one thing each; those of released models are read from the peer's package, TRL, which
is not imported. Every tokenizer puts a BOS before a text and an EOS after it of its own accord, so that a template's
text that went through it once more would have them twice.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tests.tokenizers_built import byte_level, template


@dataclass(frozen=True)
class Family:
    """A template and what it is known to do.

    Args:
        text: the template.
        turn: the token that it writes at the end of an assistant's turn, or None.
        eos: of the tokenizer.
        bos: of the tokenizer, whether the template writes it or not.
        system: whether it knows system prompts.
    """

    text: str
    turn: str | None
    eos: str
    bos: str = "<s>"
    system: bool = True

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = template(byte_level(self.bos, self.eos), before=self.bos, after=self.eos)
        written = dict.fromkeys(re.findall(r"<\|?\w+\|?>", self.text.replace(" ", "")))
        others = [token for token in written if token not in (self.bos, self.eos, "<think>", "<thinking>")]
        tokenizer.add_special_tokens({"additional_special_tokens": others})
        tokenizer.chat_template = self.text
        return tokenizer


def turns(before: str, after: str, begin: str = "", generate: str = "", content: str = "message.content") -> str:
    """A template that writes each turn alike: `before` and `after` it, with `ROLE` for its role."""
    opening = before.replace("ROLE", "' + message.role + '")
    return (
        f"{begin}{{% for message in messages %}}{{{{ '{opening}' + {content} + '{after}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{generate or before.replace('ROLE', 'assistant')}' }}}}{{% endif %}}"
    )


CHATML = turns("<|im_start|>ROLE\\n", "<|im_end|>\\n")
LLAMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}{% set messages = messages[1:] %}"
    "{% endif %}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + (system or '' if loop.first else '') + message.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}" + CHATML

#: Written here: ChatML whose end of turn is the EOS, and is not; and one that ends in no special token at all.
WRITTEN = {
    "chatml": Family(CHATML, "<|im_end|>", "<|im_end|>"),
    "chatml_eos": Family(CHATML, "<|im_end|>", "<|endoftext|>"),
    "llama2": Family(LLAMA2, "</s>", "</s>"),
    "zephyr": Family(turns("<|ROLE|>\\n", "</s>\\n"), "</s>", "</s>"),
    "plain": Family(turns("### ROLE:\\n", "\\n\\n"), None, "</s>"),
    "strips": Family(turns("<|ROLE|>", "<|end|>", content="message.content | trim"), "<|end|>", "</s>"),
    "tools": Family(TOOLS, "<|im_end|>", "<|im_end|>"),
}


def released(name: str) -> str:
    """The template of a model, as it was released."""
    return (Path(find_spec("trl").origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


QWEN = ("<|im_end|>", "<|im_end|>", "<|endoftext|>")
COHERE = ("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>")
LLAMA3 = ("<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>")
GEMMA = ("<end_of_turn>", "<eos>", "<bos>")

#: As released, with their special tokens.
RELEASED = {
    **{name: Family(released(name), *QWEN) for name in ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think")},
    **{name: Family(released(name), *COHERE) for name in ("cohere", "cohere2")},
    **{name: Family(released(name), *LLAMA3) for name in ("llama3", "llama3_1", "llama3_2")},
    "llama3_eot": Family(released("llama3"), "<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>"),
    "gemma": Family(released("gemma"), *GEMMA, system=False),
    "gemma3": Family(released("gemma3"), *GEMMA),
    "gemma4": Family(released("gemma4"), "<turn|>", "<eos>", "<bos>"),
    "phi3": Family(released("phi3"), "<|end|>", "<|endoftext|>"),
    "lfm2": Family(released("lfm2"), "<|im_end|>", "<|im_end|>", "<|startoftext|>"),
    "gptoss": Family(released("gptoss"), "<|return|>", "<|return|>", "<|startoftext|>"),
    "glm4moe": Family(released("glm4moe"), None, "<|endoftext|>"),
}

FAMILIES = WRITTEN | RELEASED
