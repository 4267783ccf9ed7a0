"""Every validation pair by itself: what policy and reference say of it, and whether its label looks wrong.

Legend: B pairs
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import torch
from lightning import Callback, LightningModule, Trainer
from pyarrow import parquet

from dpo_lightning.data.packing import PreferenceBatch
from dpo_lightning.objective.metrics import Scored
from dpo_lightning.training.callbacks import RunDirectory

#: Where a run keeps its ledgers, and the list made of the last of them.
FOLDER, DOUBTFUL = "pairs", "doubtful.jsonl"

#: A pair's figures: its id, which counts on over all sources of the validation; log-ratios in nats; margin and loss;
#: scored tokens. The file also has its `source`, `row` and number in that row.
COLUMNS = ("id", "chosen_logratio", "rejected_logratio", "margin", "loss", "chosen_tokens", "rejected_tokens")

PLACE = ("source", "row", "pair")


class PairLedger(Callback):
    """Writes `pairs/step-N.parquet` at each validation, a row a pair, and `doubtful.jsonl` of the last.

    Args:
        directory: of the run.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.parts: list[np.ndarray] = []  # [COLUMNS, B] each

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.parts = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Scored,
        batch: PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        counts = batch.weights > 0
        columns = [batch.pair_ids, *outputs.both(outputs.logratios), outputs.margins, outputs.losses]
        columns += outputs.both(outputs.policy.lengths)
        self.parts.append(torch.stack([column[counts].cpu().double() for column in columns]).numpy())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        gathered = [self.parts]
        if trainer.world_size > 1:
            gathered = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(gathered, self.parts)
        if not trainer.is_global_zero:
            return
        table = np.concatenate([part for parts in gathered for part in parts], axis=1)
        table = table[:, np.argsort(table[0], kind="stable")]
        ledger = dict(zip(COLUMNS, table, strict=True))
        for name in ("id", "chosen_tokens", "rejected_tokens"):
            ledger[name] = ledger[name].astype(np.int64)
        places = trainer.datamodule.places("val", ledger["id"])
        ledger |= dict(zip(PLACE, map(list, zip(*places, strict=True)), strict=True))
        folder = self.directory.path / FOLDER
        folder.mkdir(exist_ok=True)
        step = max(trainer.global_step, pl_module.loaded_step)
        parquet.write_table(pyarrow.table(ledger), folder / f"step-{step:07d}.parquet")
        texts = trainer.datamodule.texts
        write_doubtful(ledger["id"], ledger["margin"], places, texts, self.directory.path / DOUBTFUL)


def flip_probabilities(margins: np.ndarray, rounds: int = 100) -> np.ndarray:
    """How likely each pair's label is flipped, `[pairs]`, by the margins of all of them.

    Pairs labelled right have margins around some mean, flipped ones the same with the other sign: a mixture of
    N(mean, variance) and N(-mean, variance), fitted by expectation maximisation (Dempster et al. 1977).

    >>> flip_probabilities(np.array([2.0, 1.5, 2.5, 2.0, 1.0, -2.0])).round(2).tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    """
    mean, variance, share = np.median(margins), np.var(margins), 0.05
    if mean <= 0 or variance == 0:  # most labels look wrong, or nothing is known: none can be told from the others
        return np.full(len(margins), share)
    for _ in range(rounds):
        # The log-odds of two normal distributions that differ in the sign of their means.
        odds = math.log(share / (1 - share)) - 2 * mean * margins / variance
        flipped = 1 / (1 + np.exp(np.clip(-odds, -500, 500)))
        upright = (1 - 2 * flipped) * margins  # each with the sign it should have, in expectation
        mean = max(upright.mean(), 1e-12)
        variance = max((margins**2).mean() - mean**2, 1e-12)
        share = min(max(flipped.mean(), 1e-6), 0.5)
    return flipped


def write_doubtful(
    ids: np.ndarray,
    margins: np.ndarray,
    places: Sequence[tuple[str, int, int]],
    texts: Callable[[str, Sequence[int]], Sequence[Mapping[str, str]]],
    path: Path,
    least: float = 0.25,
) -> None:
    """The pairs whose label may well be wrong, a line of JSON each, the most doubtful first.

    Args:
        ids: `[pairs]` of the pairs.
        margins: `[pairs]` in rewards.
        places: `(source, row, pair)` of each.
        texts: of some of a split's pairs, as `prompt`, `chosen` and `rejected`.
        path: the file to write.
        least: probability from which on a pair is listed.
    """
    doubts = flip_probabilities(margins)
    listed = [place for place in np.argsort(margins, kind="stable") if doubts[place] >= least and margins[place] < 0]
    pairs = texts("val", ids[listed].tolist())
    with path.open("w", encoding="utf-8") as lines:
        for place, pair in zip(listed, pairs, strict=True):
            known = dict(zip(PLACE, places[place], strict=True))
            known |= {"margin": float(margins[place]), "flipped": float(doubts[place])}
            lines.write(json.dumps(known | dict(pair), ensure_ascii=False) + "\n")
