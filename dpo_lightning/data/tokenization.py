"""Preference -> token ids such that the ids decode to the text and no answer character sits in a prompt token.

The prompt's ids are those of the prompt alone, which is what the model is given when it generates. An answer's ids are
what follows them in the joint text's ids, where these begin with the prompt's. Where a token merges across the boundary
they do not, and the answer is tokenized behind a character that nothing merges with.

A prompt is tokenized once, however many answers it has, and where the tokenizer allows it each different word once:
`tails` and `words` say how.

What is not yet known to spell its text is then decoded and compared with it; where they differ, a remark says how.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_lightning.data.preference import Preference, RowFault
from dpo_lightning.data.tails import AGREE, Behind, Head, Tails, encode
from dpo_lightning.data.words import LOST, Words, splits_at_words

Truncation = Literal["keep_end", "keep_start", "drop"]

#: Characters to put before an answer that is tokenized apart from its prompt.
FENCES = ("\n", "\x00", ".", "a")

#: Bytes of the longest character: the most tokens that one can be made of.
CHARACTER = 4


class TooLong(RowFault):
    """A row that `truncation: drop` drops: that was asked for, so it is not a bad row.

    `whole` is the number of tokens of prompt, chosen and rejected.
    """

    def __init__(self, message: str, whole: tuple[int, int, int]) -> None:
        super().__init__(message)
        self.whole = whole


@dataclass(frozen=True)
class TokenPair:
    """Ids of one preference: `prompt` `[Lp]` with BOS if the tokenizer has one, answers `[Lc]`, `[Lr]` with EOS."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray | None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.chosen) + (0 if self.rejected is None else len(self.rejected))


