"""Small streams made on the spot, and the tables of the same rows, which are what they are compared with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
from datasets import Dataset, IterableDataset

from dpo_lightning.data.formats import all_pairs, triples
from dpo_lightning.data.packing import CHOSEN, PROMPT, REJECTED, PreferenceBatch
from dpo_lightning.data.preference import Format
from dpo_lightning.data.streams import StreamedPairs
from dpo_lightning.data.tables import Reader
from dpo_lightning.data.tokenization import PairTokenizer
from tests.tokenizers_built import byte_level

Row = dict[str, Any]

#: A pair as it is trained on: its id, and the ids of prompt, chosen and rejected.
Pair = tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]

Keep = Callable[[pyarrow.Table], None]


def plain(count: int, name: str = "row", bad: Sequence[int] = ()) -> list[Row]:
    """One pair a row, of unequal lengths; those in `bad` cannot be used."""
    return [
        {"prompt": f"{name} {i}?", "chosen": " " if i in bad else f" Yes{'!' * (i % 5)}", "rejected": f" No {i}."}
        for i in range(count)
    ]


def ranked(count: int, name: str = "row") -> list[Row]:
    """For `all_pairs`: none to six pairs each. Some rows are ties, some are bad, some have bad pairs in their midst."""
    rows = []
    for i in range(count):
        answers: list[str | None] = [f" {name} {i}, {n}" for n in range(2 + i % 3)]
        scores = [float(n) for n in range(len(answers))]
        if i % 5 == 2:
            scores = [1.0] * len(answers)
        if i % 6 == 4:
            answers[-2] = " "
        if i % 7 == 5:
            answers[0] = None
        rows.append({"prompt": f"{name} {i}?", "responses": answers, "scores": scores})
    return rows


#: Kinds of rows: how they are made, and read.
ROWS: dict[str, tuple[Callable[..., list[Row]], Format]] = {"plain": (plain, triples), "ranked": (ranked, all_pairs)}


def reader(
    format: Format | None = triples,
    bad_rows: float = 1.0,
    processes: int = 0,
    max_length: int = 1000,
    refuse_cuts: bool = False,
) -> Reader:
    options = {"bad_rows": bad_rows, "look_first": bad_rows < 1, "refuse_cuts": refuse_cuts, "processes": processes}
    return Reader(PairTokenizer(byte_level(), max_length), True, format=format, **options)


@dataclass(frozen=True)
class Tabled:
    """The usable pairs of rows in their order, and the ledger, by way of a table."""

    pairs: list[Pair]
    ledger: list[dict[str, Any]]


def tabled(rows: list[Row], format: Format = triples, name: str = "source 0") -> Tabled:
    whole = reader(format)
    table = whole.table([(name, Dataset.from_list(rows))], "train")
    pairs = [(row["id"], *(tuple(row[part]) for part in ("prompt", "chosen", "rejected"))) for row in table]
    return Tabled(pairs, whole.ledger.to_pylist())


class Ledger:
    """What a stream hands over as it is read."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def __call__(self, lines: pyarrow.Table) -> None:
        self.lines += lines.to_pylist()


def nothing_kept(lines: pyarrow.Table) -> None:
    pass


def stream(
    parts: Sequence[list[Row] | IterableDataset],
    weights: Sequence[float] | None = None,
    *,
    format: Format | None = triples,
    bad_rows: float = 1.0,
    keep: Keep = nothing_kept,
    buffer: int = 8,
    most: int | None = None,
    batch_size: int = 2,
    ranks: int = 1,
    rank: int = 0,
    accumulate: int = 1,
    seed: int = 0,
    read_by: Reader | None = None,
) -> StreamedPairs:
    """The batches of some rows; the sources are called `source 0` and so on."""
    rows = [part if isinstance(part, IterableDataset) else Dataset.from_list(part) for part in parts]
    named = [
        (f"source {number}", part.to_iterable_dataset() if isinstance(part, Dataset) else part)
        for number, part in enumerate(rows)
    ]
    return StreamedPairs(
        (read_by or reader(format, bad_rows)).streams(named, keep),
        weights,
        buffer=buffer,
        most=most,
        layout="shared",
        pairwise=True,
        batch_size=batch_size,
        ranks=ranks,
        rank=rank,
        accumulate=accumulate,
        seed=seed,
    )


def pairs_of(*batches: PreferenceBatch) -> list[Pair]:
    """The pairs of some batches in their order, without ghosts."""
    return [pair for batch in batches for pair, weight in zip(laid_out(batch), batch.weights, strict=True) if weight]


def laid_out(batch: PreferenceBatch) -> list[Pair]:
    """All pairs of a batch in the layout `shared`, where each is a tree."""
    found = []
    for tree, number in enumerate(batch.pair_ids.tolist()):
        parts = [
            tuple(batch.tokens[(batch.tree == tree) & (batch.branch == branch)].tolist())
            for branch in (PROMPT, CHOSEN, REJECTED)
        ]
        found.append((number, *parts))
    return found


def seen(batch: PreferenceBatch) -> tuple[list[Pair], list[float], int]:
    """All of a batch that training depends on."""
    return laid_out(batch), batch.weights.tolist(), batch.pairs_in_step
