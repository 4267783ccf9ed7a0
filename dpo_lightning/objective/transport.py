"""Losses over all pairs of an optimizer step together: alignment via optimal transport.

Melnyk et al. 2024 (arXiv:2406.05882). In one dimension the best transport pairs the sorted values, so a step's pairs
are sorted before they are compared.

Legend: B pairs  K parts
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_lightning.objective.divergences import ReverseKL
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.preference import RatioLoss, WholeStepLoss, given, require, smoothed


@dataclass(frozen=True)
class AOTUnpaired(WholeStepLoss, RatioLoss):
    """The DPO loss of sorted rewards: the step's best chosen answer against its best rejected one, and so on down.

    Alignment via optimal transport, Melnyk et al. 2024, section 3 (arXiv:2406.05882). All pairs of an optimizer step
    must be in one batch on one rank.

    Args:
        label_smoothing: probability that a label is flipped, in [0, 0.5).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")
        require(self, "wpo", not self.wpo, "false: once sorted, no loss belongs to one pair that could be weighed")

    def sorted_parts(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """What is sorted and then subtracted, `[B]` each."""
        return self.scores(policy, reference)

    def parts(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        above, below = self.sorted_parts(policy, reference)
        return torch.stack([above, below, self.weighed(torch.zeros_like(above), policy)])  # [3, B]

    def of_parts(self, parts: Tensor) -> Tensor:
        above, below, added = parts
        return self.pair_losses(above.sort().values, below.sort().values) + added

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return smoothed(self.beta * (chosen - rejected), self.label_smoothing)


@dataclass(frozen=True)
class AOT(AOTUnpaired):
    """The same for pairs: the step's widest gap of log-probabilities under the policy against the widest under the
    reference, and so on down.

    Melnyk et al. 2024, section 3 (arXiv:2406.05882).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = self.divergence == ReverseKL()
        require(self, "divergence", plain, "ReverseKL: policy and reference are sorted each for itself")

    def sorted_parts(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        scale = policy.lengths.clamp(min=1) if self.per_token else 1
        own = self.gap(self.logps(policy) / scale)
        if not self.needs_reference:
            return own, torch.zeros_like(own)
        return own, self.gap(self.logps(given(reference)) / scale)

    def gap(self, values: Tensor) -> Tensor:
        """Chosen minus rejected, `[B]`."""
        chosen, rejected = values.unflatten(0, (2, -1))
        return chosen - rejected
