"""Rows of a source -> a table of token ids, and a ledger of every row that was dropped or cut.

The table is an Arrow file that stays on disk: nothing here keeps a Python object for a row that is as it should be.
"""

import gc
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset, Features, List, Value, config
from datasets.fingerprint import Hasher

from dpo_lightning.data.chat import ChatTemplate
from dpo_lightning.data.preference import Conversation, Format, NoPreference, Preference, RowFault, check
from dpo_lightning.data.tokenization import Encoded, PairTokenizer, TooLong
from dpo_lightning.errors import InputError

#: Enters the key of cached tokens: raise it when the same text and options give other tokens.
VERSION = 4

#: Rows that an error names, and those of a source's beginning that are looked at before all others.
NAMED_ROWS, FIRST_ROWS = 3, 100

#: Rows for which it is worth starting a process: two for 5,000 rows of HH take longer than none.
ROWS_A_PROCESS = 5_000

#: One line a pair. `row` is its row in the source, from 0, and `pair` its number in that row. Hashes are of the texts,
#: so that a split by them does not depend on the tokenizer; `whole_...` are tokens before any cut. A line with a
#: `fault` has no ids; it is `bad` unless it was asked for. `cut`, `boundary` and `text` are remarks on usable lines.
FEATURES = Features(
    {
        "row": Value("int64"),
        "pair": Value("int32"),
        **dict.fromkeys(("prompt", "chosen", "rejected"), List(Value("int32"))),
        **dict.fromkeys(("prompt_tokens", "chosen_tokens", "rejected_tokens"), Value("int32")),
        **dict.fromkeys(("whole_prompt", "whole_chosen", "whole_rejected"), Value("int32")),
        **dict.fromkeys(("prompt_hash", "chosen_hash", "rejected_hash"), Value("int64")),
        **dict.fromkeys(("bad", "templated"), Value("bool")),
        **dict.fromkeys(("fault", "cut", "boundary", "text"), Value("string")),
    }
)

SCHEMA = FEATURES.arrow_schema

#: Column of the table -> what the ledger calls it.
ACTIONS = {"fault": "dropped", "cut": "cut", "boundary": "boundary", "text": "text"}

#: A line of the ledger: what was done to one pair of a row, and why.
LEDGER = pyarrow.schema(
    {
        "split": pyarrow.string(),
        "source": pyarrow.string(),
        "row": pyarrow.int64(),
        "pair": pyarrow.int32(),
        "action": pyarrow.string(),
        "reason": pyarrow.string(),
    }
)


