"""Losses of the policy's own log-probabilities, without a reference.

Legend: B pairs
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.preference import PreferenceLoss, require, require_positive, smoothed


class LikelihoodLoss(PreferenceLoss):
    """A loss of the policy's own mean log-probabilities, whose rewards are beta times these."""

    needs_reference = False
    beta: float

    def rewards(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        return self.beta * policy.means


@dataclass(frozen=True)
class SimPO(LikelihoodLoss):
    """-log sigma(beta * (m_w - m_l) - gamma), m being log-probabilities a token under the policy.

    Meng et al. 2024, eq. 6 (arXiv:2405.14734).

    Args:
        beta: rewards per nat a token, > 0.
        gamma: margin that is aimed at, in rewards, >= 0; the paper finds half of beta good.
        label_smoothing: probability that a label is flipped, in [0, 0.5).
    """

    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require(self, "gamma", 0 <= self.gamma < math.inf, "at least 0 and finite")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        chosen, rejected = policy.means.unflatten(0, (2, -1))
        return smoothed(self.beta * (chosen - rejected) - self.gamma, self.label_smoothing)


@dataclass(frozen=True)
class ORPO(LikelihoodLoss):
    """SFT on the chosen answer plus beta * -log sigma(o_w - o_l), o being log odds.

    Hong et al. 2024, eq. 6 and 7 (arXiv:2403.07691), where beta is written lambda. The odds are p / (1 - p), p an
    answer's likelihood a token, in geometric mean.

    Args:
        beta: weight of the odds ratio, > 0.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self, "beta")

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        means = policy.means
        # An answer that is certain has infinite odds; log(1 - p) of one a rounding away stands in.
        odds = means - torch.log(-torch.expm1(means.clamp(max=-torch.finfo(means.dtype).eps)))
        chosen, rejected = odds.unflatten(0, (2, -1))
        return -means[: policy.num_pairs] - self.beta * logsigmoid(chosen - rejected)


@dataclass(frozen=True)
class CPO(LikelihoodLoss):
    """-log sigma(beta * (log pi(w) - log pi(l))) plus SFT on the chosen answer.

    Xu et al. 2024 (arXiv:2401.08417), with the likelihood term a mean over tokens.

    Args:
        beta: rewards per nat, > 0.
        sft_weight: weight of the chosen answer's mean negative log-likelihood, in nats a token, >= 0.
        label_smoothing: probability that a label is flipped, in [0, 0.5).
    """

    beta: float = 0.1
    sft_weight: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require(self, "sft_weight", 0 <= self.sft_weight < math.inf, "at least 0 and finite")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        losses = smoothed(self.beta * (policy.chosen - policy.rejected), self.label_smoothing)
        return losses - self.sft_weight * policy.means[: policy.num_pairs]

    def rewards(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        return self.beta * policy.logps


@dataclass(frozen=True)
class SFT(PreferenceLoss):
    """Supervised fine-tuning on the chosen answers: their mean negative log-likelihood, in nats a token.

    The mean is over an answer's tokens first and then over answers, so a long answer counts no more than a short one.
    It takes rows of prompt and answer too, and is the stage that DPO starts from (Rafailov et al. 2023, section 3).
    """

    needs_reference = False
    pairwise = False

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        return -policy.means[: policy.num_pairs]  # [B]
