"""What the policy is compared with.

Every reference answers `logps(batch)` without gradient. It is told of the policy once, after the policy has its weights
and before the first step; it is never part of a training checkpoint.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from dpo_lightning.data.packing import PreferenceBatch
from dpo_lightning.data.pairs import TokenizedPairs
from dpo_lightning.errors import InputError
from dpo_lightning.models.checkpoint import load_policy, located
from dpo_lightning.models.generation import generate
from dpo_lightning.models.narrowing import narrow
from dpo_lightning.models.policy import Policy
from dpo_lightning.objective.logps import PairLogps

#: Nats a token by which an answer's log-probabilities may differ from the starting policy's, in single and in half
#: precision.
SINGLE, HALF = 1e-4, 1e-2

#: How a policy scores a batch as training does: under the precision's autocast, and through the strategy.
Score = Callable[[PreferenceBatch], PairLogps]


class Reference(nn.Module, ABC):
    """The model that rewards are measured against.

    Attributes:
        is_start: whether it says that it is the policy as it starts; not where another model was declared.
        is_fixed: whether it stays as it is while the policy trains.
        needs_table: whether it must know all pairs before training, which a stream does not.
        mesh: the devices that models are spread over, where they are.
    """

    is_start: bool = True
    is_fixed: bool = True
    needs_table: bool = False
    mesh: DeviceMesh | None = None

    @abstractmethod
    def prepare(self, policy: Policy) -> None:
        """Get ready to score batches in the policy's layout; `policy` still has the weights it starts from."""

    @abstractmethod
    def logps(self, batch: PreferenceBatch) -> PairLogps:
        """Log-probabilities of every answer token of the batch, in nats, without gradient."""

    def differences(self, policy: Policy) -> list[str]:
        """Where it is not the policy as that starts, in words: why the two disagree before the first step."""
        return []

    def attach(self, pairs: TokenizedPairs, split: str, score: Score | None, trainer: Trainer) -> None:
        """Give the pairs of a split what it needs to score them.

        Args:
            pairs: that batches are packed from.
            split: their name.
            score: the policy as it starts, as a scorer; None where it has been trained.
            trainer: whose strategy and precision are used.
        """

    def follow(self, policy: Policy, step: int) -> None:
        """What it does after optimizer step `step`: it stays as it is, unless it moves with the policy."""

    def check_length(self, steps: float) -> None:
        """Raises InputError if a run of so many optimizer steps leaves it without a use."""

    @abstractmethod
    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        keys: Sequence[tuple[int, ...]],
    ) -> list[np.ndarray]:
        """Samples of the reference, as `dpo_lightning.models.generation.generate` makes them."""


