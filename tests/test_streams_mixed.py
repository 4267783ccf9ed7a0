"""Streams of several sources with weights: shares in every window, no pair twice in an epoch, and an end.

Legend: sizes, the usable pairs of each source; share, a source's weight over the sum of all
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.formats import all_pairs, triples
from dpo_lightning.data.streams import quotas
from dpo_lightning.errors import InputError
from tests.streamed import Pair, Row, pairs_of, plain, ranked, stream, tabled
from tests.tokenizers_built import byte_level, spell

few = settings(max_examples=100, deadline=None)


def parts(sizes: Sequence[int]) -> list[list[Row]]:
    """Rows of sources that are called a, b and so on; a bad one stands before the last of each."""
    return [plain(size + 1, name, bad=(size - 1,)) for size, name in zip(sizes, "abcd", strict=False)]


def names(pairs: Sequence[Pair]) -> list[str]:
    """The source that each pair is of, as its prompt says."""
    return [spell(byte_level(), prompt).decode()[0] for _, prompt, *_ in pairs]


def counts(pairs: Sequence[Pair], sizes: Sequence[int]) -> list[int]:
    found = Counter(names(pairs))
    return [found[name] for name in "abcd"[: len(sizes)]]


@pytest.mark.parametrize(
    ("sizes", "weights", "buffer", "window", "epoch"),
    [
        ((8, 40), (1, 3), 8, [2, 6], [8, 24]),
        ((40, 8), (3, 1), 8, [6, 2], [24, 8]),
        ((9, 40), (1, 3), 8, [2, 6], [9, 27]),  # the last window is a short one
        ((6, 9, 40), (1, 2, 2), 10, [2, 4, 4], [4, 9, 9]),
        ((30, 30), (0.5, 0.5), 12, [6, 6], [30, 30]),
        ((3, 40), (1, 1), 100, None, [3, 3]),  # a source that is smaller than its part of a window
        ((1, 40), (1, 3), 8, None, [1, 3]),
        ((5, 7), (1, 1), 1000, None, [5, 5]),
    ],
)
def test_each_source_has_its_share_of_every_window_until_the_first_is_exhausted(
    sizes: tuple[int, ...], weights: tuple[float, ...], buffer: int, window: list[int] | None, epoch: list[int]
) -> None:
    batches = stream(parts(sizes), weights, buffer=buffer)
    for _ in range(2):
        found = pairs_of(*batches)
        assert len(set(found)) == len(found)
        assert [abs(a - b) <= 1 for a, b in zip(counts(found, sizes), epoch, strict=True)] == [True] * len(sizes)
        assert any(a == b for a, b in zip(counts(found, sizes), sizes, strict=True)), "the epoch could be longer"
        for start in range(0, len(found) - buffer + 1, buffer):
            assert counts(found[start : start + buffer], sizes) == window


@pytest.mark.parametrize("weights", [(1, 1), (1, 4)])
def test_pairs_of_a_source_come_in_its_order_from_window_to_window(weights: tuple[float, ...]) -> None:
    """The next ones of each, with their ids, and dropped ones left out."""
    rows = [ranked(12, "a"), plain(40, "b", bad=(3, 4, 17))]
    expected = [tabled(rows[0], all_pairs).pairs, tabled(rows[1], triples).pairs]

    def either(row: Row) -> object:
        return all_pairs(row) if "responses" in row else triples(row)

    found = pairs_of(*stream(rows, weights, format=either, buffer=10))
    for name, pairs in zip("ab", expected, strict=True):
        mine = [pair for pair, source in zip(found, names(found), strict=True) if source == name]
        share = 10 * weights["ab".index(name)] // sum(weights)
        assert len(mine) > share
        for start in range(0, len(mine), share):
            window = mine[start : start + share]
            assert sorted(window) == pairs[start : start + len(window)]


@pytest.mark.parametrize(("most", "expected"), [(8, [2, 6]), (12, [3, 9]), (20, [5, 15]), (1000, [10, 30])])
def test_a_limit_keeps_the_shares_and_the_first_pairs(most: int, expected: list[int]) -> None:
    sizes = (10, 60)
    batches = stream(parts(sizes), (1, 3), most=most)
    first = set(pairs_of(*batches))
    assert counts(sorted(first), sizes) == expected
    assert set(pairs_of(*batches)) == first


def test_sources_are_mixed_within_a_window() -> None:
    found = names(pairs_of(*stream(parts((64, 64)), (1, 1), buffer=128)))
    assert all(16 < half.count("a") < 48 for half in (found[:64], found[64:]))


def test_a_weight_without_a_pair_in_a_window_is_an_error_that_names_it_and_not_a_source_that_never_comes() -> None:
    with pytest.raises(InputError, match=r"data\.weights: 1 for source 1"):
        list(stream(parts((40, 40)), (100, 1), buffer=8))


@few
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 500))
def test_quotas_are_whole_numbers_with_the_right_sum_each_within_one_of_its_share(
    weights: list[float], count: int
) -> None:
    shares = np.array(weights) / np.sum(weights)
    found = quotas(shares, count)
    assert sum(found) == count and min(found) >= 0
    assert all(abs(quota - share * count) < 1 + 1e-6 for quota, share in zip(found, shares, strict=True))
    nearest = sum(abs(quota - share * count) for quota, share in zip(found, shares, strict=True))
    for first in range(len(found)):  # no pair given to another source would be nearer
        for second in range(len(found)):
            if found[first]:
                other = list(found)
                other[first] -= 1
                other[second] += 1
                off = sum(abs(quota - share * count) for quota, share in zip(other, shares, strict=True))
                assert off >= nearest - 1e-6
