"""What is in a table of pairs: lengths, what a layout makes of them, repetitions, and whether the longer answer wins.

Legend: P pairs
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import pandas
from datasets import Dataset

from dpo_lightning.data.batching import BatchPlan
from dpo_lightning.data.compiler import column
from dpo_lightning.data.packing import LAYOUTS, Layout

#: Batches of the plan by which layouts are compared.
BATCHES = 100

#: The parts of a pair.
PARTS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Lengths:
    """Tokens of each pair before any cut, BOS and EOS included: `[P]` each."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def longest(self) -> np.ndarray:
        """`[P]` what `max_length` limits: the prompt and the longer answer."""
        return self.prompt + np.maximum(self.chosen, self.rejected)

    @property
    def pairwise(self) -> bool:
        return bool(self.rejected.any())


def lengths_of(tables: Iterable[Dataset]) -> Lengths:
    """Of all pairs of some tables that were tokenized, those too that were dropped for their length."""
    tables = list(tables)
    lengths = [np.concatenate([column(table, f"whole_{part}") for table in tables]) for part in PARTS]
    tokenized = lengths[1] > 0
    return Lengths(*(values[tokenized] for values in lengths))


@dataclass(frozen=True)
class Cut:
    """What a `max_length` would do: the share of pairs that it cuts or drops, and of all tokens that it takes away."""

    max_length: int
    pairs: float
    tokens: float


def cuts(lengths: Lengths, limits: Iterable[int], drop: bool = False) -> list[Cut]:
    """What each limit would cut, by the tokenizer's rule: the prompt gives way first, down to half of the limit.

    Args:
        lengths: of all pairs.
        limits: in tokens.
        drop: whether a pair that is longer is dropped instead.
    """
    found = []
    for limit in sorted(set(limits)):
        answers = [lengths.chosen, lengths.rejected] if lengths.pairwise else [lengths.chosen]
        room = np.maximum(limit - np.maximum.reduce(answers), np.minimum(lengths.prompt, limit // 2))
        prompt = np.minimum(lengths.prompt, room)
        lost = (lengths.prompt - prompt).sum() + sum(np.maximum(a - (limit - prompt), 0).sum() for a in answers)
        if drop:
            lost = sum(part[lengths.longest > limit].sum() for part in (lengths.prompt, *answers))
        total = lengths.prompt.sum() + sum(answer.sum() for answer in answers)
        found.append(Cut(limit, float((lengths.longest > limit).mean()), float(lost / total)))
    return found


def layout_costs(prompt: np.ndarray, answers: Sequence[np.ndarray], batch_size: int) -> dict[str, float]:
    """Tokens a pair through the model, padding included, in each layout; and `needed`, what no layout can do without.

    Args:
        prompt: `[P]` tokens.
        answers: one or two of `[P]` tokens.
        batch_size: pairs of a batch; up to `BATCHES` batches of the first epoch's plan are laid out.
    """
    plan = BatchPlan(prompt + sum(answers), batch_size, shuffle=True)
    batches = [list(batch.pairs) for batch in islice(plan.batches(0), BATCHES)]
    pairs = sum(map(len, batches))
    found = {layout: sum(cells(prompt[b], [a[b] for a in answers], layout) for b in batches) for layout in LAYOUTS}
    found["needed"] = sum(int(prompt[b].sum() + sum(a[b].sum() for a in answers)) for b in batches)
    return {name: total / pairs for name, total in found.items()}


def cells(prompt: np.ndarray, answers: Sequence[np.ndarray], layout: Layout) -> int:
    """Tokens of one batch, padding included: all trees in one row, or each answer in a row of its own.

    A model that needs a mask has shorter rows, and some padding.

    >>> prompt, answers = np.array([3, 1]), [np.array([2, 1]), np.array([1, 1])]
    >>> {layout: cells(prompt, answers, layout) for layout in ("shared", "packed", "padded")}
    {'shared': 9, 'packed': 13, 'padded': 20}
    """
    trees = [prompt + sum(answers)] if layout == "shared" else [prompt + answer for answer in answers]
    lengths = np.concatenate(trees)
    return len(lengths) * int(lengths.max()) if layout == "padded" else int(lengths.sum())


@dataclass(frozen=True)
class Repetitions:
    """What comes more than once, as groups of places in the table, the largest first.

    Args:
        prompts: pairs of one prompt.
        pairs: the same prompt and the same two answers, preferred alike.
        contradictions: the same, once this and once the other preferred.
    """

    prompts: list[list[int]]
    pairs: list[list[int]]
    contradictions: list[list[int]]


def repetitions(table: Dataset) -> Repetitions:
    """By the hashes of the texts."""
    frame = pandas.DataFrame({part: column(table, f"{part}_hash") for part in PARTS})
    frame["low"], frame["high"] = np.minimum(frame.chosen, frame.rejected), np.maximum(frame.chosen, frame.rejected)
    unordered = [group for group in groups(frame, ["prompt", "low", "high"]) if frame.chosen[group].nunique() > 1]
    return Repetitions(groups(frame, ["prompt"]), groups(frame, list(PARTS)), unordered)


def groups(frame: pandas.DataFrame, names: list[str]) -> list[list[int]]:
    """The places of rows that agree in some columns with another row, group by group, the largest first."""
    again = frame[frame.duplicated(names, keep=False)]
    found = [places.tolist() for places in again.groupby(names, sort=False).indices.values()]
    return sorted(([int(again.index[place]) for place in group] for group in found), key=len, reverse=True)


@dataclass(frozen=True)
class LengthBias:
    """Whether the longer answer is the preferred one.

    Args:
        longer_wins: share of the pairs of unequal lengths whose chosen answer has more tokens.
        accuracy: of a rule that always prefers the longer one; a tie is half.
        error: half the width of the accuracy's 95% interval.
        mean_difference: chosen minus rejected, in tokens.
        by_difference: `(least, most, pairs, share)`: of pairs whose lengths differ by so much, how often the longer
            wins.
    """

    longer_wins: float
    accuracy: float
    error: float
    mean_difference: float
    by_difference: list[tuple[int, int, int, float]]


def length_bias(lengths: Lengths) -> LengthBias:
    """Of all pairs."""
    difference = lengths.chosen - lengths.rejected
    unequal = difference[difference != 0]
    correct = np.where(difference > 0, 1.0, np.where(difference == 0, 0.5, 0.0))
    edges = [1, 4, 16, 64, 256, int(np.abs(difference).max(initial=0)) + 1]
    bins = []
    for least, end in pairwise(edges):
        some = unequal[(np.abs(unequal) >= least) & (np.abs(unequal) < end)]
        if len(some):
            bins.append((least, end - 1, len(some), float((some > 0).mean())))
    return LengthBias(
        longer_wins=float((unequal > 0).mean()) if len(unequal) else 0.5,
        accuracy=float(correct.mean()),
        error=float(1.96 * correct.std() / np.sqrt(len(correct))),
        mean_difference=float(difference.mean()),
        by_difference=bins,
    )
