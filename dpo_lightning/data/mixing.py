"""In which order the pairs of several sources come when their shares are given."""

from collections.abc import Sequence
from math import floor

import numpy as np

from dpo_lightning.data.batching import Order
from dpo_lightning.errors import InputError


class Mixture(Order):
    """The pairs of each epoch, so many of every source that its share is its weight: a pure function of (seed, epoch).

    An epoch ends before a pair would come twice in it. A source of which it takes only a part goes on with other pairs
    in the next epoch, until all have come.

    Args:
        sources: `[pairs]` the number of each pair's source.
        weights: of each source, > 0; their sum is of no account.
        seed: of the order, with the epoch.
        most: pairs of an epoch at most, always the same ones: the first of each source.

    Raises:
        InputError: if a weight is so small that no pair of its source would come.
    """

    def __init__(self, sources: np.ndarray, weights: Sequence[float], seed: int, most: int | None = None) -> None:
        shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        members = [np.flatnonzero(sources == number) for number in range(len(weights))]
        pairs = min(len(m) / share for m, share in zip(members, shares, strict=True))
        pairs = min(pairs, most or pairs)
        self.counts = [floor(share * pairs + 1e-6) for share in shares]
        if min(self.counts) == 0:
            number = self.counts.index(0)
            raise InputError(
                f"data.weights: {weights[number]} for source {number} is less than one pair in an epoch of "
                f"{floor(pairs)}; raise it, or leave the source out"
            )
        self.members = [m[:count] for m, count in zip(members, self.counts, strict=True)] if most else members
        super().__init__(sum(self.counts), seed)

    def __call__(self, epoch: int) -> np.ndarray:
        """The pairs of an epoch, in order."""
        parts = []
        for number, (members, count) in enumerate(zip(self.members, self.counts, strict=True)):
            cycle, place = divmod(epoch, len(members) // count)
            order = np.random.default_rng((self.seed, number, cycle)).permutation(len(members))
            parts.append(members[order[place * count : (place + 1) * count]])
        return np.random.default_rng((self.seed, epoch)).permutation(np.concatenate(parts))
