"""What an objective over pairs is, and what those that compare policy and reference have in common.

Legend: B pairs  N answer tokens  K parts
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_lightning.errors import InputError
from dpo_lightning.objective.divergences import Divergence, ReverseKL
from dpo_lightning.objective.logps import PairLogps

#: What a loss remembers of the steps before: name -> value.
State = Mapping[str, Tensor]
EMPTY: Mapping[str, Any] = MappingProxyType({})


class PreferenceLoss(ABC):
    """What the policy is trained to make small.

    Attributes:
        needs_reference: whether `reference` is looked at; where not, its forward is skipped and it is None.
        pairwise: whether `rejected` is looked at; where not, rejected answers are not laid out.
        whole_step: whether a pair's loss depends on the other pairs, so that all of an optimizer step's must come in
            one batch; such a loss is a `WholeStepLoss`.
        saturates: whether a pair's weight in the gradient is sigma(-margin), which vanishes as the margin grows.
        starts_constant: whether it is the same for every pair where policy and reference agree.
        statistics: what it asks of the policy's logits beside log-probabilities, from `objective.logps.STATISTICS`.
        initial_state: what it remembers across optimizer steps, as it starts; where there is something, it is called
            with a third argument, the state, and `observe` and `advance` say how that goes on.
    """

    needs_reference: bool = True
    pairwise: bool = True
    whole_step: bool = False
    saturates: bool = False
    starts_constant: bool = False
    statistics: tuple[str, ...] = ()
    initial_state: Mapping[str, float] = EMPTY

    @abstractmethod
    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """The loss of each pair, `[B]`."""

    def rewards(self, policy: PairLogps, reference: PairLogps | None) -> Tensor | None:
        """Implicit rewards of all answers, `[2 * B]`, chosen first; None where the loss implies none."""
        return None

    @property
    def implies_rewards(self) -> bool:
        """Whether `rewards` gives any."""
        return type(self).rewards is not PreferenceLoss.rewards

    def observe(self, policy: PairLogps, reference: PairLogps | None) -> dict[str, Tensor]:
        """What a state is advanced with: one value a pair, `[B]` each, detached."""
        return {}

    def advance(self, state: State, means: State) -> dict[str, Tensor]:
        """The state after an optimizer step, given the means over all its pairs of what was observed."""
        return {}


class WholeStepLoss(PreferenceLoss):
    """A loss over all pairs of an optimizer step together, such as one that sorts them."""

    whole_step = True

    @abstractmethod
    def parts(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """What is known of each pair by itself, `[K, B]`."""

    @abstractmethod
    def of_parts(self, parts: Tensor) -> Tensor:
        """The losses `[B]`, whose mean counts, of all pairs' parts `[K, B]`."""

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        return self.of_parts(self.parts(policy, reference))


