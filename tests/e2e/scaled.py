"""fp16 with loss scaling where there is no GPU: Lightning would take bf16 there, without a scaler."""

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision


class ScaledHalf(MixedPrecision):
    """What `trainer.precision 16-mixed` is on a GPU.

    Args:
        init_scale: what the loss is multiplied with at first.
    """

    def __init__(self, init_scale: float = 65536.0) -> None:
        super().__init__("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=init_scale))


class Overflow(Callback):
    """Puts an infinite number into the gradient of some optimizer steps, as an overflow in fp16 does.

    Keeps the scale, and whether the weights have changed, after each step.

    Args:
        file: what is written at the end.
        steps: the steps, from 1.
    """

    def __init__(self, file: str, steps: list[int]) -> None:
        self.file = file
        self.steps = steps
        self.scales: list[float] = []
        self.moved: list[bool] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weight = next(pl_module.policy.parameters())
        self.before = self.weight.detach().clone()
        self.weight.register_hook(self.overflow)

    def overflow(self, gradient: torch.Tensor) -> torch.Tensor:
        step = len(self.scales) + 1
        return gradient * torch.inf if step in self.steps else gradient

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        self.moved.append(not torch.equal(self.weight, self.before))
        self.before = self.weight.detach().clone()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save({"scales": self.scales, "moved": self.moved}, self.file)
