"""The sources of a split -> one table of its usable pairs, and a ledger of all that was dropped and cut."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
from datasets import Dataset, concatenate_datasets
from pyarrow import csv

from dpo_lightning.data.compiler import FIRST_ROWS, LEDGER, Compiler, column, drop_faults, ledger
from dpo_lightning.data.formats import recognise
from dpo_lightning.data.preference import Conversation, Format
from dpo_lightning.data.sources import Rows, first_rows
from dpo_lightning.data.splits import Parts
from dpo_lightning.data.streams import StreamedSource
from dpo_lightning.data.tokenization import PairTokenizer
from dpo_lightning.errors import InputError


@dataclass(frozen=True)
class Part:
    """One source of a split: its rows, how they are read, and all lines compiled from them, dropped ones too."""

    name: str
    rows: Dataset
    format: Format
    lines: Dataset


class Reader:
    """Compiles sources with the same options.

    Args:
        encoder: preference -> ids.
        pairwise: whether rejected answers are needed.
        format: of the rows; None to recognise each source's.
        bad_rows: the largest share of a source's rows that may be dropped for a fault.
        look_first: whether a source is refused where none of its first rows can be used.
        refuse_cuts: whether a source whose prompts are all too long is refused.
        processes: that tokenize at once.

    Attributes:
        parts: split -> its sources.
        ledger: what was dropped and cut.
        conversations: whether any row is a conversation, or one of a stream's first rows.
    """

    def __init__(
        self,
        encoder: PairTokenizer,
        pairwise: bool,
        *,
        format: Format | None,
        bad_rows: float,
        look_first: bool,
        refuse_cuts: bool,
        processes: int,
    ) -> None:
        self.encoder = encoder
        self.pairwise = pairwise
        self.format = format
        self.bad_rows = bad_rows
        self.look_first = look_first
        self.refuse_cuts = refuse_cuts
        self.processes = processes
        self.parts: dict[str, list[Part]] = {}
        self.ledger = LEDGER.empty_table()
        self.conversations = False

    def table(self, sources: Parts, split: str) -> Dataset:
        """The usable pairs of all sources, with the number of theirs as `source` and an `id` that counts all lines.

        Raises:
            InputError: if a source is empty, of no known format, or too much of it cannot be used.
        """
        tables, first = [], 0
        self.parts[split] = []
        for number, (source, rows) in enumerate(sources):
            if not len(rows):
                raise InputError(f"{source}: the split to {'validate' if split == 'val' else 'train'} on is empty")
            compiler = self._compiler(source, rows)
            lines = compiler(rows, source)
            self.conversations = self.conversations or bool(column(lines, "templated").any())
            self.parts[split].append(Part(source, rows, compiler.format, lines))
            self.ledger = pyarrow.concat_tables([self.ledger, ledger(lines, split, source)])
            lines = lines.add_column("id", np.arange(first, first + len(lines)))
            lines = lines.add_column("source", np.full(len(lines), number, dtype=np.int32))
            shortest = self.encoder.max_length if self.refuse_cuts else None
            tables.append(drop_faults(lines, source, self.bad_rows, shortest))
            first += len(lines)
        return tables[0] if len(tables) == 1 else concatenate_datasets(tables)

    def streams(self, sources: Parts, keep: Callable[[pyarrow.Table], None]) -> list[StreamedSource]:
        """Each source as a stream of pairs; `keep` is given what is dropped and cut, as it is read."""
        shortest = self.encoder.max_length if self.refuse_cuts else None
        streams = []
        for source, rows in sources:
            compiler = self._compiler(source, rows)
            read = (original for row in first_rows(rows, source, FIRST_ROWS) for _, original, _ in compiler.read(row))
            self.conversations = self.conversations or any(isinstance(original, Conversation) for original in read)
            streams.append(StreamedSource(source, rows, compiler, self.bad_rows, keep, shortest))
        return streams

    def _compiler(self, source: str, rows: Rows) -> Compiler:
        """For a source whose first rows have been looked at."""
        first = first_rows(rows, source, FIRST_ROWS)
        compiler = Compiler(self.format or recognise(first, source), self.encoder, self.pairwise, self.processes)
        if self.look_first:
            compiler.check_first(first, source)
        return compiler


def append_ledger(lines: pyarrow.Table, file: Path) -> None:
    """Add lines to a ledger's CSV file, with a header where it is new."""
    if not len(lines):
        return
    options = csv.WriteOptions(include_header=not file.exists())
    lines = lines.combine_chunks()  # of a first chunk without lines pyarrow writes bytes of no meaning
    with file.open("ab") as out:
        csv.write_csv(lines, out, options)


def read_ledger(file: Path) -> pyarrow.Table:
    """The lines of a ledger's CSV file."""
    types = {field.name: field.type for field in LEDGER}
    return csv.read_csv(
        file,
        parse_options=csv.ParseOptions(newlines_in_values=True),  # of a reason
        convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=False),
    )
