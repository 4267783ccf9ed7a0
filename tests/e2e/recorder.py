"""A callback that keeps what a run computed, to compare it with another run."""

from collections.abc import Iterable

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class Recorder(Callback):
    """Writes to `file`, with the rank after its name, what was found in training.

    The gradient of every optimizer step, all ranks and micro-batches in it, not yet clipped; the weights of policy and
    reference at the end, and how many of them this rank holds; and what the loss then remembers.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.gradients: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.gradients.append(flat(parameter.grad for parameter in pl_module.policy.parameters()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {f"gradient {step}": gradient for step, gradient in enumerate(self.gradients, 1)}
        found |= {name: flat(getattr(pl_module, name).parameters()) for name in ("policy", "reference")}
        found |= {f"{name} held": held(getattr(pl_module, name).parameters()) for name in ("policy", "reference")}
        found |= {name: value.flatten().clone() for name, value in pl_module.loss_state.items()}
        torch.save(found, f"{self.file}.{trainer.global_rank}")


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All elements in one copy, those of other ranks too."""
    whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return torch.cat([tensor.detach().flatten() for tensor in whole])


def held(tensors: Iterable[Tensor]) -> Tensor:
    """How many elements this rank has in its memory."""
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return torch.tensor([sum(tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in own)])
