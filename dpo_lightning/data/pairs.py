"""The pairs of a split as a table of token ids on disk, out of which batches are packed.

Legend: Lp, Lc, Lr tokens of a prompt, a chosen and a rejected answer
"""

import numpy as np
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from dpo_lightning.data.batching import PlannedBatch
from dpo_lightning.data.compiler import column
from dpo_lightning.data.packing import Layout, PreferenceBatch, pack
from dpo_lightning.data.tokenization import TokenPair


class TokenizedPairs(TorchDataset[PreferenceBatch]):
    """The usable pairs of a split, as a memory-mapped table of ids; indexing with a planned batch packs it.

    Args:
        table: as compiled, without faults, with an `id` of each pair.
        layout: how batches are laid out.
        pairwise: whether rejected answers are laid out.
    """

    def __init__(self, table: Dataset, layout: Layout, pairwise: bool) -> None:
        self.pair_ids = column(table, "id")  # [pairs]
        self.ids = table.select_columns(["prompt", "chosen", "rejected"]).with_format("numpy")
        prompt, chosen, rejected = (column(table, f"{name}_tokens") for name in ("prompt", "chosen", "rejected"))
        copies = 2 if pairwise and layout != "shared" else 1
        self.costs: np.ndarray = copies * prompt + chosen + rejected  # [pairs] tokens through the model
        self.layout = layout
        self.pairwise = pairwise

    def __len__(self) -> int:
        return len(self.pair_ids)

    def __getitem__(self, batch: PlannedBatch) -> PreferenceBatch:
        chosen_rows = list(batch.pairs)
        ids = self.ids[chosen_rows]
        rejected = ids["rejected"] if self.pairwise else [None] * len(chosen_rows)
        return pack(
            [TokenPair(*pair) for pair in zip(ids["prompt"], ids["chosen"], rejected, strict=True)],
            self.layout,
            pair_ids=self.pair_ids[chosen_rows],
            ghost=batch.ghost,
            pairs_in_step=batch.pairs_in_step,
        )