class AdapterOff(Reference):
    """The policy without its adapter: no second model is in memory.

    Of an adapter that training began with, the weights that it began with: these are kept beside it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._policy: list[Policy] = []  # in a list, so that it is no part of this module

    def prepare(self, policy: Policy) -> None:
        if policy.adapter is None:
            raise InputError(
                "model.reference is AdapterOff, but the policy has no adapter; set model.lora, or remove the reference"
            )
        self._policy = [policy]

    @torch.no_grad()
    def logps(self, batch: PreferenceBatch) -> PairLogps:
        with self._off() as policy:
            return policy.logps(batch)

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        keys: Sequence[tuple[int, ...]],
    ) -> list[np.ndarray]:
        with self._off() as policy:
            return generate(policy, tokenizer, prompts, max_new_tokens, keys)

    @contextmanager
    def _off(self) -> Iterator[Policy]:
        """The policy with its adapter off, and in evaluation mode."""
        [policy] = self._policy
        mode = policy.training
        try:
            with policy.adapter.off():
                yield policy.eval()
        finally:
            policy.train(mode)


class FrozenModel(Reference):
    """A frozen copy of the policy as it starts, or another checkpoint.

    Args:
        checkpoint: folder or hub id of another model of the same tokenizer; null copies the policy.
    """

    def __init__(self, checkpoint: str | None = None) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.is_start = checkpoint is None
        self.narrowed: torch.dtype | None = None  # what its linear layers were cast to
        self.cast: set[str] = set()  # their parameters
        self._narrows = self.is_fixed  # once, where it may

    def prepare(self, policy: Policy) -> None:
        if self.checkpoint is None:
            self.model = copy.deepcopy(policy)
        else:
            self.model = load_policy(
                self.checkpoint, layout=policy.layout, attn_implementation=policy.attn_implementation
            )
            if self.model.vocabulary != policy.vocabulary:
                raise InputError(
                    f"model.reference.checkpoint {self.checkpoint} has a vocabulary of {self.model.vocabulary} tokens, "
                    f"the policy one of {policy.vocabulary}; a reference must read the policy's tokens"
                )
            self.is_start = located(self.checkpoint) == located(policy.checkpoint)
        self.model.requires_grad_(False).eval()

    def differences(self, policy: Policy) -> list[str]:
        own, other = (dict(m.model.named_parameters(remove_duplicate=False)) for m in (self.model, policy))
        # A head that is the policy's embedding is one tensor, though it may have been cast apart from it here.
        for name in other.keys() - dict(policy.model.named_parameters()).keys():
            del other[name]
            own.pop(name, None)
        # As they are used here: what rounds to the same matrices scores the same bits.
        other = {name: tensor.to(self.narrowed) if name in self.cast else tensor for name, tensor in other.items()}
        found = []
        if self.model.layout != policy.layout:
            found.append(f"the reference reads the layout {self.model.layout}, the policy {policy.layout}")
        if further := sorted(own.keys() ^ other.keys()):
            found.append(f"one of them has {len(further)} tensors that the other has not, {further[0]} for one")
        types = [", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()})) for tensors in (own, other)]
        if types[0] != types[1]:
            found.append(f"the reference is in {types[0]}, the policy in {types[1]}")
        elif changed := [name for name in own.keys() & other.keys() if not torch.equal(own[name], other[name])]:
            found.append(
                f"{len(changed)} of the reference's {len(own)} tensors have other values than the policy's, "
                f"{min(changed)} for one: it is another model, or one of them was changed since it was loaded"
            )
        return found

    @torch.no_grad()
    def logps(self, batch: PreferenceBatch) -> PairLogps:
        self.settle(batch)
        with self._precision(batch.tokens.device.type):
            return self.model.logps(batch)

    @torch.no_grad()
    def settle(self, batch: PreferenceBatch) -> None:
        """Cast the matrices for good where autocast is on, once; `batch` shows whether that changes a bit."""
        device = batch.tokens.device.type
        if self._narrows and torch.is_autocast_enabled(device) and self.mesh is None:
            self._narrows, dtype = False, torch.get_autocast_dtype(device)
            self.cast = narrow(self.model.model, dtype, lambda: self.model.logps(batch).token_logps)
            self.narrowed = dtype if self.cast else None

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        keys: Sequence[tuple[int, ...]],
    ) -> list[np.ndarray]:
        with self._precision(self.model.model.device.type):
            return generate(self.model, tokenizer, prompts, max_new_tokens, keys)

    def _precision(self, device: str) -> AbstractContextManager[object]:
        """Autocast, on or off as it is outside; on where the matrices were cast to fit it."""
        if self.narrowed is None:
            return nullcontext()
        return torch.autocast(device, dtype=self.narrowed)

    def train(self, mode: bool = True) -> "FrozenModel":
        """Stays in evaluation mode whatever the trainer says."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
        """Nothing: it is loaded from where it came from, and a checkpoint with it would be twice as large."""
        return {} if destination is None else destination


class MovingReference(FrozenModel):
    """A reference that follows the policy: every so many steps it becomes alpha * policy + (1 - alpha) * reference.

    TR-DPO, Gorbatovski et al. 2024, eq. 5 and 6 (arXiv:2404.09656): soft updates for alpha below 1, hard ones at 1. Its
    weights are part of a training checkpoint, since nothing else knows them.

    Args:
        alpha: how far it goes towards the policy, in (0, 1].
        every: optimizer steps between two moves.
    """

    is_fixed = False

    def __init__(self, alpha: float = 0.6, every: int = 512) -> None:
        super().__init__()
        if not 0 < alpha <= 1:
            raise InputError(f"MovingReference.alpha must be in (0, 1], got {alpha}")
        if every < 1:
            raise InputError(f"MovingReference.every must be at least 1, got {every}")
        self.alpha = alpha
        self.every = every

    def check_length(self, steps: float) -> None:
        if self.every > steps:
            raise InputError(
                f"MovingReference.every is {self.every}, but the run has {steps} optimizer steps, so that it would "
                "never move; lower it"
            )

    @torch.no_grad()
    def follow(self, policy: Policy, step: int) -> None:
        if step % self.every == 0:
            for own, other in zip(self.model.parameters(), policy.parameters(), strict=True):
                own.lerp_(other, self.alpha)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return nn.Module.state_dict(self, *args, **kwargs)
