"""Batches out of sources that are read as they are trained on, a window of pairs at a time.

A window is the next `buffer` usable pairs of the sources; it is compiled, shuffled and planned like a whole table is.
What is kept in memory is one window, whatever the source's length. Every rank reads the whole stream and makes the same
plan, so that an optimizer step has the same pairs however many ranks there are. The order is a pure function of (seed,
epoch, window), and a window is found again by the place in each source where it begins.
"""

import math
from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, DatasetInfo, IterableDataset, concatenate_datasets
from torch.utils.data import IterableDataset as TorchIterable

from dpo_lightning.data.batching import BatchPlan, Order
from dpo_lightning.data.compiler import (
    FEATURES,
    NAMED_ROWS,
    Compiler,
    check_lengths,
    column,
    ledger,
    named_fault,
    no_row_left,
    remarked,
    too_many_bad,
)
from dpo_lightning.data.packing import Layout, PreferenceBatch
from dpo_lightning.data.pairs import TokenizedPairs
from dpo_lightning.data.sources import each_row
from dpo_lightning.errors import InputError

#: Rows that are compiled at once.
CHUNK = 1_000


@dataclass(frozen=True)
class Place:
    """Where in a source a window begins.

    Args:
        row: of its first pair.
        pair: that pair's number in the row.
        line: pairs before it, dropped ones too: the id of the first.
        bad: bad rows before it.
    """

    row: int = 0
    pair: int = 0
    line: int = 0
    bad: int = 0


class StreamedSource:
    """The usable pairs of a source in its order, from any place on.

    Args:
        name: of the source, for errors.
        rows: to be read.
        compiler: rows -> lines of ids.
        bad_rows: the largest share of the rows read so far that may be bad.
        keep: called with the ledger of what was done to rows when they are compiled for the first time.
        max_length: refuse a source whose first prompts are all longer than this, whose truncation nobody asked for.
    """

    def __init__(
        self,
        name: str,
        rows: IterableDataset,
        compiler: Compiler,
        bad_rows: float,
        keep: Callable[[pyarrow.Table], None],
        max_length: int | None = None,
    ) -> None:
        self.name = name
        self.rows = rows
        self.compiler = compiler
        self.bad_rows = bad_rows
        self.keep = keep
        self.max_length = max_length
        self.first_bad: list[str] = []
        self.known: float = 0  # lines that the ledger has
        self.usable = False  # whether any pair can be used
        self.first_fault = ""
        self.start(Place())

    def start(self, place: Place) -> None:
        """Go on from a place."""
        self.usable = self.usable or place.row > 0
        self.place = place
        self.bad_before, self.bad_lines = place.bad, []
        self.next_row = place.row
        self.next_line = place.line
        self.ready: deque[Dataset] = deque()  # compiled, and not yet taken
        self.reader = each_row(self.rows.skip(place.row) if place.row else self.rows, self.name)

    def take(self, count: int) -> list[Dataset]:
        """The next usable pairs, `count` of them or as many as are left, in tables with an `id`.

        Raises:
            InputError: if the source cannot be read, or too many of its rows are bad.
        """
        taken: list[Dataset] = []
        while count and self._has_ready():
            table = self.ready.popleft()
            if len(table) > count:
                self.ready.appendleft(table.select(range(count, len(table))))
                table = table.select(range(count))
            taken.append(table)
            count -= len(table)
            last = table[-1]
            bad = self.bad_before + bisect(self.bad_lines, last["id"])
            self.place = Place(last["row"], last["pair"] + 1, last["id"] + 1, bad)
        return taken

    def _has_ready(self) -> bool:
        """Whether there are more pairs; compiles rows until there are."""
        while not self.ready:
            if not self._compile():
                return False
        return True

    def _compile(self) -> bool:
        """Compile the next rows; False at the source's end."""
        rows = list(islice(self.reader, CHUNK))
        if not rows:
            self._check_bad(margin=0)
            if not self.usable:
                raise no_row_left(self.name, self.first_fault)
            return False
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
        indices = range(self.next_row, self.next_row + len(rows))
        table = Dataset(self.compiler.columns(columns, indices), DatasetInfo(features=FEATURES))
        # A window may begin in the middle of a row: what stands before it was taken.
        before = (column(table, "row") == self.place.row) & (column(table, "pair") < self.place.pair)
        table = table.select(np.flatnonzero(~before))
        table = table.add_column("id", np.arange(self.next_line, self.next_line + len(table)))
        self.next_row, self.next_line = self.next_row + len(rows), self.next_line + len(table)
        if self.next_line > self.known:
            new = table.select(np.flatnonzero(column(table, "id") >= self.known))
            self.keep(ledger(new, "train", self.name))
            self.known = self.next_line
        bad = table.select(np.flatnonzero(column(table, "bad")))
        self.bad_lines += bad["id"][:]
        if len(self.first_bad) < NAMED_ROWS:
            self.first_bad += [named_fault(line) for line in bad.select(range(min(len(bad), NAMED_ROWS)))]
        self._check_bad(margin=3)
        faults = remarked(table, "fault")
        usable = table.select(np.setdiff1d(np.arange(len(table)), faults, assume_unique=True))
        if len(usable):
            if self.max_length is not None and not self.usable:
                check_lengths(usable, self.name, self.max_length)
            self.usable = True
            self.ready.append(usable)
        elif not self.usable and not self.first_fault:
            self.first_fault = table[0]["fault"] if len(table) else ""
        return True

    def _check_bad(self, margin: float) -> None:
        """More rows may be bad at the start than of the whole: by `margin` standard deviations of their number."""
        bad, expected = self.bad_before + len(self.bad_lines), self.bad_rows * self.next_line
        if bad > expected + margin * math.sqrt(expected):
            raise too_many_bad(bad, self.next_line, self.first_bad, self.name, self.bad_rows)


