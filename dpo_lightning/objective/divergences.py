"""What is made of the log-ratio of policy and reference before a loss sees it: f'(policy / reference).

DPO follows from a reverse KL term; another f-divergence in its place gives another implicit reward, beta f'(u), u being
policy / reference (Wang et al. 2023, arXiv:2309.16240, table 1). Every f' here is shifted by a constant so that it is 0
at u = 1: where policy and reference agree, rewards are 0.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_lightning.errors import InputError

#: Above so many nats an exponential goes on as its tangent: finite, and with a gradient, for any log-ratio.
LIMIT = 20.0


class Divergence(ABC):
    """How far the policy is from the reference, by its derivative."""

    @abstractmethod
    def __call__(self, logratios: Tensor) -> Tensor:
        """f'(u) of log-ratios log u, of any shape, in nats."""


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(policy, reference), which is DPO's: f'(u) = log u. Seeks a mode, and is the default."""

    def __call__(self, logratios: Tensor) -> Tensor:
        return logratios


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(reference, policy): f'(u) = 1 - 1/u. Covers all that the reference says; what became unlikely weighs most."""

    def __call__(self, logratios: Tensor) -> Tensor:
        return -expm1(-logratios)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """Jensen-Shannon: f'(u) = log(2u / (1 + u)). Bounded above by ln 2: no reward for moving far towards an answer."""

    def __call__(self, logratios: Tensor) -> Tensor:
        return math.log(2) + logsigmoid(logratios)


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """Between the two KL: f'(u) = (1 - u^-alpha) / alpha, reverse KL as alpha goes to 0, forward KL at 1.

    Args:
        alpha: in (0, 1).
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise InputError(f"AlphaDivergence.alpha must be in (0, 1), got {self.alpha}")

    def __call__(self, logratios: Tensor) -> Tensor:
        return -expm1(-self.alpha * logratios) / self.alpha


def expm1(values: Tensor) -> Tensor:
    """e to the power of `values`, minus 1, exact near 0, going on as the tangent above `LIMIT`.

    >>> expm1(Tensor([1e-8, 1e4])).isfinite().all()
    tensor(True)
    """
    return values.clamp(max=LIMIT).expm1() + math.exp(LIMIT) * (values - LIMIT).relu()


def exp(values: Tensor) -> Tensor:
    """e to the power of `values`, going on as the tangent above `LIMIT`.

    >>> exp(Tensor([0.0, 1e4])).isfinite().all()
    tensor(True)
    """
    return values.clamp(max=LIMIT).exp() * (1 + (values - LIMIT).relu())
