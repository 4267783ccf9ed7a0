"""Objectives over pairs: one small frozen dataclass each.

Every loss maps the policy's and the reference's log-probabilities to one number a pair, in nats or the unit its paper
uses; the mean over pairs is taken elsewhere, once. A new loss is a class here, or any class in any module given to
`--model.loss` by its import path.

Losses of log-ratios share beta and what stands in `objective.preference.RatioLoss`: other divergences, log-ratios a
token, length desensitising, weights, an SFT term, no reference. In the equations r is a reward, beta * f'(policy /
reference), which is beta * log(policy / reference) where nothing else is asked for; w is chosen, l is rejected. Losses
of all a step's pairs are in `objective.transport`, those without a reference in `objective.likelihoods`, sums in
`objective.sums`; all can be had from here.

Legend: B pairs
"""

import math
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from dpo_lightning.objective.divergences import exp
from dpo_lightning.objective.likelihoods import CPO, ORPO, SFT, SimPO
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.preference import (
    PreferenceLoss,
    RatioLoss,
    State,
    require,
    require_positive,
    smoothed,
)
from dpo_lightning.objective.sums import Sum
from dpo_lightning.objective.transport import AOT, AOTUnpaired

__all__ = (
    "AOT",
    "BCO",
    "CPO",
    "EXO",
    "IPO",
    "NCA",
    "ORPO",
    "SFT",
    "SPPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "DiscoPOP",
    "Hinge",
    "PreferenceLoss",
    "RatioLoss",
    "Robust",
    "Sigmoid",
    "SimPO",
    "Sum",
)