@dataclass(frozen=True)
class Encoded:
    """Ids of one row, and what was done to it: `cut`, `boundary` and `text` are remarks for the ledger, or empty.

    `whole` is the number of tokens of prompt, chosen and rejected before any cut.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    whole: tuple[int, int, int] = (0, 0, 0)
    cut: str = ""
    boundary: str = ""
    text: str = ""


class PairTokenizer:
    """Turns preferences into ids.

    Args:
        tokenizer: any tokenizer of transformers. Without an EOS token answers get none, and a model learns no end.
        max_length: most tokens of prompt + one answer + EOS.
        truncation: what a longer one loses: `keep_end` the prompt's start, `keep_start` the prompt's end, `drop` all.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, truncation: Truncation = "keep_end"
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation = truncation
        self.eos: int | None = tokenizer.eos_token_id
        self.joints: Tails | Words = (Words if splits_at_words(tokenizer) else Tails)(tokenizer)
        self.prefix = self._prefix()

    def __call__(self, preferences: Sequence[Preference]) -> list[Encoded | RowFault]:
        """Ids of each preference, or why it has none; in order."""
        heads = self.joints.heads(dict.fromkeys(p.prompt for p in preferences))
        remarks = self._head_remarks(heads.values())
        answers = [
            (heads[p.prompt], answer) for p in preferences for answer in (p.chosen, p.rejected) if answer is not None
        ]
        found = self._behind(answers)
        proofs = self._proofs(answers, [behind for behind, _ in found])
        encoded = iter([(behind.ids, clean, proof) for (behind, clean), proof in zip(found, proofs, strict=True)])
        return [self._row(p, heads[p.prompt].ids, remarks.get(p.prompt, ""), encoded) for p in preferences]

    def _row(
        self, p: Preference, ids: list[int], remark: str, encoded: Iterator[tuple[list[int], bool, str]]
    ) -> Encoded | RowFault:
        """The next one or two answers, put together with their prompt and cut."""
        names = ("chosen",) if p.rejected is None else ("chosen", "rejected")
        answers, clean, proofs = zip(*(next(encoded) for _ in names), strict=True)
        boundary = "" if all(clean) else "a token merges across the prompt's end"
        remarks = zip(("prompt", *names), (remark, *proofs), strict=True)
        text = "; ".join(f"the ids of {name} {remark}" for name, remark in remarks if remark)
        prompt = ids if p.templated else self._begin(ids)  # a template has written BOS, or left it out
        try:
            fitted = self._fit(prompt, [self._end(answer) for answer in answers], boundary, text)
            if p.templated and self.truncation == "keep_start" and len(fitted.prompt) < len(prompt):
                raise RowFault(
                    "keep_start would cut off the generation prompt, with which a conversation's prompt ends"
                )
            return fitted
        except RowFault as fault:
            return fault

    # Ids

    def _ids(self, texts: Iterable[str]) -> list[list[int]]:
        texts = list(texts)
        return encode(self.tokenizer, texts).input_ids if texts else []

    def _behind(self, answers: Sequence[tuple[Head, str]]) -> list[tuple[Behind, bool]]:
        """Each answer's ids, and whether the boundary is also one of the joint text's tokens."""
        found = self.joints.behind(answers)
        merged = [n for n, behind in enumerate(found) if behind is None]
        apart = dict(zip(merged, self._apart([answers[n] for n in merged]), strict=True))
        return [(Behind(apart[n]), False) if behind is None else (behind, True) for n, behind in enumerate(found)]

    def _apart(self, answers: Sequence[tuple[Head, str]]) -> list[list[int]]:
        """Ids of answers that merge with their prompts: of the answer alone, or behind a fence, whichever spell it."""
        joint = self._texts(self._ids(head.text + answer for head, answer in answers))
        candidates = [self._ids(answer for _, answer in answers)]
        for fence in FENCES if answers else ():
            [before, *behind] = self._ids([fence, *(fence + answer for _, answer in answers)])
            candidates.append([ids[len(before) :] if ids[: len(before)] == before else [] for ids in behind])
        spelled = [self._texts([h.ids + ids for (h, _), ids in zip(answers, c, strict=True)]) for c in candidates]
        return [
            next((c[n] for c, texts in zip(candidates, spelled, strict=True) if texts[n] == wanted), candidates[0][n])
            for n, wanted in enumerate(joint)
        ]

    def _prefix(self) -> list[int]:
        """What the tokenizer puts before a text: BOS, or nothing."""
        plain = self._ids(["a"])[0]
        full = self.tokenizer("a").input_ids
        starts = [i for i in range(len(full)) if full[i : i + len(plain)] == plain]
        return full[: starts[0]] if starts else []

    def _begin(self, prompt: list[int]) -> list[int]:
        """The prompt with BOS, once."""
        return prompt if prompt[: len(self.prefix)] == self.prefix else self.prefix + prompt

    def _end(self, answer: list[int]) -> list[int]:
        """The answer with EOS, once; as it is where the tokenizer has none."""
        return answer if self.eos is None or answer[-1:] == [self.eos] else [*answer, self.eos]

    # The proof

    def _head_remarks(self, heads: Iterable[Head]) -> dict[str, str]:
        """Prompt -> how its ids differ from it; those that are known to spell it are left out."""
        asked = [head for head in heads if not head.spelled]
        decoded = self._texts([head.ids for head in asked])
        return {head.text: difference(head.text, back) for head, back in zip(asked, decoded, strict=True)}

    def _proofs(self, answers: Sequence[tuple[Head, str]], found: Sequence[Behind]) -> list[str]:
        """How each answer's ids, decoded behind the prompt's last ones, differ from its text; empty if they do not."""
        remarks = [""] * len(answers)
        asked = [n for n, behind in enumerate(found) if not behind.spelled]
        ends = self._ends({answers[n][0].text: answers[n][0].ids for n in asked})
        joint = self._texts([[*ends[answers[n][0].text][0], *found[n].ids] for n in asked])
        for number, back in zip(asked, joint, strict=True):
            head, answer = answers[number]
            ending = ends[head.text][1]
            remarks[number] = difference(ending + answer, back, len(ending))
        return remarks

    def _ends(self, heads: Mapping[str, list[int]]) -> dict[str, tuple[list[int], str]]:
        """The last ids of each prompt, `AGREE` or a few more so as to begin with a whole character, decoded too."""
        decoded = self._texts([ids[-AGREE:] for ids in heads.values()])
        return {
            text: (ids[-AGREE:], end) if whole_end(text, end) else self._longer_end(ids, text)
            for (text, ids), end in zip(heads.items(), decoded, strict=True)
        }

    def _longer_end(self, ids: list[int], text: str) -> tuple[list[int], str]:
        """The same where `AGREE` of them begin inside a character."""
        contexts = [ids[-length:] for length in range(AGREE + 1, AGREE + CHARACTER)]
        found = ((context, self._text(context)) for context in contexts)
        return next(((context, end) for context, end in found if whole_end(text, end)), (ids, self._text(ids)))

    def _texts(self, ids: Sequence[list[int]]) -> list[str]:
        if self.tokenizer.is_fast:
            return self.tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return [self.tokenizer.decode(row, **options) for row in ids]

    def _text(self, ids: list[int]) -> str:
        return self._texts([ids])[0]

    # Cuts

    def _fit(self, prompt: list[int], answers: list[list[int]], boundary: str, text: str) -> Encoded:
        """Cut to `max_length`. The prompt gives way first, down to half of it; then the answers, which lose their EOS.

        EOS behind a cut answer would teach stopping in the middle of a sentence.

        Raises:
            RowFault: if the row is too long and is to be dropped, or its answers become identical.
        """
        if len(answers) == 2 and answers[0] == answers[1]:
            raise RowFault("chosen and rejected have identical tokens")
        longest = max(map(len, answers))
        whole = (len(prompt), len(answers[0]), len(answers[1]) if len(answers) == 2 else 0)
        if len(prompt) + longest <= self.max_length:
            return encoded(prompt, answers, whole, "", boundary, text)
        if self.truncation == "drop":
            raise TooLong(f"too long: {len(prompt) + longest} tokens, max_length is {self.max_length}", whole)
        room = max(self.max_length - longest, min(len(prompt), self.max_length // 2))
        if len(prompt) > room:
            prompt = self._cut_prompt(prompt, room)
        room = self.max_length - len(prompt)
        answers = [self._cut_end(answer, room) for answer in answers]
        lengths = zip(("prompt", "chosen", "rejected"), whole, map(len, (prompt, *answers)), strict=False)
        cut = "; ".join(
            f"{name} cut from {before} to {after} tokens" for name, before, after in lengths if after < before
        )
        if len(answers) == 2 and answers[0] == answers[1]:
            raise RowFault("chosen and rejected are identical after truncation")
        return encoded(prompt, answers, whole, cut, boundary, text)

    def _cut_prompt(self, prompt: list[int], room: int) -> list[int]:
        if self.truncation == "keep_start":
            return self._cut_end(prompt, room)
        start = self.prefix or [self.tokenizer.bos_token_id]  # which a template may have written
        bos = start if prompt[: len(start)] == start else []
        return bos + self._cut_start(prompt[len(bos) :], room - len(bos)) if room > len(bos) else prompt[:room]

    def _cut_end(self, ids: list[int], room: int) -> list[int]:
        """The first `room` ids, less those that would end inside a character."""
        if len(ids) <= room:
            return ids
        text = self._text(ids)
        cuts = (ids[: room - less] for less in range(min(CHARACTER, room)))
        return next((cut for cut in cuts if text.startswith(self._text(cut))), ids[:room])

    def _cut_start(self, ids: list[int], room: int) -> list[int]:
        """The last `room` ids, less those that would begin inside a character."""
        text, first = self._text(ids), len(ids) - room
        cuts = (ids[first + less :] for less in range(min(CHARACTER, room)))
        return next((cut for cut in cuts if text.endswith(self._text(cut))), ids[first:])


def encoded(
    prompt: list[int], answers: Sequence[list[int]], whole: tuple[int, int, int], cut: str, boundary: str, text: str
) -> Encoded:
    """A row from its prompt and one or two answers."""
    return Encoded(prompt, answers[0], answers[1] if len(answers) == 2 else [], whole, cut, boundary, text)


def whole_end(text: str, end: str) -> bool:
    """Whether a text ends so, and the end does not begin inside a character, which would spoil what follows."""
    return LOST not in end and text.endswith(end)


def difference(text: str, back: str, start: int = 0) -> str:
    """Where a text that came back from its ids first differs; empty where it does not.

    >>> difference("behind it", "behind 1t", start=7)
    "spell '1t' for 'it' at character 0"
    """
    if text == back:
        return ""
    place = next((n for n, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    return f"spell {back[place : place + 8]!r} for {text[place : place + 8]!r} at character {place - start}"
