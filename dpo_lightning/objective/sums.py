"""Several losses as one.

Legend: B pairs
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from dpo_lightning.errors import InputError
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.preference import EMPTY, PreferenceLoss, State, call


@dataclass(frozen=True)
class Sum(PreferenceLoss):
    """A weighted sum of losses, such as mixed preference optimisation: 0.8 Sigmoid + 0.2 BCO + SFT.

    Wang et al. 2024 (arXiv:2411.10442). Rewards are those of the first loss that implies any.

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
