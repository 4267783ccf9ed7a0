"""Shares of several sources: exact in every epoch, no pair twice in one, and all pairs in turn over many.

Legend: sizes, the pairs of each source; share, a source's weight over the sum of all
"""

import json
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dpo_lightning.data.batching import BatchPlan, PlannedBatch
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.mixing import Mixture
from dpo_lightning.errors import InputError
from tests.tokenizers_built import byte_level

few = settings(max_examples=60, deadline=None)

#: Of two to four sources: their pairs and their weights, as anyone would write them.
SOURCES = st.lists(
    st.tuples(st.integers(1, 60), st.sampled_from([1, 2, 3, 0.1, 0.25, 0.3, 0.5, 0.7])), min_size=2, max_size=4
)


def numbers(sizes: Sequence[int], shuffled: bool = False) -> np.ndarray:
    """The number of each pair's source; one source after another, or in each other's midst."""
    sources = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(0).permutation(sources) if shuffled else sources


def wanted(sizes: Sequence[int], weights: Sequence[float]) -> list[Fraction]:
    """Pairs of each source in the longest epoch that has every share and no pair twice, in exact arithmetic."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    pairs = min(size / share for size, share in zip(sizes, shares, strict=True))
    return [share * pairs for share in shares]


def counts(sources: np.ndarray, pairs: np.ndarray, of: int) -> list[int]:
    return np.bincount(sources[pairs], minlength=of).tolist()


def usual(sizes: Sequence[int], weights: Sequence[float]) -> None:
    """Leave out weights that are too small to come at all."""
    assume(min(wanted(sizes, weights)) >= 1)


# An epoch


@few
@given(SOURCES, st.booleans(), st.integers(0, 5))
def test_each_source_has_its_share_of_an_epoch_to_a_pair_and_no_pair_comes_twice(
    drawn: list[tuple[int, float]], shuffled: bool, epoch: int
) -> None:
    sizes, weights = zip(*drawn, strict=True)
    usual(sizes, weights)
    sources = numbers(sizes, shuffled)
    mixture = Mixture(sources, weights, seed=0)
    pairs = mixture(epoch)
    found = counts(sources, pairs, len(sizes))
    exact = wanted(sizes, weights)
    assert all(0 <= share - count < 1 for share, count in zip(exact, found, strict=True)), (exact, found)
    assert any(count == size for count, size in zip(found, sizes, strict=True)), "the epoch could have been longer"
    assert len(set(pairs.tolist())) == len(pairs) == len(mixture)


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ((100, 100), (0.7, 0.3), [100, 42]),
        ((100, 10), (0.7, 0.3), [23, 10]),
        ((30, 30, 30), (1, 2, 3), [10, 20, 30]),
        ((7, 21), (0.1, 0.3), [7, 21]),  # 0.1 / 0.4 is no quarter in binary
        ((1, 9), (10, 90), [1, 9]),
    ],
)
def test_shares_that_anyone_can_reckon(sizes: tuple[int, ...], weights: tuple[float, ...], expected: list[int]) -> None:
    sources = numbers(sizes)
    assert counts(sources, Mixture(sources, weights, seed=3)(0), len(sizes)) == expected


@few
@given(SOURCES, st.integers(2, 1000))
def test_only_the_weights_proportions_count(drawn: list[tuple[int, float]], factor: int) -> None:
    sizes, weights = zip(*drawn, strict=True)
    usual(sizes, weights)
    one, other = (Mixture(numbers(sizes), w, seed=1) for w in (weights, [weight * factor for weight in weights]))
    for epoch in range(3):
        np.testing.assert_array_equal(one(epoch), other(epoch))


def test_sources_are_mixed_and_not_one_behind_the_other() -> None:
    sources = numbers((500, 500))
    for epoch in range(3):
        halves = np.array_split(Mixture(sources, (1, 1), seed=0)(epoch), 2)
        assert all(200 < counts(sources, half, 2)[0] < 300 for half in halves)


# From epoch to epoch


@few
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32))
def test_a_big_source_goes_round_and_round_each_pair_as_often_as_every_other(
    small: int, times: int, rounds: int, seed: int
) -> None:
    """Of a source that is a whole number of times as large as its part of an epoch."""
    sources = numbers((small, small * times))
    mixture = Mixture(sources, (1, 1), seed)
    seen = Counter(pair for epoch in range(times * rounds) for pair in mixture(epoch).tolist())
    assert {seen[pair] for pair in np.flatnonzero(sources == 1)} == {rounds}
    assert {seen[pair] for pair in np.flatnonzero(sources == 0)} == {times * rounds}


@pytest.mark.parametrize(("small", "big"), [(6, 10), (4, 10), (3, 11), (5, 6)])
def test_a_source_goes_on_with_other_pairs_until_all_have_come(small: int, big: int) -> None:
    """Also where its size is no whole number of parts: no pair is two times ahead of another."""
    sources = numbers((small, big))
    for seed in range(5):
        mixture, seen = Mixture(sources, (1, 1), seed), Counter(np.flatnonzero(sources == 1).tolist())
        for epoch in range(12):
            seen.update(pair for pair in mixture(epoch).tolist() if sources[pair] == 1)
            assert max(seen.values()) - min(seen.values()) <= 1, (seed, epoch, seen)


@few
@given(SOURCES, st.integers(0, 2**32), st.integers(0, 30))
def test_an_epoch_is_a_function_of_seed_and_epoch_alone(drawn: list[tuple[int, float]], seed: int, epoch: int) -> None:
    sizes, weights = zip(*drawn, strict=True)
    usual(sizes, weights)
    fresh, used = (Mixture(numbers(sizes), weights, seed) for _ in range(2))
    for earlier in range(epoch % 4):
        used(earlier)
    np.random.seed(epoch)  # the global state has no say
    np.testing.assert_array_equal(fresh(epoch), used(epoch))


def test_epochs_and_seeds_have_orders_and_parts_of_their_own() -> None:
    sources = numbers((20, 200))
    found = [Mixture(sources, (1, 1), seed)(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(pairs) for pairs in found}) == 4
    assert len({frozenset(pairs[sources[pairs] == 1].tolist()) for pairs in found}) == 4


# A limit


@pytest.mark.parametrize("most", [5, 9, 10, 33])
def test_a_limit_takes_the_first_of_each_source_in_their_shares_and_always_the_same(most: int) -> None:
    sources = numbers((40, 300, 50), shuffled=True)
    mixture = Mixture(sources, (0.5, 0.3, 0.2), seed=0, most=most)
    assert most - 3 < len(mixture) <= most
    for number, share in enumerate((0.5, 0.3, 0.2)):
        first = np.flatnonzero(sources == number)[: int(share * most + 1e-9)]
        for epoch in range(3):
            pairs = mixture(epoch)
            assert sorted(pairs[sources[pairs] == number].tolist()) == first.tolist()
    assert mixture(0).tolist() != mixture(1).tolist()


def test_a_limit_that_limits_nothing_changes_nothing() -> None:
    sources = numbers((10, 100))
    limited, free = Mixture(sources, (1, 1), seed=0, most=len(sources)), Mixture(sources, (1, 1), seed=0)
    for epoch in range(4):
        np.testing.assert_array_equal(limited(epoch), free(epoch))


# Weights that cannot be meant


@pytest.mark.parametrize(
    ("sizes", "weights", "most", "named"),
    [
        ((100, 100), (1000, 1), None, r"data\.weights: 1 for source 1 is less than one pair in an epoch of 100\b"),
        ((1, 100), (0.001, 1), None, r"data\.weights: 0\.001 for source 0 .* epoch of 100\b"),
        ((1, 100), (1, 0.001), None, r"data\.weights: 0\.001 for source 1 .* epoch of 1\b"),
        ((5, 5, 5), (1, 0.1, 1), None, r"data\.weights: 0\.1 for source 1 .* epoch of 10\b"),
        ((100, 100), (5, 1), 5, r"data\.weights: 1 for source 1 .* epoch of 5\b"),
    ],
)
def test_a_weight_too_small_for_one_pair_is_an_error_that_names_it(
    sizes: tuple[int, ...], weights: tuple[float, ...], most: int | None, named: str
) -> None:
    with pytest.raises(InputError, match=named):
        Mixture(numbers(sizes), weights, seed=0, most=most)


def test_a_source_without_a_pair_is_the_one_that_the_error_names() -> None:
    """As where all its prompts went to validation."""
    with pytest.raises(InputError, match="source 1"):
        Mixture(numbers((5, 0)), (1, 2), seed=0)


@pytest.mark.parametrize(
    ("sources", "weights", "named"),
    [
        ("a.jsonl", [1.0], "1 numbers for 1 sources"),
        (["a.jsonl"], [1.0], "1 numbers for 1 sources"),
        (["a.jsonl", "b.jsonl"], [1.0], "1 numbers for 2 sources"),
        (["a.jsonl", "b.jsonl"], [1.0, 1.0, 1.0], "3 numbers for 2 sources"),
        (["a.jsonl", "b.jsonl"], [], "0 numbers for 2 sources"),
        (["a.jsonl", "b.jsonl"], [1.0, 0.0], "above 0"),
        (["a.jsonl", "b.jsonl"], [1.0, -0.5], "above 0"),
        (["a.jsonl", "b.jsonl"], [1.0, float("nan")], "above 0"),
        (["a.jsonl", "b.jsonl"], [1.0, float("inf")], "above 0"),
    ],
)
def test_weights_are_as_many_numbers_above_0_as_there_are_sources(
    sources: str | list[str], weights: list[float], named: str
) -> None:
    with pytest.raises(InputError, match=named) as error:
        PreferenceDataModule(sources, weights=weights)
    assert "data.weights" in str(error.value)


# With the plan of batches


def plan(ranks: int = 1, rank: int = 0, batch_size: int = 4, accumulate: int = 1) -> BatchPlan:
    sources = numbers((12, 90))
    order = Mixture(sources, (2, 3), seed=5)
    return BatchPlan(
        1 + np.arange(len(sources)), batch_size, ranks=ranks, rank=rank, accumulate=accumulate, seed=5, order=order
    )


def pairs_of(batches: Sequence[PlannedBatch]) -> list[int]:
    return [pair for batch in batches if not batch.ghost for pair in batch.pairs]


@pytest.mark.parametrize(("ranks", "batch_size", "accumulate"), [(1, 8, 1), (2, 4, 1), (2, 2, 2), (4, 1, 2)])
def test_a_plan_deals_the_mixtures_pairs_in_its_order_however_a_step_is_split(
    ranks: int, batch_size: int, accumulate: int
) -> None:
    order = Mixture(numbers((12, 90)), (2, 3), seed=5)
    plans = [plan(ranks, rank, batch_size, accumulate) for rank in range(ranks)]
    for epoch in range(2):
        by_rank = [list(one.batches(epoch)) for one in plans]
        assert {len(batches) for batches in by_rank} == {len(plans[0])}
        for number, start in enumerate(range(0, len(order), 8)):
            here = slice(number * accumulate, (number + 1) * accumulate)
            found = sorted(pair for batches in by_rank for pair in pairs_of(batches[here]))
            assert found == sorted(order(epoch)[start : start + 8].tolist())


@pytest.mark.parametrize("done", [0, 1, 4, 8])
def test_a_resumed_mixture_goes_on_with_the_rest_of_its_epoch(done: int) -> None:
    for epoch in (0, 3):
        resumed = plan()
        resumed.resume(epoch, done)
        whole = list(plan().batches(epoch))
        assert len(whole) == 8 and list(resumed) == whole[done:]
        resumed.set_epoch(epoch + 1)
        assert list(resumed) == list(plan().batches(epoch + 1))


# From files


def test_the_option_mixes_files_by_their_weights_and_what_validates_keeps_out(tmp_path: Path) -> None:
    sources = []
    for name, count in (("a", 40), ("b", 200)):
        rows: list[dict[str, Any]] = [
            {"prompt": f"{name} {i}?", "chosen": f" Yes {i}.", "rejected": f" No {i}."} for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(str(tmp_path / f"{name}.jsonl"))
    data = PreferenceDataModule(sources, weights=[1, 3], val_fraction=0.1, max_train_pairs=40)
    data.compile(byte_level(), None)
    mixture = data._mixture()
    of = np.asarray(data.tables["train"]["source"][:])
    assert counts(of, mixture(0), 2) == [10, 30]
    assert len(data.tables["val"]) == 24 and data.on_both_sides() == 0
