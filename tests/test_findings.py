"""What `inspect` counts is what compiling, packing and plain loops over the rows give."""

from collections import Counter, defaultdict
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.batching import BatchPlan
from dpo_lightning.data.compiler import column
from dpo_lightning.data.findings import (
    BATCHES,
    PARTS,
    Lengths,
    cuts,
    layout_costs,
    length_bias,
    lengths_of,
    repetitions,
)
from dpo_lightning.data.packing import LAYOUTS, pack
from dpo_lightning.data.tokenization import TokenPair
from tests.test_datamodule import compiled, write
from tests.tokenizers_built import byte_level

few = settings(max_examples=40, deadline=None)
lengths = st.lists(st.tuples(*[st.integers(1, 30)] * 3), min_size=1, max_size=40)


def as_lengths(triples: list[tuple[int, int, int]]) -> Lengths:
    return Lengths(*np.array(triples).T)


@pytest.fixture
def uneven(tmp_path: Path) -> str:
    """60 rows of ASCII letters, of which no two tokens merge, so that a cut falls where it may."""
    draw = np.random.default_rng(0)
    most = dict(zip(PARTS, (("Q", 60), ("Z", 90), ("X", 40)), strict=True))
    rows = [
        {part: letter * int(draw.integers(1, limit)) + f"{i}" for part, (letter, limit) in most.items()}
        for i in range(60)
    ]
    return write(tmp_path / "rows.jsonl", rows)


@pytest.mark.parametrize("limit", [16, 33, 64, 150])
def test_a_limit_cuts_what_compiling_with_it_cuts(limit: int, uneven: str) -> None:
    whole, cut = (compiled(uneven, max_length=length, bad_rows=0.5) for length in (1000, limit))
    [found] = cuts(lengths_of(whole.tables.values()), [limit])
    assert not len(whole.ledger)
    dropped = {line["row"] for line in cut.ledger.to_pylist() if line["action"] == "dropped"}
    assert not dropped, "rows that a cut makes identical would have to be counted too"
    assert found.pairs == pytest.approx(sum(line["action"] == "cut" for line in cut.ledger.to_pylist()) / 60)
    tokens = [sum(column(t, f"{p}_tokens").sum() for t in data.tables.values() for p in PARTS) for data in (whole, cut)]
    assert found.tokens == pytest.approx(1 - tokens[1] / tokens[0])


@few
@given(triples=lengths, batch_size=st.integers(1, 9))
def test_a_layout_costs_the_tokens_of_the_rows_that_pack_lays_out(
    triples: list[tuple[int, int, int]], batch_size: int
) -> None:
    pairs = [TokenPair(*(np.ones(length, dtype=np.int64) for length in triple)) for triple in triples]
    prompt, chosen, rejected = np.array(triples).T
    found = layout_costs(prompt, [chosen, rejected], batch_size)
    plan = list(islice(BatchPlan(prompt + chosen + rejected, batch_size, shuffle=True).batches(0), BATCHES))
    for layout in LAYOUTS:
        packed = [pack([pairs[pair] for pair in batch.pairs], layout, row_tokens=10**6) for batch in plan]
        assert found[layout] == pytest.approx(sum(batch.tokens.numel() for batch in packed) / len(triples))
    assert found["needed"] == pytest.approx(sum(map(sum, triples)) / len(triples))


def test_one_answer_costs_what_its_rows_have() -> None:
    """Supervised rows."""
    prompt, chosen = np.array([3, 1, 2]), np.array([4, 4, 9])
    pairs = [TokenPair(np.ones(p), np.ones(c), None) for p, c in zip(prompt, chosen, strict=True)]
    for layout in LAYOUTS:
        assert layout_costs(prompt, [chosen], 3)[layout] * 3 == pack(pairs, layout, row_tokens=10**6).tokens.numel()


hashes = st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=14)


def as_table(rows: list[tuple[int, int, int]]) -> Dataset:
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return Dataset.from_dict({f"{part}_hash": values for part, values in zip(PARTS, columns, strict=True)})


@few
@given(rows=hashes)
def test_repetitions_are_those_that_comparing_all_rows_finds(rows: list[tuple[int, int, int]]) -> None:
    found = repetitions(as_table(rows)) if rows else None
    if found is None:
        return
    prompts, pairs = Counter(row[0] for row in rows), Counter(rows)
    assert {tuple(group) for group in found.prompts} == {
        tuple(i for i, row in enumerate(rows) if row[0] == prompt) for prompt, count in prompts.items() if count > 1
    }
    assert {tuple(group) for group in found.pairs} == {
        tuple(i for i, row in enumerate(rows) if row == pair) for pair, count in pairs.items() if count > 1
    }
    against: dict[int, set[int]] = defaultdict(set)
    for (i, one), (j, other) in combinations(enumerate(rows), 2):
        if one[0] == other[0] and one[1:] == other[:0:-1] and one[1] != one[2]:
            against[i].add(j)
            against[j].add(i)
    assert {row for group in found.contradictions for row in group} == set(against)
    assert [len(group) for group in found.prompts] == sorted(map(len, found.prompts), reverse=True)


@few
@given(triples=lengths)
def test_the_length_only_rule_is_as_right_as_asking_it_for_each_pair(triples: list[tuple[int, int, int]]) -> None:
    found = length_bias(as_lengths(triples))
    right = [1.0 if c > r else 0.5 if c == r else 0.0 for _, c, r in triples]
    assert found.accuracy == pytest.approx(np.mean(right))
    assert found.mean_difference == pytest.approx(np.mean([c - r for _, c, r in triples]))
    unequal = [c > r for _, c, r in triples if c != r]
    assert found.longer_wins == pytest.approx(np.mean(unequal) if unequal else 0.5)
    assert sum(pairs for _, _, pairs, _ in found.by_difference) == len(unequal)
    for least, most, pairs, share in found.by_difference:
        some = [c > r for _, c, r in triples if least <= abs(c - r) <= most]
        assert (pairs, share) == (len(some), pytest.approx(np.mean(some)))


def test_the_interval_of_the_rule_holds_the_truth_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        chosen = draw.random(400) < 0.6
        found = length_bias(as_lengths([(1, 5 if longer else 3, 4) for longer in chosen]))
        held += abs(found.accuracy - 0.6) <= found.error
    assert 0.91 < held / 300 < 0.985


def test_lengths_are_those_before_any_cut(uneven: str) -> None:
    whole, cut = (lengths_of(compiled(uneven, byte_level(), max_length=length).tables.values()) for length in (900, 40))
    for part in PARTS:
        np.testing.assert_array_equal(getattr(whole, part), getattr(cut, part))
    np.testing.assert_array_equal(whole.longest, whole.prompt + np.maximum(whole.chosen, whole.rejected))