@dataclass(frozen=True)
class RatioLoss(PreferenceLoss):
    """A loss of the log-ratios log(policy / reference) of both answers, with what any such loss can take.

    Args:
        beta: strength of the KL term, in rewards per nat, > 0.
        divergence: what is made of the log-ratios; reverse KL leaves them as they are (Wang et al. 2023,
            arXiv:2309.16240).
        per_token: divide an answer's log-ratio by its tokens, so that its length does not count.
        ld_alpha: weight, in [0, 1], of the tokens by which the longer answer is longer, in policy and reference alike;
            1 is without (length-desensitised DPO, Liu et al. 2024, arXiv:2409.06411).
        wpo: weigh a pair by how likely the policy is to say its answers, relative to its own samples (Zhou et al. 2024,
            arXiv:2406.11827, eq. 2).
        sft_weight: weight, >= 0, of the chosen answer's mean negative log-likelihood, which is added, in nats a token
            (Pang et al. 2024, arXiv:2404.19733, eq. 1; RPO elsewhere); 0 is without.
        reference_free: log-probabilities in place of log-ratios, as of a uniform reference up to a constant, which
            differences do not see; the reference's forward is skipped.
    """

    beta: float = 0.1
    divergence: Divergence = field(default=ReverseKL(), kw_only=True)
    per_token: bool = field(default=False, kw_only=True)
    ld_alpha: float = field(default=1.0, kw_only=True)
    wpo: bool = field(default=False, kw_only=True)
    sft_weight: float = field(default=0.0, kw_only=True)
    reference_free: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        require_positive(self, "beta")
        require(self, "ld_alpha", 0 <= self.ld_alpha <= 1, "in [0, 1]")
        require(self, "sft_weight", 0 <= self.sft_weight < math.inf, "at least 0 and finite")
        if self.reference_free and self.divergence != ReverseKL():
            raise InputError(
                f"{type(self).__name__}.divergence is {self.divergence}, which measures the distance to a reference; "
                "reference_free has none, remove one of the two"
            )

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free

    @property
    def starts_constant(self) -> bool:
        return not (self.wpo or self.sft_weight or self.reference_free)

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("log_collision",) if self.wpo else ()

    @abstractmethod
    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair, `[B]`, of both answers' scores, `[B]` each."""

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        return self.weighed(self.pair_losses(*self.scores(policy, reference)), policy)

    def weighed(self, losses: Tensor, policy: PairLogps) -> Tensor:
        """The losses `[B]` with their weights and the SFT term."""
        if self.wpo:
            losses = losses * likeliness(policy)
        if self.sft_weight:
            losses = losses - self.sft_weight * policy.means[: policy.num_pairs]
        return losses

    def scores(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """What the loss sees of the chosen and of the rejected answers, `[B]` each: f' of their log-ratios."""
        logratios = self.logps(policy)
        if self.needs_reference:
            logratios = logratios - self.logps(given(reference))
        if self.per_token:
            logratios = logratios / policy.lengths.clamp(min=1)
        chosen, rejected = self.divergence(logratios).unflatten(0, (2, -1))
        return chosen, rejected

    def logps(self, model: PairLogps) -> Tensor:
        """Log-probabilities of all answers, `[2 * B]`, in nats, with less weight on what makes one longer."""
        if self.ld_alpha == 1:
            return model.logps
        return model.sums(model.token_logps * desensitised(model, self.ld_alpha))

    def rewards(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        return self.beta * torch.cat(self.scores(policy, reference))

    def __str__(self) -> str:
        """With beta, the loss's own fields, and what else is not as usual."""
        shared = {shared.name: shared.default for shared in fields(RatioLoss) if shared.name != "beta"}
        values = {own.name: getattr(self, own.name) for own in fields(self)}
        shown = [f"{name}={value}" for name, value in values.items() if name not in shared or value != shared[name]]
        return f"{type(self).__name__}({', '.join(shown)})"


def given(reference: PairLogps | None) -> PairLogps:
    """The reference of a loss that needs one; raises ValueError where there is none."""
    if reference is None:
        raise ValueError("this loss compares with a reference, and none was given")
    return reference


def desensitised(model: PairLogps, alpha: float) -> Tensor:
    """`[N]` 1 for the first tokens of each answer, as many as the pair's shorter one has, and `alpha` for the others.

    >>> pair = PairLogps(torch.zeros(4), torch.tensor([0, 0, 0, 1]), num_pairs=1, num_answers=2)
    >>> desensitised(pair, 0.5)
    tensor([1.0000, 0.5000, 0.5000, 1.0000])
    """
    places = torch.arange(len(model.answer), device=model.answer.device)
    first = torch.full_like(model.lengths, len(places), dtype=torch.long)
    first = first.scatter_reduce(0, model.answer, places, "amin")  # an answer's tokens stand together, in order
    shared = model.lengths.unflatten(0, (2, -1)).amin(0).repeat(2)  # [2 * B]
    one = model.lengths.new_ones(())  # without it alpha is rounded to fp32, whatever the log-probabilities are
    return torch.where(places - first[model.answer] < shared[model.answer], one, alpha)


def likeliness(policy: PairLogps) -> Tensor:
    """WPO's weights `[B]`, detached: of each token its probability over the mean one of a sample, in geometric mean.

    Zhou et al. 2024, eq. 2: exp of the mean over an answer's tokens of log pi(y_t) - log sum_v pi(v)^2, chosen times
    rejected.
    """
    excess = policy.token_logps.detach() - policy.statistics["log_collision"]
    means = policy.sums(excess) / policy.lengths.clamp(min=1)
    return means.unflatten(0, (2, -1)).sum(0).exp()


def require(loss: Any, name: str, holds: bool, expected: str) -> None:
    """Raises InputError, with the field's name and value, unless it holds what is expected."""
    if not holds:
        raise InputError(f"{type(loss).__name__}.{name} must be {expected}, got {getattr(loss, name)}")


def require_positive(loss: Any, name: str) -> None:
    """Raises InputError unless the loss's field `name` is above 0 and finite."""
    require(loss, name, 0 < getattr(loss, name) < math.inf, "above 0 and finite")


def call(loss: PreferenceLoss, policy: PairLogps, reference: PairLogps | None, state: State) -> Tensor:
    """The loss of each pair, `[B]`; a loss that remembers something is given it."""
    return loss(policy, reference, state) if loss.initial_state else loss(policy, reference)


def smoothed(margins: Tensor, label_smoothing: float) -> Tensor:
    """The DPO loss of margins, with a share of its labels taken to be flipped; of the shape of `margins`."""
    if not label_smoothing:
        return -logsigmoid(margins)
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
