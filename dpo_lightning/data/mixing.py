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
        for number, pairs_of_source in enumerate(members):
            if not len(pairs_of_source):
                raise InputError(f"data.weights: source {number} has no pair to train on; leave it out")
        whole = min(len(m) / share for m, share in zip(members, shares, strict=True))
        pairs = min(whole, most or whole)
        self.counts = [floor(share * pairs + 1e-6) for share in shares]
        if min(self.counts) == 0:
            number = self.counts.index(0)
            raise InputError(
                f"data.weights: {weights[number]} for source {number} is less than one pair in an epoch of "
                f"{floor(pairs)}; raise it, or leave the source out"
            )
        limited = pairs < whole
        self.members = [m[:count] for m, count in zip(members, self.counts, strict=True)] if limited else members
        super().__init__(sum(self.counts), seed)

    def __call__(self, epoch: int) -> np.ndarray:
        """The pairs of an epoch, in order."""
        parts = [self._part(number, epoch) for number in range(len(self.members))]
        return np.random.default_rng((self.seed, epoch)).permutation(np.concatenate(parts))

    def _part(self, number: int, epoch: int) -> np.ndarray:
        """A source's pairs of an epoch: the next ones of an endless row of shuffled rounds through all of them."""
        members, count = self.members[number], self.counts[number]
        cycle, start = divmod(epoch * count, len(members))
        order = self._round(number, cycle)
        if start + count <= len(members):
            return members[order[start : start + count]]
        following = self._round(number, cycle + 1)[: start + count - len(members)]
        return members[np.concatenate([order[start:], following])]

    def _round(self, number: int, cycle: int) -> np.ndarray:
        """One round through a source's pairs, shuffled.

        An epoch that ends in it begins in the round before: the pairs that it has from there come later in this one.
        """
        members, count = self.members[number], self.counts[number]
        first = cycle
        while first * len(members) % count:  # back to a round that begins with an epoch
            first -= 1
        order = np.empty(0, dtype=np.int64)
        for current in range(first, cycle + 1):
            begun = current * len(members) % count  # pairs of the epoch that the round before had last
            before = order[len(order) - begun :]
            order = np.random.default_rng((self.seed, number, current)).permutation(len(members))
            fresh = order[~np.isin(order, before)][: count - begun] if begun else order[:0]
            order = np.concatenate([fresh, order[~np.isin(order, fresh)]])
        return order
