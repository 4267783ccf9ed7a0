"""Objectives over pairs: one small frozen dataclass each.

Every loss maps the policy's and the reference's log-probabilities to one number a pair, in nats or the unit its paper
uses; the mean over pairs is taken elsewhere, once. A new loss is a class here, or any class in any module given to
`--model.loss` by its import path.

Losses of log-ratios share beta and what stands in `objective.preference.RatioLoss`: other divergences, log-ratios a
token, length desensitising, weights, an SFT term, no reference. In the equations r is a reward, beta * f'(policy /
reference), which is beta * log(policy / reference) where nothing else is asked for; w is chosen, l is rejected.

Legend: B pairs  K parts
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from dpo_lightning.errors import InputError
from dpo_lightning.objective.divergences import ReverseKL, exp
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.preference import (
    EMPTY,
    PreferenceLoss,
    RatioLoss,
    State,
    WholeStepLoss,
    given,
    require,
    require_positive,
)

# Losses of log-ratios


@dataclass(frozen=True)
class Sigmoid(RatioLoss):
    """The DPO loss: -log sigma(r_w - r_l).

    Rafailov et al. 2023, eq. 7 (arXiv:2305.18290). With label smoothing eps it is the conservative DPO of Mitchell 2023
    (https://ericmitchell.ai/cdpo.pdf, eq. 3): -(1 - eps) log sigma(r_w - r_l) - eps log sigma(r_l - r_w). With
    `per_token` it is the length-normalised DPO of Tulu 3 (Lambert et al. 2024, arXiv:2411.15124, eq. 6).

    Args:
        label_smoothing: probability that a label is flipped, in [0, 0.5).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return smoothed(self.beta * (chosen - rejected), self.label_smoothing)


@dataclass(frozen=True)
class Robust(RatioLoss):
    """An unbiased estimate of the DPO loss under flipped labels: ((1 - eps) L(w, l) - eps L(l, w)) / (1 - 2 eps).

    Chowdhury et al. 2024, eq. 12 (arXiv:2403.00409); L is the DPO loss. It can be negative.

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

    SLiC (Zhao et al. 2023, arXiv:2305.10425) on rewards, as in RSO (Liu et al. 2024, arXiv:2309.06657, eq. 8).
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

    Chen et al. 2024, InfoNCA and NCA for pairs, eq. 13 (arXiv:2402.05369).
    """

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        chosen, rejected = self.beta * chosen, self.beta * rejected
        return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


@dataclass(frozen=True)
class BCO(RatioLoss):
    """-log sigma(r_w - delta) - log sigma(delta - r_l): a classifier of answers, its threshold the mean reward so far.

    Jung et al. 2024, eq. 12 (arXiv:2404.04656). The shift delta is a moving average over optimizer steps of the mean
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


# Losses over all pairs of a step


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


# Losses without a reference


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

    Xu et al. 2024, eq. 5 (arXiv:2401.08417).

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


# Sums


@dataclass(frozen=True)
class Sum(PreferenceLoss):
    """A weighted sum of losses, such as mixed preference optimisation: 0.8 Sigmoid + 0.2 BCO + SFT.

    Wang et al. 2024, eq. 2 (arXiv:2411.10442). Rewards are those of the first loss that implies any.

    Args:
        losses: two or more; none that looks at all of a step's pairs together.
        weights: of each, > 0. Default: 1 each.
    """

    losses: tuple[PreferenceLoss, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.losses) < 2:
            raise InputError(f"Sum.losses must be at least two, got {len(self.losses)}; name a single loss itself")
        weights = self.factors
        if len(weights) != len(self.losses) or not all(0 < weight < math.inf for weight in weights):
            raise InputError(
                f"Sum.weights must be one for each of {len(self.losses)} losses, above 0 and finite, got {self.weights}"
            )
        whole = [type(loss).__name__ for loss in self.losses if loss.whole_step]
        if whole:
            raise InputError(f"Sum.losses has {whole[0]}, which sorts all pairs of a step together; take it by itself")

    @property
    def factors(self) -> tuple[float, ...]:
        return (1.0,) * len(self.losses) if self.weights is None else tuple(self.weights)

    @property
    def needs_reference(self) -> bool:
        return any(loss.needs_reference for loss in self.losses)

    @property
    def pairwise(self) -> bool:
        return any(loss.pairwise for loss in self.losses)

    @property
    def statistics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for loss in self.losses for name in loss.statistics))

    @cached_property
    def initial_state(self) -> Mapping[str, float]:
        return {f"{i}_{k}": value for i, loss in enumerate(self.losses) for k, value in loss.initial_state.items()}

    def __str__(self) -> str:
        return " + ".join(f"{weight:g} {loss}" for weight, loss in zip(self.factors, self.losses, strict=True))

    def own(self, values: State, number: int) -> State:
        """The part of a state, or of what was observed, that is one loss's."""
        return {name: values[f"{number}_{name}"] for name in self.losses[number].initial_state}

    def __call__(self, policy: PairLogps, reference: PairLogps | None, state: State = EMPTY) -> Tensor:
        losses = [call(loss, policy, reference, self.own(state, i)) for i, loss in enumerate(self.losses)]
        return sum(weight * loss for weight, loss in zip(self.factors, losses, strict=True))

    @property
    def implies_rewards(self) -> bool:
        return any(loss.implies_rewards for loss in self.losses)

    def rewards(self, policy: PairLogps, reference: PairLogps | None) -> Tensor | None:
        implying = next((loss for loss in self.losses if loss.implies_rewards), None)
        return None if implying is None else implying.rewards(policy, reference)

    def observe(self, policy: PairLogps, reference: PairLogps | None) -> dict[str, Tensor]:
        return {
            f"{i}_{name}": value
            for i, loss in enumerate(self.losses)
            for name, value in loss.observe(policy, reference).items()
        }

    def advance(self, state: State, means: State) -> dict[str, Tensor]:
        return {
            f"{i}_{name}": value
            for i, loss in enumerate(self.losses)
            for name, value in loss.advance(self.own(state, i), self.own(means, i)).items()
        }


def call(loss: PreferenceLoss, policy: PairLogps, reference: PairLogps | None, state: State) -> Tensor:
    """The loss of each pair, `[B]`; a loss that remembers something is given it."""
    return loss(policy, reference, state) if loss.initial_state else loss(policy, reference)


def smoothed(margins: Tensor, label_smoothing: float) -> Tensor:
    """The DPO loss of margins, with a share of its labels taken to be flipped; of the shape of `margins`."""
    if not label_smoothing:
        return -logsigmoid(margins)
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
