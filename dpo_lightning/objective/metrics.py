"""What is reported of pairs: each pair counts exactly once, on whatever rank and in whatever batch it is seen.

Legend: B pairs  K figures
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.preference import PreferenceLoss


@dataclass(frozen=True)
class Scored:
    """A batch after its forward passes.

    Attributes:
        policy, reference: log-probabilities; no reference where the loss needs none.
        losses: `[B]`.
        rewards: `[2 * B]` where the loss implies them.
    """

    policy: PairLogps
    reference: PairLogps | None
    losses: Tensor
    rewards: Tensor | None

    def both(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen and the rejected half of one value an answer, `[B]` each."""
        chosen, rejected = values.unflatten(0, (2, -1))
        return chosen, rejected

    @cached_property
    def margins(self) -> Tensor:
        """Reward of the chosen minus reward of the rejected answer, `[B]`."""
        chosen, rejected = self.both(self.rewards)
        return chosen - rejected

    @cached_property
    def logratios(self) -> Tensor:
        """log(policy / reference) of every answer, `[2 * B]`, in nats."""
        return self.policy.logps - self.reference.logps

    @property
    def longer(self) -> Tensor:
        """Tokens by which the chosen answer is longer than the rejected one, `[B]`."""
        chosen, rejected = self.both(self.policy.lengths)
        return chosen - rejected

    @cached_property
    def mean_logits(self) -> Tensor:
        """Mean logit over the vocabulary, averaged over an answer's tokens, `[answers]`."""
        policy = self.policy
        return policy.sums(policy.statistics["mean_logits"]) / policy.lengths.clamp(min=1)


def accuracies(margins: Tensor) -> Tensor:
    """1 where the chosen answer has the higher reward, 1/2 on a tie, 0 else.

    >>> accuracies(torch.tensor([2.0, 0.0, -1.0]))
    tensor([1.0000, 0.5000, 0.0000])
    """
    return (margins.sign() + 1) / 2


#: Statistics of the logits that the figures below are made of.
STATISTICS = ("mean_logits",)

#: Figures of any loss: name -> one value a pair, `[B]`.
ANSWER_FIGURES: dict[str, Callable[[Scored], Tensor]] = {
    "loss": lambda s: s.losses,
    "logps/chosen": lambda s: s.policy.chosen,
    "logits/chosen": lambda s: s.mean_logits[: s.policy.num_pairs],
}

#: Figures of losses over pairs.
PAIR_FIGURES: dict[str, Callable[[Scored], Tensor]] = {
    "logps/rejected": lambda s: s.policy.rejected,
    "logits/rejected": lambda s: s.mean_logits[s.policy.num_pairs :],
}

#: Figures of losses over pairs that look at a reference. The chosen answers of how many pairs have become less likely
#: (likelihood displacement, Razin et al. 2024, arXiv:2410.08847); and an estimate of KL(reference, policy), in nats an
#: answer, as far as the pairs' answers are the reference's own.
REFERENCE_FIGURES: dict[str, Callable[[Scored], Tensor]] = {
    "displacement": lambda s: (s.both(s.logratios)[0] < 0).float(),
    "kl_of_pairs": lambda s: -s.logratios.unflatten(0, (2, -1)).mean(0),
}

#: From this margin on sigma(-margin), the weight of a pair in the gradient of the DPO loss, is below 0.01.
SATURATED = math.log(99)

#: Figures of losses over pairs that imply rewards.
REWARD_FIGURES: dict[str, Callable[[Scored], Tensor]] = {
    "rewards/chosen": lambda s: s.both(s.rewards)[0],
    "rewards/rejected": lambda s: s.both(s.rewards)[1],
    "rewards/accuracies": lambda s: accuracies(s.margins),
    "rewards/margins": lambda s: s.margins,
    # Whether the reward merely likes long answers.
    "rewards/accuracies/longer": lambda s: accuracies(s.margins),
    "rewards/accuracies/shorter": lambda s: accuracies(s.margins),
}