@dataclass(frozen=True)
class Sigmoid(RatioLoss):
    """The DPO loss: -log sigma(r_w - r_l).

    Rafailov et al. 2023, eq. 7 (arXiv:2305.18290). With label smoothing eps it is the conservative DPO of Mitchell 2023
    (https://ericmitchell.ai/cdpo.pdf, eq. 3): -(1 - eps) log sigma(r_w - r_l) - eps log sigma(r_l - r_w). With
    `per_token` it is the length-normalised DPO of Tulu 3 (Lambert et al. 2024, arXiv:2411.15124).

    Args:
        label_smoothing: probability that a label is flipped, in [0, 0.5).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")

    @property
    def saturates(self) -> bool:
        return not self.label_smoothing

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return smoothed(self.beta * (chosen - rejected), self.label_smoothing)


@dataclass(frozen=True)
class Robust(RatioLoss):
    """An unbiased estimate of the DPO loss under flipped labels: ((1 - eps) L(w, l) - eps L(l, w)) / (1 - 2 eps).

    Chowdhury et al. 2024 (arXiv:2403.00409); L is the DPO loss. It can be negative.

    Args:
        label_smoothing: probability eps that a label is flipped, in (0, 0.5); at 0 it would be `Sigmoid`.
    """

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "label_smoothing", 0 < self.label_smoothing < 0.5, "in (0, 0.5)")

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        margins, eps = self.beta * (chosen - rejected), self.label_smoothing
        return (eps * logsigmoid(-margins) - (1 - eps) * logsigmoid(margins)) / (1 - 2 * eps)


@dataclass(frozen=True)
class Hinge(RatioLoss):
    """max(0, 1 - (r_w - r_l)): no gradient once the margin is 1.

    SLiC (Zhao et al. 2023, arXiv:2305.10425) on rewards, as in RSO (Liu et al. 2024, arXiv:2309.06657).
    """

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return relu(1 - self.beta * (chosen - rejected))


@dataclass(frozen=True)
class IPO(RatioLoss):
    """Squared distance of the gap of log-ratios to 1/(2 beta), as the paper has it of log-ratios of whole answers.

    Azar et al. 2023, eq. 17 (arXiv:2310.12036), where beta is written tau. With `per_token` the log-ratios are means
    over tokens, as the paper's authors are said to have run it and other trainers do; then beta is in 1/(nats a token).
    """

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class EXO(RatioLoss):
    """KL(p, q) of the policy's odds p = sigma(r_w - r_l) and labels q = (1 - eps, eps): reverse where DPO's is forward.

    EXO-pref, Ji et al. 2024, eq. 16 (arXiv:2402.00856).

    Args:
        label_smoothing: eps, in (0, 0.5); at 0 the loss is infinite.
    """

    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "label_smoothing", 0 < self.label_smoothing < 0.5, "in (0, 0.5)")

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        margins, eps = self.beta * (chosen - rejected), self.label_smoothing
        right, wrong = logsigmoid(margins), logsigmoid(-margins)
        return right.exp() * (right - math.log1p(-eps)) + wrong.exp() * (wrong - math.log(eps))


@dataclass(frozen=True)
class NCA(RatioLoss):
    """-log sigma(r_w) - 1/2 log sigma(-r_w) - 1/2 log sigma(-r_l): the chosen answer itself must become likelier.

    Chen et al. 2024, NCA for pairs (arXiv:2402.05369).
    """

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        chosen, rejected = self.beta * chosen, self.beta * rejected
        return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


@dataclass(frozen=True)
class BCO(RatioLoss):
    """-log sigma(r_w - delta) - log sigma(delta - r_l): a classifier of answers, its threshold the mean reward so far.

    Jung et al. 2024 (arXiv:2404.04656). The shift delta is a moving average over optimizer steps of the mean
    reward of all their answers, 0 at first; a step's own pairs move it for the next step only, so that a pair's loss
    does not depend on the others.

    Args:
        decay: of the moving average, in [0, 1); 0 takes the step before alone.
    """

    decay: float = 0.9

    initial_state = MappingProxyType({"shift": 0.0})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "decay", 0 <= self.decay < 1, "in [0, 1)")

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(self.beta * chosen) - logsigmoid(-self.beta * rejected)

    def __call__(self, policy: PairLogps, reference: PairLogps | None, state: State) -> Tensor:
        shift = state["shift"] / self.beta
        chosen, rejected = self.scores(policy, reference)
        return self.weighed(self.pair_losses(chosen - shift, rejected - shift), policy)

    def observe(self, policy: PairLogps, reference: PairLogps | None) -> dict[str, Tensor]:
        return {"shift": self.rewards(policy, reference).detach().unflatten(0, (2, -1)).mean(0)}

    def advance(self, state: State, means: State) -> dict[str, Tensor]:
        return {"shift": self.decay * state["shift"] + (1 - self.decay) * means["shift"]}


@dataclass(frozen=True)
class SPPO(RatioLoss):
    """(g_w - 1/(2 beta))^2 + (g_l + 1/(2 beta))^2, g being log-ratios: self-play with hard labels.

    Wu et al. 2024, eq. 4.7 (arXiv:2405.00675) with probabilities 1 and 0, where 1/beta is written eta.
    """

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        target = 1 / (2 * self.beta)
        return (chosen - target) ** 2 + (rejected + target) ** 2


@dataclass(frozen=True)
class APOZero(RatioLoss):
    """1 - sigma(r_w) + sigma(r_l): for chosen answers that are better than the policy's own.

    D'Oosterlinck et al. 2024, eq. 7 (arXiv:2408.06266).
    """

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (-self.beta * chosen).sigmoid() + (self.beta * rejected).sigmoid()


@dataclass(frozen=True)
class APODown(RatioLoss):
    """sigma(r_w) + 1 - sigma(r_w - r_l): for chosen answers that are worse than the policy's own.

    D'Oosterlinck et al. 2024, eq. 8 (arXiv:2408.06266).
    """

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (self.beta * chosen).sigmoid() + (self.beta * (rejected - chosen)).sigmoid()


@dataclass(frozen=True)
class DiscoPOP(RatioLoss):
    """A blend of the DPO loss and of exp(-margin), found by a language model: log-ratio modulated loss.

    Lu et al. 2024, eq. 5 (arXiv:2406.08414): (1 - m) * -log sigma(z) + m * exp(-z), z = r_w - r_l, m = sigma(z / tau).

    Args:
        tau: temperature of the blend, > 0.
    """

    tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "tau")

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        margins = self.beta * (chosen - rejected)
        blend = (margins / self.tau).sigmoid()
        return -(1 - blend) * logsigmoid(margins) + blend * exp(-margins)