class Compiler:
    """Compiles the rows of one source.

    Args:
        format: row -> preferences.
        tokenizer: preference -> ids.
        pairwise: whether rejected answers are needed.
        processes: that tokenize at once, where there are many rows.
    """

    def __init__(self, format: Format, tokenizer: PairTokenizer, pairwise: bool, processes: int = 0) -> None:
        self.format = format
        self.tokenizer = tokenizer
        self.pairwise = pairwise
        self.processes = processes
        self.template = ChatTemplate(tokenizer.tokenizer)

    def __call__(self, rows: Dataset, name: str) -> Dataset:
        """The table of a source's rows, as `FEATURES` says; kept on disk, and found again when nothing has changed.

        Args:
            rows: the source.
            name: its name, for errors and the progress bar.

        Raises:
            InputError: if it is not text.
        """
        cache = Path(config.HF_DATASETS_CACHE) / "dpo_lightning" / f"{self.fingerprint(rows)}.arrow"
        cache.parent.mkdir(parents=True, exist_ok=True)
        processes = min(self.processes, len(rows) // ROWS_A_PROCESS)
        try:
            return rows.map(
                self.columns,
                batched=True,
                with_indices=True,
                remove_columns=rows.column_names,
                features=FEATURES,
                new_fingerprint=cache.stem,
                cache_file_name=str(cache),
                num_proc=processes if processes > 1 else None,
                desc=f"Tokenizing {name}",
            )
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: is not UTF-8 text: {error}; convert it") from error

    def fingerprint(self, rows: Dataset) -> str:
        """Of everything that the tokens depend on."""
        tokenizer = self.tokenizer.tokenizer
        vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer
        options = (self.tokenizer.max_length, self.tokenizer.truncation, self.tokenizer.eos, self.tokenizer.prefix)
        # The names of special tokens may be written by the template.
        chat = (tokenizer.chat_template, tokenizer.special_tokens_map)
        today = str(date.today()) if "strftime_now" in str(tokenizer.chat_template) else ""
        format = (self.format, source_of(self.format))
        return Hasher.hash((VERSION, rows._fingerprint, format, vocabulary, options, chat, today, self.pairwise))

    def columns(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> pyarrow.Table:
        """The lines of a batch of rows, as columns."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        with uncollected():
            lines = list(self.lines(rows, indices))
        cells = {name: [line[name] for line in lines] for name in FEATURES}
        columns = {name: flat(cells.pop(name)) for name in ("prompt", "chosen", "rejected")} | cells
        return pyarrow.table({name: columns[name] for name in FEATURES}, SCHEMA)

    def lines(self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The lines of the table for some rows: one for each pair of a row."""
        found = [(row, *result) for row, values in zip(indices, rows, strict=True) for result in self.read(values)]
        encoded = iter(self.tokenizer([result for *_, result in found if isinstance(result, Preference)]))
        for row, pair, original, result in found:
            yield line(row, pair, original, next(encoded) if isinstance(result, Preference) else result)

    def read(
        self, row: Mapping[str, Any]
    ) -> Iterator[tuple[int, Preference | Conversation | None, Preference | RowFault]]:
        """`(pair, what the format gave, the same as text or why there is none)` for each pair of a row."""
        try:
            preferences = self.format(row)
        except RowFault as fault:
            yield 0, None, fault
            return
        except Exception as error:  # of a format of the user's own, whatever it may be
            yield 0, None, RowFault(f"{self.format.__name__} failed with {type(error).__name__}: {error}")
            return
        several = isinstance(preferences, Sequence) and not isinstance(preferences, str)
        if several and not preferences:
            yield 0, None, NoPreference("the row has no pair")
        for pair, preference in enumerate(preferences if several else [preferences]):
            try:
                checked = check(preference, self.pairwise)
                yield pair, checked, self.template(checked) if isinstance(checked, Conversation) else checked
            except RowFault as fault:
                yield pair, None, fault

    def check_first(self, rows: Iterator[Mapping[str, Any]], source: str) -> None:
        """Look at the first rows before all others.

        Raises:
            InputError: if each of them is at fault: the format is another one.
        """
        found = [
            (row, result) for row, values in enumerate(islice(rows, FIRST_ROWS)) for *_, result in self.read(values)
        ]
        faults = [(row, result) for row, result in found if isinstance(result, RowFault)]
        if found and len(faults) == len(found) and not any(isinstance(fault, NoPreference) for _, fault in faults):
            first = "; ".join(f"row {row}: {fault}" for row, fault in faults[:NAMED_ROWS])
            raise InputError(
                f"{source}: none of the first {len(faults)} rows can be used as {self.format.__name__}; {first} (rows "
                "count from 0); set data.format to what they are (docs/data.md lists all), or mend them"
            )


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector of cycles: many thousand lists of ids make it look at all of torch, and are in no cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def source_of(format: Format) -> bytes:
    """The file a format is defined in: `Hasher` knows an imported function by its name only, whatever it does."""
    file = getattr(inspect.getmodule(format), "__file__", None)
    return Path(file).read_bytes() if file else b""


def line(row: int, pair: int, original: Preference | Conversation | None, result: Encoded | RowFault) -> dict[str, Any]:
    """One line of the table."""
    fault = result if isinstance(result, RowFault) else None
    ids = Encoded([], [], []) if isinstance(result, RowFault) else result
    whole = fault.whole if isinstance(fault, TooLong) else ids.whole
    return {
        "row": row,
        "pair": pair,
        "prompt": ids.prompt,
        "chosen": ids.chosen,
        "rejected": ids.rejected,
        "prompt_tokens": len(ids.prompt),
        "chosen_tokens": len(ids.chosen),
        "rejected_tokens": len(ids.rejected),
        "whole_prompt": whole[0],
        "whole_chosen": whole[1],
        "whole_rejected": whole[2],
        "prompt_hash": text_hash(getattr(original, "prompt", None)),
        "chosen_hash": text_hash(getattr(original, "chosen", None)),
        "rejected_hash": text_hash(getattr(original, "rejected", None)),
        "bad": fault is not None and not isinstance(fault, NoPreference | TooLong),
        "templated": isinstance(original, Conversation),
        "fault": "" if fault is None else str(fault),
        "cut": ids.cut,
        "boundary": ids.boundary,
        "text": ids.text,
    }


def flat(lists: Sequence[Sequence[int]]) -> pyarrow.ListArray:
    """A column of lists: Arrow's own conversion looks at each id three times."""
    starts = np.cumsum([0, *map(len, lists)], dtype=np.int32)
    return pyarrow.ListArray.from_arrays(starts, np.fromiter(chain.from_iterable(lists), np.int32, starts[-1]))


def text_hash(text: str | Sequence[Mapping[str, Any]] | None) -> int:
    """64 bits of a text, or of messages, the same on every machine."""
    plain = (
        text or ""
        if isinstance(text, str | None)
        else json.dumps(text, ensure_ascii=False, sort_keys=True, default=str)
    )
    digest = hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def column(table: Dataset, name: str) -> np.ndarray:
    """A column of numbers as one array."""
    return arrow(table, name).to_numpy()


def arrow(table: Dataset, name: str) -> pyarrow.ChunkedArray:
    """A column as Arrow has it. The formats of `datasets` make a Python object, and a lookup, for each row of it."""
    cells = table.data.column(name)
    return cells if table._indices is None else cells.take(table._indices.column(0))


def remarked(table: Dataset, name: str) -> np.ndarray:
    """The places of the lines that have a remark in a column."""
    return np.flatnonzero(pyarrow.compute.not_equal(arrow(table, name), "").to_numpy())


def ledger(table: Dataset, split: str, source: str) -> pyarrow.Table:
    """A line for everything that was done to a row, in the rows' order."""
    parts = []
    for name, action in ACTIONS.items():
        chosen = table.select(remarked(table, name))
        some = {column: arrow(chosen, column) for column in ("row", "pair", name)}
        constants = [pyarrow.array([value] * len(chosen), pyarrow.string()) for value in (split, source, action)]
        columns = [*constants[:2], some["row"], some["pair"], constants[2], some[name]]
        parts.append(pyarrow.table(columns, LEDGER.names).cast(LEDGER))
    return pyarrow.concat_tables(parts).sort_by([("row", "ascending"), ("pair", "ascending")])


def drop_faults(table: Dataset, source: str, bad_rows: float, max_length: int | None) -> Dataset:
    """The lines that can be used.

    Args:
        table: as compiled.
        source: its name, for errors.
        bad_rows: the largest share that may be dropped for a fault. Ties, and what `truncation: drop` drops, do not
            count.
        max_length: refuse prompts that are all longer than this, whose truncation nobody asked for; None: do not.

    Raises:
        InputError: if more are bad, every prompt is longer than `max_length`, or nothing is left.
    """
    faults = remarked(table, "fault")
    usable = np.setdiff1d(np.arange(len(table)), faults, assume_unique=True)
    if max_length is not None and len(usable):
        check_lengths(table.select(usable), source, max_length)
    bad = np.flatnonzero(column(table, "bad"))
    first = [named_fault(line) for line in table.select(bad[:NAMED_ROWS])]
    if len(bad) > bad_rows * len(table):
        raise too_many_bad(len(bad), len(table), first, source, bad_rows)
    if not len(usable):
        raise no_row_left(source, table[0]["fault"])
    return table.select(usable)


def check_lengths(usable: Dataset, source: str, max_length: int) -> None:
    """Raises InputError if every prompt is longer than `max_length`."""
    prompts = column(usable, "whole_prompt")
    if prompts.min() > max_length:
        shortest = int(prompts.argmin())
        raise InputError(
            f"{source}: data.max_length {max_length} is shorter than every prompt (the shortest, row "
            f"{usable[shortest]['row']}, has {prompts[shortest]} tokens); raise data.max_length, or set "
            "data.truncation to cut them all"
        )


def no_row_left(source: str, fault: str) -> InputError:
    """The error for a source none of whose rows can be used."""
    return InputError(f"{source}: no row is left; row 0: {fault}; mend the rows, or raise data.max_length")


def too_many_bad(bad: int, of: int, first: Sequence[str], source: str, bad_rows: float) -> InputError:
    """The error for more than the share `bad_rows` of bad lines, with the first of them named."""
    return InputError(
        f"{source}: {bad} of {of} rows cannot be used, more than the share {bad_rows:g} that may be "
        f"dropped; {'; '.join(first[:NAMED_ROWS])}{' ...' if bad > NAMED_ROWS else ''} (rows count from 0); mend them, "
        "raise data.bad_rows, or look at all of them with `inspect`"
    )


def named_fault(line: Mapping[str, Any]) -> str:
    """A bad line in words."""
    return f"{row_name(line['row'], line['pair'])}: {line['fault']}"


def row_name(row: int, pair: int) -> str:
    """A pair's place in its source: its number only where it is not the row's first."""
    return f"row {row}" + (f", pair {pair}" if pair else "")
