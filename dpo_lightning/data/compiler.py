"""Rows of a source -> a table of token ids, and a ledger of every row that was dropped or cut."""

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, config
from datasets.fingerprint import Hasher

from dpo_lightning.data.formats import Format, RowFault, check
from dpo_lightning.data.tokenization import TOO_LONG, Encoded, PairTokenizer
from dpo_lightning.errors import InputError

#: Enters the key of cached tokens: raise it when the same text and options give other tokens.
VERSION = 1

#: Rows that an error names.
NAMED_ROWS = 3

#: One line a row of the source; `row` counts from 0. `prompt_hash` is of the text, so that a split by it does not
#: depend on the tokenizer; `whole_prompt` is the prompt's tokens before any cut.
FEATURES = Features(
    {
        "row": Value("int64"),
        "prompt": List(Value("int32")),
        "chosen": List(Value("int32")),
        "rejected": List(Value("int32")),
        "prompt_tokens": Value("int32"),
        "chosen_tokens": Value("int32"),
        "rejected_tokens": Value("int32"),
        "whole_prompt": Value("int32"),
        "prompt_hash": Value("int64"),
        "fault": Value("string"),
        "cut": Value("string"),
        "boundary": Value("string"),
    }
)


@dataclass(frozen=True)
class LedgerLine:
    """What was done to one row: `action` is dropped, cut or boundary."""

    split: str
    source: str
    row: int
    action: str
    reason: str


def compile_rows(rows: Dataset, name: str, format: Format, tokenizer: PairTokenizer, pairwise: bool) -> Dataset:
    """The table of a source's rows, as `FEATURES` says; kept by `datasets` and found again when nothing has changed.

    Args:
        rows: the source.
        name: its name, for the progress bar.
        format: row -> preference.
        tokenizer: preference -> ids.
        pairwise: whether rejected answers are needed.
    """

    def compile_batch(batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        singles = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return as_columns(list(lines(singles, indices, format, tokenizer, pairwise)))

    backend = tokenizer.tokenizer.backend_tokenizer if tokenizer.tokenizer.is_fast else tokenizer.tokenizer
    vocabulary = backend.to_str() if tokenizer.tokenizer.is_fast else backend
    options = (tokenizer.max_length, tokenizer.truncation, tokenizer.eos, tokenizer.prefix, pairwise)
    fingerprint = Hasher.hash((VERSION, rows._fingerprint, format, source_of(format), vocabulary, options))
    cache = Path(config.HF_DATASETS_CACHE) / "dpo_lightning" / f"{fingerprint}.arrow"
    cache.parent.mkdir(parents=True, exist_ok=True)
    try:
        return rows.map(
            compile_batch,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=FEATURES,
            new_fingerprint=fingerprint,
            cache_file_name=str(cache),
            desc=f"Tokenizing {name}",
        )
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: is not UTF-8 text: {error}; convert it") from error


def source_of(format: Format) -> bytes:
    """The file a format is defined in: `Hasher` knows an imported function by its name only, whatever it does."""
    file = getattr(inspect.getmodule(format), "__file__", None)
    return Path(file).read_bytes() if file else b""


def lines(
    rows: Sequence[Mapping[str, Any]], indices: Sequence[int], format: Format, tokenizer: PairTokenizer, pairwise: bool
) -> Iterator[dict[str, Any]]:
    """One line of the table for each row."""
    results: list[Any] = []  # a preference, then its ids; or a fault
    for row in rows:
        try:
            results.append(check(format(row), pairwise))
        except RowFault as fault:
            results.append(fault)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # of a format of the user's own
            results.append(RowFault(f"{format.__name__} failed with {type(error).__name__}: {error}"))
    usable = [result for result in results if not isinstance(result, RowFault)]
    encoded = iter(tokenizer(usable))
    for index, result in zip(indices, results, strict=True):
        prompt = "" if isinstance(result, RowFault) else result.prompt
        yield line(index, prompt, result if isinstance(result, RowFault) else next(encoded))


def line(row: int, prompt: str, result: Encoded | RowFault) -> dict[str, Any]:
    """One line of the table."""
    ids = Encoded([], [], []) if isinstance(result, RowFault) else result
    return {
        "row": row,
        "prompt": ids.prompt,
        "chosen": ids.chosen,
        "rejected": ids.rejected,
        "prompt_tokens": len(ids.prompt),
        "chosen_tokens": len(ids.chosen),
        "rejected_tokens": len(ids.rejected),
        "whole_prompt": ids.whole_prompt,
        "prompt_hash": prompt_hash(prompt),
        "fault": str(result) if isinstance(result, RowFault) else "",
        "cut": ids.cut,
        "boundary": ids.boundary,
    }


def prompt_hash(prompt: str) -> int:
    """64 bits of the prompt's text, the same on every machine."""
    digest = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def as_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in FEATURES}


def column(table: Dataset, name: str) -> np.ndarray:
    """A column of numbers as one array."""
    return np.asarray(table.with_format("numpy")[name][:])


def ledger(table: Dataset, split: str, source: str) -> list[LedgerLine]:
    """A line for everything that was done to a row, in the rows' order."""
    found = []
    for field, action in (("fault", "dropped"), ("cut", "cut"), ("boundary", "boundary")):
        remarks = np.asarray(table[field][:], dtype=object)
        where = np.flatnonzero(remarks != "")
        found += [LedgerLine(split, source, int(row), action, remarks[row]) for row in where]
    return sorted(found, key=lambda line: line.row)


def drop_faults(table: Dataset, source: str, bad_rows: float, max_length: int | None) -> Dataset:
    """The rows that can be used.

    Args:
        table: as compiled.
        source: its name, for errors.
        bad_rows: the largest share that may be dropped for a fault. Rows that `truncation: drop` drops do not count.
        max_length: refuse prompts that are all longer than this, whose truncation nobody asked for; None: do not.

    Raises:
        InputError: if more are bad, every prompt is longer than `max_length`, or nothing is left.
    """
    faults = np.asarray(table["fault"][:], dtype=object)
    usable = np.flatnonzero(faults == "")
    prompts = column(table, "whole_prompt")[usable]
    if max_length is not None and len(usable) and prompts.min() > max_length:
        raise InputError(
            f"{source}: data.max_length {max_length} is shorter than every prompt (the shortest, row "
            f"{usable[prompts.argmin()]}, has {prompts.min()} tokens); raise data.max_length, or set "
            "data.truncation to cut them all"
        )
    bad = [row for row in np.flatnonzero(faults != "").tolist() if not faults[row].startswith(TOO_LONG)]
    if len(bad) > bad_rows * len(table):
        first = "; ".join(f"row {row}: {faults[row]}" for row in bad[:NAMED_ROWS])
        raise InputError(
            f"{source}: {len(bad)} of {len(table)} rows cannot be used, more than the share {bad_rows:g} that may be "
            f"dropped; {first}{' ...' if len(bad) > NAMED_ROWS else ''} (rows count from 0); mend them, or raise "
            "data.bad_rows"
        )
    if not len(usable):
        raise InputError(f"{source}: no row is left; row 0: {faults[0]}; mend the rows, or raise data.max_length")
    return table.select(usable)
