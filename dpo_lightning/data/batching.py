"""Which pairs form which batch on which rank: a pure function of (seed, epoch).

Optimizer step s of an epoch takes `order[s * G : (s + 1) * G]`, G = batch_size * ranks * accumulate. Only then are its
pairs dealt to ranks and micro-batches, so the set of pairs in a step does not depend on how the work is split. Every
rank has the same number of micro-batches in a step; one that is left without pairs runs a ghost.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True)
class PlannedBatch:
    """One micro-batch of one rank.

    Args:
        pairs: indices of its pairs.
        pairs_in_step: pairs of the whole optimizer step, over all ranks and micro-batches.
        ghost: its one pair, the shortest of the step, is there to keep the rank in step and counts for nothing.
    """

    pairs: tuple[int, ...]
    pairs_in_step: int
    ghost: bool = False


class Order:
    """All pairs of an epoch: shuffled, a pure function of (seed, epoch), or as they are where there is no seed."""

    def __init__(self, pairs: int, seed: int | None) -> None:
        self.pairs = pairs
        self.seed = seed

    def __len__(self) -> int:
        return self.pairs

    def __call__(self, epoch: int) -> np.ndarray:
        """The pairs of an epoch, in order."""
        if self.seed is None:
            return np.arange(self.pairs)
        return np.random.default_rng((self.seed, epoch)).permutation(self.pairs)


class BatchPlan(Sampler[PlannedBatch]):
    """The batches of one rank, epoch by epoch.

    Args:
        costs: `[pairs]` tokens of each pair, by which ranks are balanced.
        batch_size: most pairs of a micro-batch.
        ranks: number of ranks.
        rank: this one.
        accumulate: micro-batches of a full optimizer step.
        seed: of the order, with the epoch.
        shuffle: else the pairs' own order in every epoch.
        order: the pairs of an epoch, in order, where it is not all of them by seed and epoch.
    """

    def __init__(
        self,
        costs: np.ndarray,
        batch_size: int,
        *,
        ranks: int = 1,
        rank: int = 0,
        accumulate: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        order: Order | None = None,
    ) -> None:
        self.costs = costs
        self.batch_size = batch_size
        self.ranks = ranks
        self.rank = rank
        self.accumulate = accumulate
        self.seed = seed
        self.order = order or Order(len(costs), seed if shuffle else None)
        self.epoch = 0
        self.done = (0, 0)  # epoch, and how many of its batches an interrupted run has trained on

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def resume(self, epoch: int, batches: int) -> None:
        """Leave out the first `batches` of `epoch`: they were trained on before the run was interrupted."""
        self.epoch, self.done = epoch, (epoch, batches)

    def __len__(self) -> int:
        full, rest = divmod(len(self.order), self.batch_size * self.ranks * self.accumulate)
        return full * self.accumulate + -(-rest // (self.batch_size * self.ranks))

    def __iter__(self) -> Iterator[PlannedBatch]:
        epoch, batches = self.done
        yield from islice(self.batches(self.epoch), batches if self.epoch == epoch else 0, None)

    def batches(self, epoch: int) -> Iterator[PlannedBatch]:
        """This rank's batches of an epoch, from its first."""
        order = self.order(epoch)
        step = self.batch_size * self.ranks * self.accumulate
        for start in range(0, len(order), step):
            yield from self._deal_step(order[start : start + step])

    def _deal_step(self, pairs: np.ndarray) -> Iterator[PlannedBatch]:
        micro = -(-len(pairs) // (self.batch_size * self.ranks))  # the last step of an epoch may need fewer
        mine = pairs[deal(self.costs[pairs], self.ranks, self.batch_size * micro)[self.rank]]
        for batch in deal(self.costs[mine], micro, self.batch_size):
            if len(batch):
                yield PlannedBatch(tuple(mine[batch].tolist()), len(pairs))
            else:
                yield PlannedBatch((int(pairs[self.costs[pairs].argmin()]),), len(pairs), ghost=True)


def deal(costs: np.ndarray | Sequence[int], bins: int, capacity: int) -> list[np.ndarray]:
    """Items to bins of at most `capacity` items: longest first, each to the lightest bin with room (Graham 1969).

    Returns:
        the items' indices for each bin, ascending.

    >>> [bin.tolist() for bin in deal([5, 1, 4, 2], bins=2, capacity=2)]
    [[0, 1], [2, 3]]
    """
    costs = np.asarray(costs)
    longest_first = np.argsort(-costs, kind="stable")
    contents: list[list[int]] = [[] for _ in range(bins)]
    heap = list(range(bins))  # load * bins + number: the lightest bin first, of equal ones the first
    for item, cost in zip(longest_first.tolist(), costs[longest_first].tolist(), strict=True):
        lightest = heap[0] % bins
        contents[lightest].append(item)
        if len(contents[lightest]) < capacity:
            heapq.heapreplace(heap, heap[0] + cost * bins)
        else:
            heapq.heappop(heap)
    return [np.array(sorted(content), dtype=np.int64) for content in contents]
