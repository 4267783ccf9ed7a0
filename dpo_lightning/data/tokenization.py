"""Preference -> token ids such that the ids decode to the text and no answer character sits in a prompt token.

The prompt's ids are those of the prompt alone, which is what the model is given when it generates. An answer's ids are
what follows them in the joint text's ids, where these begin with the prompt's. Where a token merges across the boundary
they do not, and the answer is tokenized behind a character that nothing merges with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_lightning.data.formats import Preference, RowFault
from dpo_lightning.errors import InputError

Truncation = Literal["keep_end", "keep_start", "drop"]

#: Characters to put before an answer that is tokenized apart from its prompt.
FENCES = ("\n", "\x00", ".", "a")

#: Bytes of the longest character: the most tokens that one can be made of.
CHARACTER = 4

#: How the fault of a row that `truncation: drop` drops begins: that was asked for, so it is not a bad row.
TOO_LONG = "too long"


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
    """Ids of one row, and what was done to it: `cut` and `boundary` are remarks for the ledger, or empty.

    `whole_prompt` is the number of the prompt's tokens before any cut.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    whole_prompt: int = 0
    cut: str = ""
    boundary: str = ""


class PairTokenizer:
    """Turns preferences into ids.

    Args:
        tokenizer: any tokenizer of transformers with an EOS token.
        max_length: most tokens of prompt + one answer + EOS.
        truncation: what a longer one loses: `keep_end` the prompt's start, `keep_start` the prompt's end, `drop` all.

    Raises:
        InputError: if the tokenizer has no EOS token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, truncation: Truncation = "keep_end"
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"{tokenizer.name_or_path or type(tokenizer).__name__}: the tokenizer has no EOS token, without which "
                "a model never learns to stop; set eos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation = truncation
        self.eos: int = tokenizer.eos_token_id
        self.prefix = self._prefix()

    def __call__(self, preferences: Sequence[Preference]) -> list[Encoded | RowFault]:
        """Ids of each preference, or why it has none; in order."""
        prompts = self._ids([p.prompt for p in preferences])
        chosen = self._ids([p.prompt + p.chosen for p in preferences])
        pairwise = [p.rejected is not None for p in preferences]
        rejected = iter(self._ids([p.prompt + p.rejected for p in preferences if p.rejected is not None]))
        rows: list[Encoded | RowFault] = []
        for p, prompt, joint, pair in zip(preferences, prompts, chosen, pairwise, strict=True):
            answers = [(p.chosen, joint), (p.rejected, next(rejected))] if pair else [(p.chosen, joint)]
            ids = [self._answer(prompt, answer, joint) for answer, joint in answers]
            boundary = "" if all(clean for _, clean in ids) else "a token merges across the prompt's end"
            try:
                rows.append(self._fit(self._begin(prompt), [self._end(answer) for answer, _ in ids], boundary))
            except RowFault as fault:
                rows.append(fault)
        return rows

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        ).input_ids

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
        """The answer with EOS, once."""
        return answer if answer[-1:] == [self.eos] else [*answer, self.eos]

    def _answer(self, prompt: list[int], answer: str, joint: list[int]) -> tuple[list[int], bool]:
        """An answer's ids, and whether the boundary is also one of the joint text's tokens."""
        if joint[: len(prompt)] == prompt and len(joint) > len(prompt):
            return joint[len(prompt) :], True
        alone = self._ids([answer])[0]
        candidates = [alone]
        for fence in FENCES:
            fence_ids, fenced = self._ids([fence, fence + answer])
            if fenced[: len(fence_ids)] == fence_ids:
                candidates.append(fenced[len(fence_ids) :])
        wanted = self._text(joint)
        return next((ids for ids in candidates if self._text(prompt + ids) == wanted), alone), False

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _fit(self, prompt: list[int], answers: list[list[int]], boundary: str) -> Encoded:
        """Cut to `max_length`. The prompt gives way first, down to half of it; then the answers, which lose their EOS.

        EOS behind a cut answer would teach stopping in the middle of a sentence.

        Raises:
            RowFault: if the row is too long and is to be dropped, or its answers become identical.
        """
        if len(answers) == 2 and answers[0] == answers[1]:
            raise RowFault("chosen and rejected have identical tokens")
        longest = max(map(len, answers))
        if len(prompt) + longest <= self.max_length:
            return encoded(prompt, answers, len(prompt), "", boundary)
        if self.truncation == "drop":
            raise RowFault(f"{TOO_LONG}: {len(prompt) + longest} tokens, max_length is {self.max_length}")
        room = max(self.max_length - longest, min(len(prompt), self.max_length // 2))
        whole, remarks = len(prompt), []
        if whole > room:
            prompt = self._cut_prompt(prompt, room)
            remarks.append(f"prompt cut from {whole} to {len(prompt)} tokens")
        room = self.max_length - len(prompt)
        uncut, answers = answers, [self._cut_end(answer, room) for answer in answers]
        for name, before, after in zip(("chosen", "rejected"), uncut, answers, strict=False):
            if len(after) < len(before):
                remarks.append(f"{name} cut from {len(before)} to {len(after)} tokens")
        if len(answers) == 2 and answers[0] == answers[1]:
            raise RowFault("chosen and rejected are identical after truncation")
        return encoded(prompt, answers, whole, "; ".join(remarks), boundary)

    def _cut_prompt(self, prompt: list[int], room: int) -> list[int]:
        if self.truncation == "keep_start":
            return self._cut_end(prompt, room)
        bos = self.prefix if prompt[: len(self.prefix)] == self.prefix else []
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


def encoded(prompt: list[int], answers: Sequence[list[int]], whole_prompt: int, cut: str, boundary: str) -> Encoded:
    """A row from its prompt and one or two answers."""
    return Encoded(prompt, answers[0], answers[1] if len(answers) == 2 else [], whole_prompt, cut, boundary)
