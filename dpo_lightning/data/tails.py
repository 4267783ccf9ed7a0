"""Prompts and the answers behind them -> ids, for any tokenizer: each prompt once, answers behind its tail.

An answer is tokenized behind the prompt's last characters only, and where its tokens begin is read off the tokenizer's
offsets. That is trusted where the tokens before the answer are those that end the prompt alone; where they are not,
the whole joint text is tokenized.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import BatchEncoding, PreTrainedTokenizerBase

#: Characters of a prompt's end that are tokenized again with an answer, and the tokens that must come out the same.
TAIL, AGREE = 80, 8


@dataclass(frozen=True)
class Head:
    """A prompt, tokenized alone.

    Args:
        text: of the prompt.
        ids: `[Lp]`, without BOS.
        tail: the last characters, with which answers are tokenized; all of them in a short one.
        spelled: whether the ids are known to spell the text; else that is still to be proven.
    """

    text: str
    ids: list[int]
    tail: str
    spelled: bool = False

    @property
    def is_cut(self) -> bool:
        return len(self.tail) < len(self.text)


@dataclass(frozen=True)
class Behind:
    """An answer's ids behind its prompt's; `spelled` as in `Head`."""

    ids: list[int]
    spelled: bool = False


class Tails:
    """How any tokenizer's ids of prompts and answers are found."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def heads(self, texts: Iterable[str]) -> dict[str, Head]:
        """Each prompt, tokenized once."""
        texts = list(texts)
        if not texts:
            return {}
        encoding = encode(self.tokenizer, texts)
        starts = (tail_start(encoding, number, text) for number, text in enumerate(texts))
        return {
            text: Head(text, ids, text[start:])
            for text, ids, start in zip(texts, encoding.input_ids, starts, strict=True)
        }

    def behind(self, answers: Sequence[tuple[Head, str]]) -> list[Behind | None]:
        """What follows the prompt's ids in the joint text's; None where these do not begin with the prompt's."""
        found: list[list[int] | None] = []
        if answers:
            encoding = encode(self.tokenizer, [head.tail + answer for head, answer in answers])
            found = [after(encoding, number, head) for number, (head, _) in enumerate(answers)]
        again = [n for n, ids in enumerate(found) if ids is None and answers[n][0].is_cut]
        whole = [answers[n][0].text + answers[n][1] for n in again]
        joints = encode(self.tokenizer, whole).input_ids if whole else []
        for number, joint in zip(again, joints, strict=True):
            found[number] = without(answers[number][0].ids, joint)
        return [None if ids is None else Behind(ids) for ids in found]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> BatchEncoding:
    """A tokenizer on some texts, without special tokens of its own."""
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)


def tail_start(encoding: BatchEncoding, number: int, text: str) -> int:
    """Where a prompt's tail begins: at a token, `TAIL` characters or more before its end; 0 where that is not known."""
    token = encoding.char_to_token(number, len(text) - TAIL) if encoding.is_fast and len(text) > TAIL else None
    return 0 if token is None else encoding.token_to_chars(number, token).start


def after(encoding: BatchEncoding, number: int, head: Head) -> list[int] | None:
    """The ids behind the prompt's in an encoding of its tail and an answer; None where they cannot be told apart."""
    joint = encoding.input_ids[number]
    if not head.is_cut:
        return without(head.ids, joint)
    first = encoding.char_to_token(number, len(head.tail))
    if first is None or first <= AGREE or encoding.token_to_chars(number, first).start != len(head.tail):
        return None
    return joint[first:] if joint[first - AGREE : first] == head.ids[-AGREE:] else None


def without(prompt: list[int], joint: list[int]) -> list[int] | None:
    """The joint text's ids without the prompt's; None where they do not begin with them, or end there."""
    return joint[len(prompt) :] if joint[: len(prompt)] == prompt and len(joint) > len(prompt) else None
