"""The pairs of a split as a table of token ids on disk, out of which batches are packed.

Legend: P pairs  N answer tokens of a batch
"""

from bisect import bisect_right
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from xxhash import xxh3_128

from dpo_lightning.data.batching import PlannedBatch
from dpo_lightning.data.compiler import arrow, column
from dpo_lightning.data.packing import Layout, PreferenceBatch, fill_rows, pack
from dpo_lightning.data.tokenization import TokenPair


class Ids:
    """A column of token ids: a row of it is a view into the memory-mapped table.

    The numpy format of `datasets` takes ten times as long for a batch of eight.

    Args:
        table: with the column.
        name: of the column.
    """

    def __init__(self, table: Dataset, name: str) -> None:
        self.table = table
        self.name = name
        cells = [chunk for chunk in table.data.column(name).chunks if len(chunk)]
        self.values = [chunk.values.to_numpy(zero_copy_only=False) for chunk in cells]  # copied where it has no id
        self.offsets = [chunk.offsets.to_numpy() for chunk in cells]
        self.firsts = np.cumsum([0, *map(len, cells)])[:-1].tolist()
        places = None if table._indices is None else table._indices.column(0)
        # A view where it is one chunk, as after a selection: of a million pairs each copy is eight megabytes.
        self.places: np.ndarray | None = None  # where the table's rows are in the column, if not in order
        if places is not None:
            self.places = (places.chunk(0) if places.num_chunks == 1 else places).to_numpy()

    def __getitem__(self, row: int) -> np.ndarray:
        place = int(row if self.places is None else self.places[row])
        chunk = bisect_right(self.firsts, place) - 1
        start, end = self.offsets[chunk][place - self.firsts[chunk] :][:2]
        return self.values[chunk][start:end]

    def __reduce__(self) -> tuple[type["Ids"], tuple[Dataset, str]]:
        """To another process goes the name of the file, not what is in it."""
        return Ids, (self.table, self.name)


class TokenizedPairs(TorchDataset[PreferenceBatch]):
    """The usable pairs of a split, as a memory-mapped table of ids; indexing with a planned batch packs it.

    Args:
        table: as compiled, without faults, with an `id` of each pair.
        layout: how batches are laid out.
        pairwise: whether rejected answers are laid out.
        row_tokens: tokens of a row at most; None: as many as the batch's longest tree has.

    Attributes:
        starts: `[P + 1]` where each pair's answer tokens begin among those of all pairs: chosen, then rejected. Behind
            an empty prompt the first token of an answer does not count, since nothing predicts it.
        reference_logps: a value for each of these tokens, which batches bring along; None where there is none.
    """

    def __init__(self, table: Dataset, layout: Layout, pairwise: bool, row_tokens: int | None = None) -> None:
        self.table = table
        self.pair_ids = column(table, "id")  # [P]
        self.prompts, self.chosen, self.rejected = (Ids(table, name) for name in ("prompt", "chosen", "rejected"))
        prompt, chosen, rejected = (column(table, f"{name}_tokens") for name in ("prompt", "chosen", "rejected"))
        copies = 2 if pairwise and layout != "shared" else 1
        self.costs: np.ndarray = copies * prompt + chosen + rejected  # [P] tokens through the model
        answers = [chosen, rejected] if pairwise else [chosen]
        trees = [prompt + sum(answers)] if layout == "shared" else [prompt + answer for answer in answers]
        self.trees: np.ndarray = np.stack(trees, axis=1)  # [P, trees a pair] tokens of each
        self.layout = layout
        self.pairwise = pairwise
        self.row_tokens = row_tokens
        unpredicted = prompt == 0
        self.chosen_scored: np.ndarray = chosen - unpredicted  # [P]
        scored = self.chosen_scored + (rejected - unpredicted if pairwise else 0)
        self.starts: np.ndarray = np.concatenate([[0], np.cumsum(scored, dtype=np.int64)])
        self.reference_logps: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pair_ids)

    def __getitem__(self, batch: PlannedBatch) -> PreferenceBatch:
        chosen_rows = list(batch.pairs)
        packed = pack(
            [
                TokenPair(self.prompts[row], self.chosen[row], self.rejected[row] if self.pairwise else None)
                for row in chosen_rows
            ],
            self.layout,
            pair_ids=self.pair_ids[chosen_rows],
            row_tokens=self.row_tokens,
            ghost=batch.ghost,
            pairs_in_step=batch.pairs_in_step,
        )
        if self.reference_logps is None:
            return packed
        known = self._known(chosen_rows)
        return replace(packed, reference_bits=torch.from_numpy(known.view(f"i{known.itemsize}")))

    def laid_out(self, batch: PlannedBatch) -> int:
        """Tokens of a batch's rows, padding included."""
        lengths = self.trees[list(batch.pairs)].ravel().tolist()
        if self.layout != "padded" and self.row_tokens is not None and self.row_tokens >= sum(lengths):
            return sum(lengths)  # one row
        rows = [[n] for n in range(len(lengths))]
        if self.layout != "padded":
            rows = fill_rows(lengths, max([self.row_tokens or 0, *lengths]))
        return len(rows) * max(sum(lengths[n] for n in row) for row in rows)

    def _known(self, rows: list[int]) -> np.ndarray:
        """`[N]` the reference's values for some pairs, in the order of a batch: all chosen answers, then the others."""
        chosen, rejected = [], []
        for row in rows:
            start, middle, end = self.starts[row], self.starts[row] + self.chosen_scored[row], self.starts[row + 1]
            chosen.append(self.reference_logps[start:middle])
            rejected.append(self.reference_logps[middle:end])
        return np.concatenate([*chosen, *rejected])

    def by_pair(self, rows: list[int], values: np.ndarray) -> list[np.ndarray]:
        """What `_known` has put together, `[N]`, taken apart again: the values of each pair."""
        counts = np.diff(self.starts)[rows]
        chosen = self.chosen_scored[rows]
        parts = np.split(values, np.cumsum(np.concatenate([chosen, counts - chosen]))[:-1])
        return [np.concatenate([parts[i], parts[len(rows) + i]]) for i in range(len(rows))]

    def digest(self) -> str:
        """A hash of all token ids, in the pairs' order, however they are stored."""
        digest = xxh3_128()
        for name in ("prompt", "chosen", "rejected") if self.pairwise else ("prompt", "chosen"):
            cells = arrow(self.table, name)
            digest.update(np.ascontiguousarray(column(self.table, f"{name}_tokens")))
            for chunk in cells.chunks:
                digest.update(np.ascontiguousarray(chunk.flatten().to_numpy()))
        return digest.hexdigest()
