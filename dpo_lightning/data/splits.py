"""Who trains and who validates: the splits of sources, named, found or made by a hash of the prompts."""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from dpo_lightning.data.compiler import column
from dpo_lightning.data.sources import Rows, first_rows, is_stream, read
from dpo_lightning.errors import InputError

#: `(name, rows)` of some sources.
Parts = list[tuple[str, Rows]]

#: Names that a source's own validation split goes by, the best first. A split to train on that is called `train_prefs`
#: has `test_prefs` beside it.
VALIDATION_SPLITS = ("validation", "valid", "val", "test", "eval")

#: Rows of a stream's own validation split that are read where `max_val_pairs` does not say.
STREAMED_ROWS = 2_000

#: Rows that are read beyond twice the pairs that are asked for: some may be ties, or have faults.
SPARE_ROWS = 32


@dataclass(frozen=True)
class Splits:
    """The parts of each split; `val` is None where the first are to be split, `test` empty where it has the same."""

    train: Parts
    val: Parts | None
    test: Parts


def find_splits(
    sources: list[str],
    train_split: str,
    val_split: str | None,
    val_sources: list[str] | None,
    val_fraction: float | None,
    streaming: bool,
) -> Splits:
    """Validation is what is named; else the sources' own validation or test split; else to be split off.

    Raises:
        InputError: if a source or a split is not there.
    """
    read_splits = [(source, read(source, streaming)) for source in sources]
    train = [(s, choose_split(splits, train_split, s, "data.train_split")) for s, splits in read_splits]
    others = [(s, {n: rows for n, rows in splits.items() if n != train_split}) for s, splits in read_splits]
    own = [(s, own_validation(splits, train_split)) for s, splits in others]
    val: Parts | None
    if val_sources is not None:
        own, val = [], [(source, only_split(read(source), source)) for source in val_sources]
    elif val_fraction is not None:
        own, val = [], None
    elif val_split is not None:
        own = [(s, val_split) for s, _ in read_splits]
        val = [(s, choose_split(splits, val_split, s, "data.val_split")) for s, splits in read_splits]
    else:
        val = [(s, splits[name]) for (s, splits), (_, name) in zip(others, own, strict=True) if name] or None
    test = [(s, splits["test"]) for s, splits in others if "test" in splits and (s, "test") not in own]
    return Splits(train, val, test)


def choose_split(splits: dict[str, Rows], name: str, source: str, option: str) -> Rows:
    """A split by name; the error lists those that there are.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in splits:
        raise InputError(f"{source}: has no split {name!r}, only {', '.join(splits)}; set {option}")
    return splits[name]


def own_validation(splits: dict[str, Rows], train_split: str = "train") -> str | None:
    """The name of the source's own validation split, or None."""
    suffix = train_split.removeprefix("train") if train_split.startswith("train_") else ""
    names = [name + suffix for name in VALIDATION_SPLITS] if suffix else []
    return next((name for name in (*names, *VALIDATION_SPLITS) if name in splits), None)


def only_split(splits: dict[str, Rows], source: str) -> Rows:
    """The rows of a validation source: its validation or test split, or its only one."""
    name = own_validation(splits) or (next(iter(splits)) if len(splits) == 1 else None)
    if name is None:
        raise InputError(f"{source}: none of its splits {', '.join(splits)} is for validation; give a file instead")
    return splits[name]


def materialised(parts: Parts, most: int | None) -> list[tuple[str, Dataset]]:
    """The same with the first rows of a stream as a table."""
    return [
        (source, Dataset.from_list(first_rows(rows, source, most or STREAMED_ROWS)) if is_stream(rows) else rows)
        for source, rows in parts
    ]


def with_spare(pairs: int | None) -> int | None:
    """Rows to read for so many pairs, some of which may not be usable."""
    return pairs and 2 * pairs + SPARE_ROWS


def split_by_prompt(table: Dataset, fraction: float, source: str) -> tuple[Dataset, Dataset]:
    """A table in two, no prompt on both sides; the second has the `fraction` of prompts whose hashes are smallest.

    Raises:
        InputError: if there is only one prompt.
    """
    hashes = column(table, "prompt_hash")
    prompts = np.unique(hashes)
    if len(prompts) < 2:
        raise InputError(f"{source}: has only one prompt, so it cannot both train and validate; name data.val_source")
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    val = hashes <= prompts[count - 1]
    return table.select(np.flatnonzero(~val)), table.select(np.flatnonzero(val))
