"""`trainer.strategy: fsdp`: Lightning's strategy for PyTorch's second FSDP, with checkpoints like all others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer

from dpo_lightning.models.sharding import gathered, like

#: What `trainer.strategy` says.
FSDP = "fsdp"


class FullySharded(ModelParallelStrategy):
    """Weights, gradients and optimizer state of the policy, and the weights of its reference, spread over all devices.

    A checkpoint is the same file as under any other strategy, so that a run may go on under another one, and that
    `export` and `test` read it on one device. Lightning's own numbers the optimizer's parameters with the reference's
    among them, and hands no weights to `on_load_checkpoint`.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # all of them: Lightning's "auto" is the nodes
        super().setup_environment()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        # Weights are sharded as soon as they are loaded. The set-up asks for the number of steps and with it for the
        # loader, so that after it the data would hear too late where to go on.
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        state = gathered(self.lightning_module.state_dict(keep_vars=True), keep=self.is_global_zero)
        return state if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return gathered(optimizer.state_dict(), keep=self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        # Mapped rather than read: each rank takes its share of every tensor.
        return torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self.lightning_module.state_dict()
        state = {name: like(value, own[name]) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {
                    name: like(value, parameters[number]) if value.shape == parameters[number].shape else value
                    for name, value in values.items()
                }
                for number, values in whole["state"].items()
            }
            optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
