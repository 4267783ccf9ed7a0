"""What a run leaves behind while it goes on: its directory, `last.ckpt`, a history without gaps, and a bar to watch."""

import csv
import os
import random
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from dpo_lightning.errors import InputError

LAST = Path("checkpoints") / "last.ckpt"

#: The trained policy in Hugging Face format.
EXPORT = "export"

#: Every row that was dropped or cut, and why.
LEDGER_FILE = "ledger.csv"


class RunDirectory(Callback):
    """`root/version_N`, one N for everything that a run writes; the ledger of dropped and cut rows goes there first.

    Attributes:
        path: the directory; known on the first rank once it is claimed, on all once the trainer has set up.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "version_pending"

    def claim(self) -> None:
        """Choose N, by making the directory, so that two runs started together cannot share it.

        Only once there is a trainer: not every environment says before whether this is the first of all ranks.
        """
        if rank_zero_only.rank == 0:
            self.path = claim_version(self.root)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.path = trainer.strategy.broadcast(self.path)
        if trainer.is_global_zero:
            trainer.datamodule.write_ledger(self.path / LEDGER_FILE)

    def give_up(self) -> None:
        """Remove the directory of a run that was refused: it holds no checkpoint of its own, and no export."""
        if rank_zero_only.rank == 0 and not any((self.path / name).exists() for name in (LAST, EXPORT)):
            shutil.rmtree(self.path, ignore_errors=True)


def run_of(ckpt_path: Path) -> Path:
    """The directory of the run that a `last.ckpt` is of."""
    return ckpt_path.parent.parent


def versions(root: Path) -> list[Path]:
    """The run directories under `root`, the oldest first."""
    found = [p for p in root.glob("version_*") if p.name.removeprefix("version_").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("version_")))


def claim_version(root: Path) -> Path:
    """Make the next free `root/version_N`."""
    while True:
        taken = versions(root)
        number = int(taken[-1].name.removeprefix("version_")) + 1 if taken else 0
        path = root / f"version_{number}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # another run was quicker
            continue
        except OSError as error:
            raise InputError(
                f"{root}: cannot be written to ({error.strerror}); set trainer.default_root_dir"
            ) from error
        return path


class StreamedCheckpointIO(TorchCheckpointIO):
    """Checkpoints written straight to disk, whole or not at all.

    Lightning's own builds the file in memory first, which for a small model doubles the peak of the whole run.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.part")
        torch.save(checkpoint, unfinished)
        os.replace(unfinished, path)


class LastCheckpoint(Checkpoint):
    """`checkpoints/last.ckpt`, written when an optimizer step ends: every `every` steps, and at the end of each epoch.

    Only then are there no half-accumulated gradients, which a checkpoint would lose. It also keeps each rank's random
    state, which Lightning does not.
    """

    def __init__(self, directory: RunDirectory, every: int) -> None:
        self.directory = directory
        self.every = every
        self.saved_at: int | None = None
        self._random_states: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        last = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if last or trainer.global_step % self.every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that a callback or a time limit stops inside an epoch ends between the intervals."""
        if trainer.global_step == self.saved_at or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        # Lightning has counted the epoch as done.
        counts = (trainer.fit_loop.epoch_progress.total, trainer.fit_loop.epoch_progress.current)
        for count in counts:
            count.processed = count.completed = count.completed - 1
        self._save(trainer)
        for count in counts:
            count.processed = count.completed = count.completed + 1

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.directory.path / LAST, weights_only=False)
        self.saved_at = trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states: list[Any] = [random_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, random_state())
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._random_states = checkpoint.get("random_states", [])
        self.saved_at = checkpoint["global_step"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        # Resumed at an epoch's end, Lightning does not count the next epoch as begun; a second resume would then train
        # one epoch too many.
        for counts in (trainer.fit_loop.epoch_progress.total, trainer.fit_loop.epoch_progress.current):
            counts.ready = counts.started = counts.completed + 1
        if self._random_states and trainer.datamodule.streaming:
            # Of a loader without a length Lightning does not see that a checkpoint is of an epoch's end: it would count
            # on, and accumulate over other batches than a run that was not interrupted.
            count, done = trainer.fit_loop.epoch_loop.batch_progress.current, trainer.datamodule.stream.began
            count.ready, count.started, count.processed, count.completed = done + 1, done, done, done
        # Only now: making the loaders' iterators has drawn from the generator once more than in the killed run.
        if trainer.global_rank < len(self._random_states):
            restore_random_state(self._random_states[trainer.global_rank])
        self._random_states = []


def random_state() -> dict[str, Any]:
    """The state of all generators of this process."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),  # tensors load without trusting the file
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Go on where `random_state` was taken."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class ReplayedHistory(Callback):
    """Copies the metrics of the run that is resumed into the new one, up to the checkpoint's step.

    So the newest metrics.csv, and its TensorBoard curves, have the whole history; and so has the ledger of a stream.
    """

    def __init__(self, parent: Path) -> None:
        self.parent = parent

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
            trainer.datamodule.replay_ledger(self.parent / LEDGER_FILE)
        metrics = self.parent / "metrics.csv"
        if trainer.state.fn != TrainerFn.FITTING or not metrics.exists():
            return
        with metrics.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= checkpoint["global_step"]]
        validations: list[dict[str, float]] = []
        for row in rows:
            step = int(row.pop("step"))
            figures = {name: float(value) for name, value in row.items() if value}
            if "val/loss" in figures:
                own = {name.removeprefix("val/"): value for name, value in figures.items() if name.startswith("val/")}
                validations.append(own | {"pairs": len(trainer.datamodule.tables["val"])})
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=step)
        pl_module.remember(validations)  # last.ckpt is written before its step is validated


class Progress(TQDMProgressBar):
    """The training bar with the figures that people watch."""

    SHOWN: ClassVar = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        figures = trainer.callback_metrics
        return {
            f"{'val ' if stage == 'val' else ''}{short}": f"{figures[f'{stage}/{name}']:.3f}"
            for stage in ("train", "val")
            for short, name in self.SHOWN.items()
            if f"{stage}/{name}" in figures
        }
