"""What is reported of pairs: each pair counts exactly once, on whatever rank and in whatever batch it is seen.

Legend: B pairs  K figures
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.losses import PreferenceLoss


@dataclass(frozen=True)
class Scored:
    """A batch after its forward passes: `losses` `[B]`, and `rewards` `[2 * B]` where the loss implies them."""

    policy: PairLogps
    losses: Tensor
    rewards: Tensor | None

    def both(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen and the rejected half of one value an answer, `[B]` each."""
        chosen, rejected = values.unflatten(0, (2, -1))
        return chosen, rejected

    @property
    def margins(self) -> Tensor:
        """Reward of the chosen minus reward of the rejected answer, `[B]`."""
        chosen, rejected = self.both(self.rewards)
        return chosen - rejected

    @property
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

#: Figures of losses over pairs that imply rewards.
REWARD_FIGURES: dict[str, Callable[[Scored], Tensor]] = {
    "rewards/chosen": lambda s: s.both(s.rewards)[0],
    "rewards/rejected": lambda s: s.both(s.rewards)[1],
    "rewards/accuracies": lambda s: accuracies(s.margins),
    "rewards/margins": lambda s: s.margins,
}


def figures_of(loss: PreferenceLoss) -> dict[str, Callable[[Scored], Tensor]]:
    """The figures that a loss has: of rejected answers if it looks at pairs, of rewards if it implies them."""
    if not loss.pairwise:
        return ANSWER_FIGURES
    implied = type(loss).rewards is not PreferenceLoss.rewards
    return ANSWER_FIGURES | PAIR_FIGURES | (REWARD_FIGURES if implied else {})


class PreferenceMetrics(Metric):
    """Means over pairs of a loss's figures, exact across batches and ranks.

    Sums are kept in float64 (float32 where the machine's accelerator has no wider type), so that a mean over a million
    pairs is right to the last logged digit.
    """

    full_state_update = False

    def __init__(self, loss: PreferenceLoss) -> None:
        super().__init__()
        self.figures = figures_of(loss)
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state("totals", torch.zeros(len(self.figures), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def update(self, scored: Scored, weights: Tensor, num_tokens: int) -> None:
        """Count a batch; a pair of weight 0 counts for nothing.

        Args:
            scored: the batch's log-probabilities, losses and rewards.
            weights: `[B]` 1 or 0.
            num_tokens: tokens of the pairs that count.
        """
        values = torch.stack([figure(scored).detach() for figure in self.figures.values()])  # [K, B]
        self.totals += (values.to(self.totals) * weights).sum(1)
        self.pairs += weights.sum()
        self.tokens += num_tokens

    def compute(self) -> dict[str, Tensor]:
        """Figure -> mean over all pairs since the last reset, NaN where there was none; with the counts."""
        means = dict(zip(self.figures, self.totals / self.pairs, strict=True))
        return means | {"pairs": self.pairs, "tokens": self.tokens}

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> "PreferenceMetrics":
        """Moves the sums between devices; in a model of any precision they keep their width."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)
