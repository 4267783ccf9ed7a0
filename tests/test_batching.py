"""Every pair once an epoch, the same pairs in a step however it is split, and ranks that wait little for each other.

Legend: G pairs of an optimizer step = batch_size * ranks * accumulate
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.batching import BatchPlan, PlannedBatch, deal

few = settings(max_examples=60, deadline=None)

COUNTS = st.integers(1, 60)
SMALL = st.integers(1, 4)


def costs_of(count: int, seed: int = 0) -> np.ndarray:
    """Lengths as in HH: most short, some long."""
    return np.random.default_rng(seed).lognormal(5, 0.8, count).astype(np.int64) + 1


def plans(costs: np.ndarray, batch_size: int, ranks: int, accumulate: int, seed: int = 0) -> list[BatchPlan]:
    return [
        BatchPlan(costs, batch_size, ranks=ranks, rank=rank, accumulate=accumulate, seed=seed, shuffle=True)
        for rank in range(ranks)
    ]


def steps(costs: np.ndarray, batch_size: int, ranks: int, accumulate: int) -> list[list[PlannedBatch]]:
    """The batches of all ranks, gathered by optimizer step as the trainer would: each `accumulate` in turn."""
    by_rank = [list(plan) for plan in plans(costs, batch_size, ranks, accumulate)]
    return [
        [batch for batches in by_rank for batch in batches[start : start + accumulate]]
        for start in range(0, len(by_rank[0]), accumulate)
    ]


def real_pairs(batches: list[PlannedBatch]) -> list[int]:
    return [pair for batch in batches if not batch.ghost for pair in batch.pairs]


@few
@given(COUNTS, SMALL, SMALL, SMALL)
def test_each_pair_is_in_one_batch_of_an_epoch(count: int, batch_size: int, ranks: int, accumulate: int) -> None:
    batches = [batch for step in steps(costs_of(count), batch_size, ranks, accumulate) for batch in step]
    assert Counter(real_pairs(batches)) == Counter(range(count))
    assert all(1 <= len(batch.pairs) <= batch_size for batch in batches)


@few
@given(COUNTS, st.sampled_from([(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (1, 1, 8), (1, 8, 1)]))
def test_the_pairs_of_a_step_do_not_depend_on_how_it_is_split(count: int, split: tuple[int, int, int]) -> None:
    whole = [sorted(real_pairs(step)) for step in steps(costs_of(count), 8, 1, 1)]
    assert [sorted(real_pairs(step)) for step in steps(costs_of(count), *split)] == whole


@few
@given(COUNTS, SMALL, SMALL, SMALL)
def test_the_last_short_step_is_kept_and_is_the_only_short_one(
    count: int, batch_size: int, ranks: int, accumulate: int
) -> None:
    full = batch_size * ranks * accumulate
    sizes = [len(real_pairs(step)) for step in steps(costs_of(count), batch_size, ranks, accumulate)]
    assert sizes == [full] * (count // full) + [count % full] * (count % full > 0)


@few
@given(COUNTS, SMALL, SMALL, SMALL)
def test_ranks_have_equal_numbers_of_batches_and_len_says_how_many(
    count: int, batch_size: int, ranks: int, accumulate: int
) -> None:
    every = plans(costs_of(count), batch_size, ranks, accumulate)
    assert {len(list(plan)) for plan in every} == {len(every[0])}
    assert {len(plan) for plan in every} == {len(every[0])}


@few
@given(COUNTS, SMALL, SMALL, SMALL)
def test_a_batch_knows_the_pairs_of_its_step(count: int, batch_size: int, ranks: int, accumulate: int) -> None:
    for step in steps(costs_of(count), batch_size, ranks, accumulate):
        assert {batch.pairs_in_step for batch in step} == {len(real_pairs(step))}


@few
@given(COUNTS, SMALL, SMALL, SMALL)
def test_a_rank_runs_a_ghost_only_where_it_has_fewer_pairs_than_batches(
    count: int, batch_size: int, ranks: int, accumulate: int
) -> None:
    by_rank = [list(plan) for plan in plans(costs_of(count), batch_size, ranks, accumulate)]
    for batches in by_rank:
        for start in range(0, len(batches), accumulate):
            step = batches[start : start + accumulate]
            ghosts = [batch for batch in step if batch.ghost]
            assert len(ghosts) == max(0, len(step) - len(real_pairs(step)))
            assert all(len(ghost.pairs) == 1 for ghost in ghosts)


@few
@given(COUNTS, SMALL, SMALL, SMALL)
def test_with_equal_lengths_there_are_as_many_ghosts_as_there_are_batches_too_many(
    count: int, batch_size: int, ranks: int, accumulate: int
) -> None:
    for step in steps(np.full(count, 7), batch_size, ranks, accumulate):
        assert sum(batch.ghost for batch in step) == max(0, len(step) - len(real_pairs(step)))


def test_full_steps_have_no_ghost_and_a_last_pair_alone_has_one_on_each_idle_rank() -> None:
    *full, last = steps(costs_of(4 * 2 * 3 + 1), 2, 4, 3)
    assert not any(batch.ghost for step in full for batch in step)
    assert sorted(batch.ghost for batch in last) == [False, True, True, True]  # one micro-batch, not three


@few
@given(COUNTS, st.integers(0, 2**32), st.integers(0, 100))
def test_the_order_is_a_function_of_seed_and_epoch_alone(count: int, seed: int, epoch: int) -> None:
    costs = costs_of(count)
    fresh = plans(costs, 2, 1, 1, seed)[0]
    fresh.set_epoch(epoch)
    used = plans(costs, 2, 1, 1, seed)[0]
    for earlier in range(epoch % 3):
        used.set_epoch(earlier)
        list(used)
    np.random.seed(epoch)  # the global state has no say
    used.set_epoch(epoch)
    assert list(fresh) == list(used)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        tuple(np.concatenate([batch.pairs for batch in plans(costs_of(64), 1, 1, 1, seed)[0].batches(epoch)]))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_without_shuffling_steps_follow_the_pairs_in_every_epoch() -> None:
    plan = BatchPlan(costs_of(10), 4)
    for epoch in (0, 1):
        plan.set_epoch(epoch)
        assert [batch.pairs for batch in plan] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]


@few
@given(COUNTS, SMALL, SMALL, SMALL, st.integers(0, 3), st.data())
def test_resuming_gives_the_rest_of_its_epoch_and_the_next_one_whole(
    count: int, batch_size: int, ranks: int, accumulate: int, epoch: int, data: st.DataObject
) -> None:
    for uninterrupted, resumed in zip(
        plans(costs_of(count), batch_size, ranks, accumulate),
        plans(costs_of(count), batch_size, ranks, accumulate),
        strict=True,
    ):
        done = data.draw(st.integers(0, len(resumed)))
        resumed.resume(epoch, done)
        for current, left_out in ((epoch, done), (epoch + 1, 0)):
            uninterrupted.set_epoch(current)
            resumed.set_epoch(current)
            assert list(resumed) == list(uninterrupted)[left_out:]


@few
@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 8), st.integers(0, 3))
def test_dealing_fills_no_bin_beyond_its_capacity_and_loses_nothing(costs: list[int], bins: int, spare: int) -> None:
    capacity = max(1, -(-len(costs) // bins) + spare)
    dealt = deal(costs, bins, capacity)
    assert len(dealt) == bins
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(costs)))
    assert all(len(content) <= capacity for content in dealt)
    assert all(content.tolist() == sorted(content.tolist()) for content in dealt)


@few
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_with_room_enough_the_heaviest_bin_is_within_one_item_of_the_mean(costs: list[int], bins: int) -> None:
    heaviest = max(sum(costs[item] for item in content) for content in deal(costs, bins, len(costs)))
    assert heaviest <= sum(costs) / bins + max(costs)  # the last item went to a bin no heavier than the mean
    if len(costs) <= bins:
        assert heaviest == max(costs)


@few
@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 8), st.integers(0, 3))
def test_each_item_goes_to_the_first_of_the_lightest_bins_with_room(costs: list[int], bins: int, spare: int) -> None:
    capacity = max(1, -(-len(costs) // bins) + spare)
    expected: list[list[int]] = [[] for _ in range(bins)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        roomy = [content for content in expected if len(content) < capacity]
        min(roomy, key=lambda content: sum(costs[other] for other in content)).append(item)
    assert [content.tolist() for content in deal(costs, bins, capacity)] == [sorted(content) for content in expected]


def test_at_eight_pairs_a_rank_the_slowest_of_a_thousand_carries_little_more_than_the_mean() -> None:
    costs = np.minimum(costs_of(8 * 1024), 1024)  # as max_length leaves them
    loads = [costs[content].sum() for content in deal(costs, 1024, 8)]
    assert max(loads) / np.mean(loads) <= 1.10


def test_at_eight_pairs_a_rank_the_slowest_of_eight_carries_little_more_than_the_mean() -> None:
    ratios = []
    for seed in range(50):
        costs = costs_of(64, seed)
        loads = [costs[content].sum() for content in deal(costs, 8, 8)]
        ratios.append(max(loads) / np.mean(loads))
    assert np.mean(ratios) <= 1.05


@pytest.mark.parametrize("ranks", [2, 8])
def test_balanced_ranks_wait_less_than_ranks_dealt_in_turn(ranks: int) -> None:
    waits = {"dealt": 0.0, "in turn": 0.0}
    for seed in range(50):
        costs = costs_of(ranks * 8, seed)
        waits["dealt"] += max(costs[content].sum() for content in deal(costs, ranks, 8))
        waits["in turn"] += max(costs[rank::ranks].sum() for rank in range(ranks))
    assert waits["dealt"] < 0.9 * waits["in turn"]