class WindowOrder(Order):
    """A window's pairs, shuffled by (seed, epoch, window)."""

    def __init__(self, pairs: int, seed: int, window: int) -> None:
        super().__init__(pairs, seed)
        self.window = window

    def __call__(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch, self.window)).permutation(self.pairs)


class StreamedPairs(TorchIterable[PreferenceBatch]):
    """The batches of one rank, epoch by epoch; each iteration is the next epoch.

    Args:
        sources: read one after another; or, with weights, at once.
        weights: shares of the sources in each window; an epoch ends with the first source that has no more.
        buffer: most pairs of a window; rounded down to whole optimizer steps, one at least.
        most: pairs of an epoch at most.
        layout: how batches are laid out.
        pairwise: whether rejected answers are laid out.
        row_tokens: tokens of a row at most; None: as many as the batch's longest tree has.
        batch_size: most pairs of a micro-batch.
        ranks: number of ranks.
        rank: this one.
        accumulate: micro-batches of a full optimizer step.
        seed: of the order, with epoch and window.

    Attributes:
        began: batches of this epoch that were trained on before its iteration began.
    """

    def __init__(
        self,
        sources: Sequence[StreamedSource],
        weights: Sequence[float] | None,
        *,
        buffer: int,
        most: int | None,
        layout: Layout,
        pairwise: bool,
        row_tokens: int | None = None,
        batch_size: int,
        ranks: int,
        rank: int,
        accumulate: int,
        seed: int,
    ) -> None:
        self.sources = sources
        self.weights = None if weights is None else np.asarray(weights) / np.sum(weights)
        step = batch_size * ranks * accumulate
        self.buffer = max(buffer // step, 1) * step
        if self.weights is not None and 0 in (shares := quotas(self.weights, self.buffer)):
            number = shares.index(0)
            raise InputError(
                f"data.weights: {weights[number]} for source {number} is less than one pair in a window of "
                f"{self.buffer}; raise it, raise data.shuffle_buffer, or leave the source out"
            )
        self.most = most
        self.layout: Layout = layout
        self.pairwise = pairwise
        self.row_tokens = row_tokens
        self.batch_size, self.ranks, self.rank, self.accumulate, self.seed = batch_size, ranks, rank, accumulate, seed
        self.epoch = 0
        self.began = 0
        self.begun: deque[dict[str, Any]] = deque(maxlen=2)  # this window and the one before it
        self.batches: int | None = None  # of this epoch, once it has come to its end
        self._resumed: tuple[int, dict[str, Any]] | None = None

    def state(self, done: int) -> dict[str, Any]:
        """Where the next batch is.

        Args:
            done: batches of this epoch that were trained on.
        """
        if not self.begun:
            return {"epoch": self.epoch, "done": 0, "window": self._beginning()}
        if done == self.batches:
            return {"epoch": self.epoch + 1, "done": 0, "window": self._beginning()}
        window = next(w for w in reversed(self.begun) if w["batches"] <= done)
        return {"epoch": self.epoch, "done": done, "window": window}

    def resume(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin where `state` says; what was dropped and cut before is in a ledger already."""
        for source, place in zip(self.sources, state["window"]["places"], strict=True):
            source.known = math.inf if state["epoch"] else place["line"]
        self.epoch = state["epoch"] - 1
        self._resumed = (state["done"], state["window"])

    def _beginning(self) -> dict[str, Any]:
        places = [asdict(Place()) for _ in self.sources]
        return {"number": 0, "batches": 0, "pairs": 0, "places": places}

    def __iter__(self) -> Iterator[PreferenceBatch]:
        first_time = self.batches is None and not self.begun and self._resumed is None
        self.epoch += 0 if first_time else 1
        done, window = self._resumed or (0, self._beginning())
        self._resumed, self.batches = None, None
        self.began = done
        self.begun.clear()
        for source, place in zip(self.sources, window["places"], strict=True):
            source.start(Place(**place))
        number, batches, pairs = window["number"], window["batches"], window["pairs"]
        while True:
            places = [asdict(source.place) for source in self.sources]
            self.begun.append({"number": number, "batches": batches, "pairs": pairs, "places": places})
            table = self._window(self.buffer if self.most is None else min(self.buffer, self.most - pairs))
            if table is None:
                self.batches = batches
                return
            window_pairs = TokenizedPairs(table, self.layout, self.pairwise, self.row_tokens)
            plan = self._plan(window_pairs.costs, number)
            for batch in islice(plan.batches(self.epoch), max(done - batches, 0), None):
                yield window_pairs[batch]
            number, batches, pairs = number + 1, batches + len(plan), pairs + len(table)

    def _plan(self, costs: np.ndarray, number: int) -> BatchPlan:
        return BatchPlan(
            costs,
            self.batch_size,
            ranks=self.ranks,
            rank=self.rank,
            accumulate=self.accumulate,
            order=WindowOrder(len(costs), self.seed, number),
        )

    def _window(self, count: int) -> Dataset | None:
        """The next pairs of the sources, `count` or fewer at an epoch's end; None after it."""
        parts: list[Dataset] = []
        if self.weights is None:
            for number, source in enumerate(self.sources):
                parts += [with_source(table, number) for table in source.take(count - sum(map(len, parts)))]
        else:
            taken = [
                source.take(quota) for source, quota in zip(self.sources, quotas(self.weights, count), strict=True)
            ]
            lengths = [sum(map(len, tables)) for tables in taken]
            if sum(lengths) < count:  # one has come to its end: only so many of the others as keep the shares
                count = math.floor(min(length / weight for length, weight in zip(lengths, self.weights, strict=True)))
                lengths = np.minimum(quotas(self.weights, count), lengths).tolist()
            for number, (tables, length) in enumerate(zip(taken, lengths, strict=True)):
                if length:
                    parts.append(with_source(concatenate_datasets(tables).select(range(length)), number))
        return concatenate_datasets(parts) if parts else None


def with_source(table: Dataset, number: int) -> Dataset:
    return table.add_column("source", np.full(len(table), number, dtype=np.int32))


def quotas(weights: np.ndarray, count: int) -> list[int]:
    """Whole numbers that sum to `count` and are nearest to the weights' shares of it.

    >>> quotas(np.array([0.5, 0.3, 0.2]), 9)
    [4, 3, 2]
    """
    exact = weights * count
    whole = np.floor(exact + 1e-9).astype(int)
    for number in np.argsort(whole - exact, kind="stable")[: count - whole.sum()]:
        whole[number] += 1
    return whole.tolist()
