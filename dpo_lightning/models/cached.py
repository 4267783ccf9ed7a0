"""The reference's log-probabilities out of a table that one pass over the data has filled, or an earlier run.

No second model is in memory while the policy trains, and none runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from datasets import config
from filelock import FileLock
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dpo_lightning.data.batching import BatchPlan, PlannedBatch
from dpo_lightning.data.packing import PreferenceBatch
from dpo_lightning.data.pairs import TokenizedPairs
from dpo_lightning.errors import InputError
from dpo_lightning.models.cache import Key, LogpTable, TableWriter, digest_of, sweep_up, unwritable
from dpo_lightning.models.checkpoint import load_policy, located
from dpo_lightning.models.generation import generate
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import HALF, SINGLE, Reference, Score
from dpo_lightning.models.sharding import shard
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.paths import path_of

#: Pairs of a table that was found, which are scored again.
SPOT_CHECKS = 4


class CachedLogps(Reference):
    """The policy as it starts, or another checkpoint, scored once: its log-probabilities are kept on disk for all runs.

    Args:
        checkpoint: folder or hub id of another model of the same tokenizer; null is the policy as it starts.
        directory: where the tables are kept. Default: beside the tokenized data, in the cache of `datasets`.
    """

    needs_table = True

    def __init__(self, checkpoint: str | None = None, directory: str | None = None) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.directory = (
            Path(config.HF_DATASETS_CACHE) / "dpo_lightning" / "logps" if directory is None else path_of(directory)
        )
        self.model_digest = ""
        self.tables: dict[str, LogpTable] = {}
        # In lists, so that they are no part of the training module.
        self._policy: list[Policy] = []
        self._loaded: list[Policy] = []

    def prepare(self, policy: Policy) -> None:
        self._policy = [policy]
        self.is_start = self.checkpoint is None or located(self.checkpoint) == located(policy.checkpoint)
        start = policy if self.is_start else self._fresh()
        if start.vocabulary != policy.vocabulary:
            raise InputError(
                f"{self.checkpoint}: the reference knows {start.vocabulary} tokens, the policy {policy.vocabulary}; "
                "choose models of the same tokenizer"
            )
        self.model_digest = digest_of(start.model.config, start.starting_tensors(), start.starting_config())

    def attach(self, pairs: TokenizedPairs, split: str, score: Score | None, trainer: Trainer) -> None:
        """Give pairs their values, out of a table that is there, or is made now."""
        if split not in self.tables:
            try:
                self.tables[split] = self._table(pairs, split, score if self.is_start else None, trainer)
            finally:
                self._loaded.clear()  # no second model is in memory while the policy trains
        pairs.reference_logps = self.tables[split].values

    def logps(self, batch: PreferenceBatch) -> PairLogps:
        if batch.reference_logps is None:  # a batch of `test`, whose answers were sampled just now
            with torch.no_grad():
                return self._model().logps(batch)
        return PairLogps(batch.reference_logps, batch.answer, batch.num_pairs, batch.num_answers)

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        keys: Sequence[tuple[int, ...]],
    ) -> list[np.ndarray]:
        return generate(self._model(), tokenizer, prompts, max_new_tokens, keys)

    # The table

    def _table(self, pairs: TokenizedPairs, split: str, score: Score | None, trainer: Trainer) -> LogpTable:
        """Find or make the table of a split; of several runs that need it at once one makes it, and others wait."""
        key = Key(
            model=self.model_digest,
            tokens=pairs.digest(),
            precision=f"{trainer.precision}, {self._policy[0].model.dtype}",
            pairs=len(pairs),
            values=int(pairs.starts[-1]),
        )
        folder = self.directory / key.name
        found = trainer.strategy.reduce_boolean_decision(folder.exists(), all=True)
        if not found:
            with ExitStack() as stack:
                with on_all_ranks(trainer):
                    if trainer.is_global_zero:  # the others wait for its word
                        stack.enter_context(locked(folder))
                        sweep_up(folder)
                found = trainer.strategy.reduce_boolean_decision(folder.exists(), all=True)
                if not found:
                    self._compute(pairs, split, folder, key, score, trainer)
        with on_all_ranks(trainer):
            table = LogpTable.open(folder, key)
        if found:
            rank_zero_info(f"Reference: log-probabilities of the pairs to {VERBS[split]} are in {folder}")
            if (score := score or self._scorer(trainer)) is not None:
                self._spot_check(pairs, table, score, trainer)
        return table

    def _compute(
        self, pairs: TokenizedPairs, split: str, folder: Path, key: Key, score: Score | None, trainer: Trainer
    ) -> None:
        """One pass of the reference over all pairs, shared by the ranks; each node writes the table, if none has."""
        score = score or self._scorer(trainer, load=True)
        dtype = np.dtype("float64" if trainer.precision == "64-true" else "float32")
        writer = None
        with on_all_ranks(trainer):
            if trainer.local_rank == 0:
                writer = TableWriter(folder, key, dtype)
        try:
            size = trainer.datamodule.batch_size
            plan = BatchPlan(pairs.costs, size, ranks=trainer.world_size, rank=trainer.global_rank)
            bar = tqdm(plan, desc=f"Reference, pairs to {VERBS[split]}", disable=not trainer.is_global_zero)
            for batch in bar:
                rows, values = self._score(pairs, batch, score, trainer)
                for some, parts in gathered((rows, values), trainer):
                    if writer is not None:
                        for row, part in zip(some, parts, strict=True):
                            writer.write(int(pairs.starts[row]), part)
            with on_all_ranks(trainer):
                if writer is not None:
                    writer.finish({"computed_by": f"{trainer.world_size} ranks on {trainer.strategy.root_device.type}"})
        finally:
            if writer is not None:
                writer.give_up()
        rank_zero_info(f"Reference: log-probabilities of {len(pairs):,} pairs to {VERBS[split]} written to {folder}")

    def _score(
        self, pairs: TokenizedPairs, batch: PlannedBatch, score: Score, trainer: Trainer
    ) -> tuple[list[int], list[np.ndarray]]:
        """The rows of a batch, and the values of each; none of a ghost, which keeps a rank in step."""
        packed = pairs[batch].to(trainer.strategy.root_device)
        values = score(packed).token_logps.cpu().numpy()
        rows = [] if batch.ghost else list(batch.pairs)
        return rows, pairs.by_pair(rows, values) if rows else []

    def _spot_check(self, pairs: TokenizedPairs, table: LogpTable, score: Score, trainer: Trainer) -> None:
        """Score some pairs again and compare; every rank the same ones.

        Raises:
            InputError: if the table says something else.
        """
        rows = np.unique(np.linspace(0, len(pairs) - 1, SPOT_CHECKS).astype(int)).tolist()
        _, scored = self._score(pairs, PlannedBatch(tuple(rows), len(rows)), score, trainer)
        allowed = HALF if "16" in trainer.precision else SINGLE
        with on_all_ranks(trainer):
            for row, own in zip(rows, scored, strict=True):
                kept = table.values[pairs.starts[row] : pairs.starts[row + 1]]
                apart = np.abs(own.astype(np.float64) - kept).mean() if len(own) else 0.0
                if not apart <= allowed:
                    raise InputError(
                        f"{table.folder}: the table has other log-probabilities for pair {row} than the reference has "
                        f"now, by {apart:.2g} nats a token ({allowed:g} allowed); delete this folder, so that it is "
                        "computed again"
                    )

    # The model, where a table is not enough

    def _fresh(self) -> Policy:
        """The reference's model, loaded again; the policy may have been trained since."""
        policy = self._policy[0]
        model = load_policy(
            policy.checkpoint if self.is_start else self.checkpoint,
            layout=policy.layout,
            attn_implementation=policy.attn_implementation,
        )
        model = model.to(device=policy.model.device, dtype=policy.model.dtype).requires_grad_(False).eval()
        if self.mesh is not None and isinstance(policy, FSDPModule):
            shard(model, self.mesh)
        return model

    def _model(self) -> Policy:
        if not self._loaded:
            self._loaded.append(self._fresh())
        return self._loaded[0]

    def _scorer(self, trainer: Trainer, load: bool = False) -> Score | None:
        """A model of its own as a scorer: of another checkpoint, or where it must be."""
        if self.is_start and not load:
            return None
        model = self._model()

        @torch.no_grad()
        def score(batch: PreferenceBatch) -> PairLogps:
            with trainer.precision_plugin.val_step_context():
                return model.logps(batch)

        return score


#: What pairs of a split are for, in words.
VERBS = {"train": "train on", "val": "validate on"}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within, no other process of this machine, or of a file system that knows locks, makes the same table.

    Raises:
        InputError: if nothing may be written there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def on_all_ranks(trainer: Trainer) -> Iterator[None]:
    """What goes wrong within on one rank stops all of them: the others would wait for it."""
    fault = None
    try:
        yield
    except InputError as error:
        fault = error
    if not trainer.strategy.reduce_boolean_decision(fault is None, all=True):
        raise fault or InputError("the reference's log-probabilities could not be had on another rank")


def gathered(own: tuple[list[int], list[np.ndarray]], trainer: Trainer) -> list[tuple[list[int], list[np.ndarray]]]:
    """What every rank has."""
    if trainer.world_size == 1:
        return [own]
    found: list[tuple[list[int], list[np.ndarray]]] = [([], [])] * trainer.world_size
    torch.distributed.all_gather_object(found, own)
    return found
