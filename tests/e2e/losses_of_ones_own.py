"""Losses and formats that a user keeps in a module of their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpo_lightning.data.formats import Preference
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.losses import PreferenceLoss


@dataclass(frozen=True)
class Likelihoods(PreferenceLoss):
    """Mean log-probability of the rejected answer above the chosen one's, without a reference and without rewards."""

    margin: float = 0.0

    needs_reference = False

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        chosen, rejected = policy.means.unflatten(0, (2, -1))
        return (self.margin + rejected - chosen).relu()


def broken(row: Mapping[str, Any]) -> Preference:
    return Preference(row["question"], row["good"], row["bad"])
