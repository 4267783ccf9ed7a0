"""Objectives over pairs: one small frozen dataclass each.

Every loss maps the policy's and the reference's log-probabilities to one number a pair, in nats or the unit its paper
uses; the mean over pairs is taken elsewhere, once. A new loss is a class here, or any class in any module given to
`--model.loss` by its import path.

Legend: B pairs
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_lightning.errors import InputError
from dpo_lightning.objective.logps import PairLogps


class PreferenceLoss(ABC):
    """What the policy is trained to make small.

    Attributes:
        needs_reference: whether `reference` is looked at; where not, its forward is skipped and it is None.
        pairwise: whether `rejected` is looked at; where not, rejected answers are not laid out.
        statistics: what it asks of the logits beside log-probabilities, from `objective.logps.STATISTICS`.
    """

    needs_reference: ClassVar[bool] = True
    pairwise: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """The loss of each pair, `[B]`."""

    def rewards(self, policy: PairLogps, reference: PairLogps | None) -> Tensor | None:
        """Implicit rewards of all answers, `[2 * B]`, chosen first; None where the loss implies none."""
        return None


@dataclass(frozen=True)
class Sigmoid(PreferenceLoss):
    """The DPO loss: -log sigma(beta * gap), the gap being chosen minus rejected log-ratio.

    Rafailov et al. 2023, eq. 7 (arXiv:2305.18290). With label smoothing eps it is the conservative DPO of Mitchell 2023
    (https://ericmitchell.ai/cdpo.pdf, eq. 3): -(1 - eps) log sigma(beta * gap) - eps log sigma(-beta * gap). With an
    SFT term it is the DPO + NLL of Pang et al. 2024 (arXiv:2404.19733, eq. 1; RPO elsewhere): plus alpha times the
    chosen answer's mean negative log-likelihood, in nats a token, which keeps good answers from becoming unlikely.

    Args:
        beta: strength of the KL term, in rewards per nat, > 0.
        label_smoothing: probability that a label is flipped, in [0, 0.5).
        sft_weight: the alpha of the SFT term, >= 0; 0 is without.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        if not 0 <= self.sft_weight < math.inf:
            raise InputError(f"Sigmoid.sft_weight must be at least 0 and finite, got {self.sft_weight}")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"Sigmoid.label_smoothing must be in [0, 0.5), got {self.label_smoothing}")

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        evidence = self.beta * logratio_gap(policy, reference)  # [B]
        losses = -(1 - self.label_smoothing) * logsigmoid(evidence) - self.label_smoothing * logsigmoid(-evidence)
        return losses - self.sft_weight * policy.means[: policy.num_pairs]

    def rewards(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        return self.beta * logratios(policy, reference)  # [2 * B]


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


def logratios(policy: PairLogps, reference: PairLogps | None) -> Tensor:
    """log(policy / reference) of every answer, `[2 * B]`, in nats."""
    if reference is None:
        raise ValueError("this loss compares with a reference, and none was given")
    return policy.logps - reference.logps


def logratio_gap(policy: PairLogps, reference: PairLogps | None) -> Tensor:
    """Chosen minus rejected log-ratio, `[B]`, in nats."""
    chosen, rejected = logratios(policy, reference).unflatten(0, (2, -1))
    return chosen - rejected


def require_positive(loss: PreferenceLoss, name: str) -> None:
    """Raises InputError unless the loss's field `name` is above 0 and finite."""
    if not 0 < getattr(loss, name) < math.inf:
        raise InputError(f"{type(loss).__name__}.{name} must be above 0 and finite, got {getattr(loss, name)}")