#: Figures of losses whose gradient is sigma(-margin).
SATURATION_FIGURES: dict[str, Callable[[Scored], Tensor]] = {
    "rewards/saturation": lambda s: (s.margins > SATURATED).float(),
}

#: Figures that are means over some pairs only: name -> whether a pair counts, `[B]`.
CONDITIONS: dict[str, Callable[[Scored], Tensor]] = {
    "rewards/accuracies/longer": lambda s: s.longer > 0,  # the chosen answer is the longer one
    "rewards/accuracies/shorter": lambda s: s.longer < 0,
}


def figures_of(loss: PreferenceLoss) -> dict[str, Callable[[Scored], Tensor]]:
    """The figures that a loss has: of rejected answers if it looks at pairs, of rewards if it implies them."""
    if not loss.pairwise:
        return ANSWER_FIGURES
    compared = REFERENCE_FIGURES if loss.needs_reference else {}
    implied = REWARD_FIGURES if loss.implies_rewards else {}
    return ANSWER_FIGURES | PAIR_FIGURES | compared | implied | (SATURATION_FIGURES if loss.saturates else {})


class PreferenceMetrics(Metric):
    """Means over pairs of a loss's figures, exact across batches and ranks.

    A loss that looks at all pairs of a step together has as its figure the loss of all pairs counted here together,
    whatever batches they came in; or, where batches are steps, the mean over steps.
    Sums are kept in float64 (float32 where the machine's accelerator has no wider type), so that a mean over a million
    pairs is right to the last logged digit.
    """

    full_state_update = False

    def __init__(self, loss: PreferenceLoss, batches_are_steps: bool = False) -> None:
        super().__init__()
        self.loss = loss
        self.pooled = loss.whole_step and not batches_are_steps
        self.figures = figures_of(loss)
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state("totals", torch.zeros(len(self.figures), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(self.figures), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        if self.pooled:
            self.add_state("parts", [], dist_reduce_fx="cat")

    def update(self, scored: Scored, weights: Tensor, num_tokens: int) -> None:
        """Count a batch; a pair of weight 0 counts for nothing.

        Args:
            scored: the batch's log-probabilities, losses and rewards.
            weights: `[B]` 1 or 0.
            num_tokens: tokens of the pairs that count.
        """
        values = torch.stack([figure(scored).detach() for figure in self.figures.values()])  # [K, B]
        counted = torch.stack([self.counted(name, scored) for name in self.figures]) * weights  # [K, B]
        self.totals += (values.to(self.totals) * counted).sum(1)
        self.counts += counted.sum(1)
        self.pairs += weights.sum()
        self.tokens += num_tokens
        if self.pooled:
            parts = self.loss.parts(scored.policy, scored.reference).detach()
            self.parts.append(torch.cat([parts, weights[None].to(parts)]).T)  # [B, parts + 1]

    def counted(self, name: str, scored: Scored) -> Tensor:
        """Whether each pair counts for a figure, `[B]`."""
        condition = CONDITIONS.get(name)
        return torch.ones_like(scored.losses, dtype=torch.bool) if condition is None else condition(scored)

    def compute(self) -> dict[str, Tensor]:
        """Figure -> mean over all pairs since the last reset, NaN where there was none; with the counts."""
        means = dict(zip(self.figures, self.totals / self.counts, strict=True))
        if self.pooled:
            counted = len(self.parts) > 0  # a list, or one tensor once it was gathered from all ranks
            if counted:
                *parts, weights = dim_zero_cat(self.parts).unbind(1)
                means["loss"] = self.loss.of_parts(torch.stack(parts)[:, weights > 0]).mean()
        return means | {"pairs": self.pairs, "tokens": self.tokens}

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> "PreferenceMetrics":
        """Moves the sums between devices; in a model of any precision they keep their width."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)
