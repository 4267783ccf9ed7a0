"""A callback that ends the process the hard way."""

import os
import signal

from lightning import Callback, LightningModule, Trainer


class Killer(Callback):
    """SIGKILL when batch `batch` of epoch `epoch` is about to be trained on."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.epoch = epoch
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            os.kill(os.getpid(), signal.SIGKILL)


class Stopper(Callback):
    """Asks the trainer to stop, as early stopping and time limits do, after `steps` optimizer steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        trainer.should_stop = trainer.global_step >= self.steps
