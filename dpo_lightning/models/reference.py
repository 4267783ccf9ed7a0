"""What the policy is compared with.

Every reference answers `logps(batch)` without gradient. It is told of the policy once, after the policy has its weights
and before the first step; it is never part of a training checkpoint.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dpo_lightning.data.packing import PreferenceBatch
from dpo_lightning.errors import InputError
from dpo_lightning.models.checkpoint import load_policy
from dpo_lightning.models.generation import generate
from dpo_lightning.models.policy import Policy
from dpo_lightning.objective.logps import PairLogps


class Reference(nn.Module, ABC):
    """The fixed model that rewards are measured against."""

    @abstractmethod
    def prepare(self, policy: Policy) -> None:
        """Get ready to score batches in the policy's layout; `policy` still has the weights it starts from."""

    @abstractmethod
    def logps(self, batch: PreferenceBatch, statistics: Sequence[str] = ()) -> PairLogps:
        """Log-probabilities of every answer token of the batch, in nats, without gradient."""

    @abstractmethod
    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        keys: Sequence[tuple[int, ...]],
    ) -> list[np.ndarray]:
        """Samples of the reference, as `dpo_lightning.models.generation.generate` makes them."""


class FrozenModel(Reference):
    """A frozen copy of the policy as it starts, or another checkpoint.

    Args:
        checkpoint: folder or hub id of another model of the same tokenizer; null copies the policy.
    """

    def __init__(self, checkpoint: str | None = None) -> None:
        super().__init__()
        self.checkpoint = checkpoint

    def prepare(self, policy: Policy) -> None:
        if self.checkpoint is None:
            self.model = copy.deepcopy(policy)
        else:
            attention = policy.model.config._attn_implementation
            self.model = load_policy(self.checkpoint, layout=policy.layout, attn_implementation=attention)
            if self.model.vocabulary != policy.vocabulary:
                raise InputError(
                    f"model.reference.checkpoint {self.checkpoint} has a vocabulary of {self.model.vocabulary} tokens, "
                    f"the policy one of {policy.vocabulary}; a reference must read the policy's tokens"
                )
        self.model.requires_grad_(False).eval()

    @torch.no_grad()
    def logps(self, batch: PreferenceBatch, statistics: Sequence[str] = ()) -> PairLogps:
        return self.model.logps(batch, statistics)

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        keys: Sequence[tuple[int, ...]],
    ) -> list[np.ndarray]:
        return generate(self.model, tokenizer, prompts, max_new_tokens, keys)

    def train(self, mode: bool = True) -> "FrozenModel":
        """Stays in evaluation mode whatever the trainer says."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
        """Nothing: it is loaded from where it came from, and a checkpoint with it would be twice as large."""
        return {} if destination is None else destination
