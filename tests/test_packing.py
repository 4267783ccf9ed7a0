"""The layouts, against rules that are written with lists and loops.

Every token of a test has an id of its own, so that a token is known wherever it is laid out. The oracle is the answer's
own sequence, prompt and answer one after the other: what a token sees is what stands before it there.

Legend: B pairs  R rows  T tokens a row  N answer tokens
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_lightning.data.packing import LAYOUTS, Layout, PreferenceBatch, fill_rows, pack, visible
from dpo_lightning.data.tokenization import TokenPair

laws = settings(deadline=None, max_examples=60)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@st.composite
def drawn_pairs(draw: st.DrawFn) -> list[TokenPair]:
    """1 to 5 pairs, with or without rejected answers; a prompt may be empty, an answer has a token at least."""
    supervised = draw(st.booleans())
    lengths = st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(1, 5))
    return token_pairs(draw(st.lists(lengths, min_size=1, max_size=5)), supervised)


def token_pairs(lengths: Sequence[tuple[int, int, int]], supervised: bool = False) -> list[TokenPair]:
    """Pairs of these lengths; ids count up from 1 over all of them."""
    pairs, next_id = [], 1
    for triple in lengths:
        parts = []
        for length in triple:
            parts.append(np.arange(next_id, next_id + length, dtype=np.int32))
            next_id += length
        pairs.append(TokenPair(parts[0], parts[1], None if supervised else parts[2]))
    return pairs


row_sizes = st.one_of(st.none(), st.integers(1, 60))


def sequences(pairs: Sequence[TokenPair]) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of every answer, in the answers' order: all chosen, then all rejected."""
    chosen = [(pair.prompt.tolist(), pair.chosen.tolist()) for pair in pairs]
    return chosen + [(pair.prompt.tolist(), pair.rejected.tolist()) for pair in pairs if pair.rejected is not None]


def tokens_by_tree(batch: PreferenceBatch) -> list[dict[int, list[int]]]:
    """Of every tree, its tokens by branch, in the order of the rows."""
    trees: dict[int, dict[int, list[int]]] = {}
    columns = (batch.tokens.flatten(), batch.tree.flatten(), batch.branch.flatten())
    for token, tree, branch in zip(*(column.tolist() for column in columns), strict=True):
        if tree >= 0:
            trees.setdefault(tree, {0: [], 1: [], 2: []})[branch].append(token)
    return list(trees.values())


@layouts
@laws
@given(pairs=drawn_pairs(), row_tokens=row_sizes)
def test_no_token_is_lost_or_doubled(layout: Layout, pairs: list[TokenPair], row_tokens: int | None) -> None:
    wanted = []
    for pair in pairs:
        prompt, chosen = pair.prompt.tolist(), pair.chosen.tolist()
        rejected = [] if pair.rejected is None else pair.rejected.tolist()
        if layout == "shared":
            wanted.append((prompt, chosen, rejected))
        else:
            wanted.append((prompt, chosen, []))
            if rejected:
                wanted.append((prompt, [], rejected))
    found = [(tree[0], tree[1], tree[2]) for tree in tokens_by_tree(pack(pairs, layout, row_tokens=row_tokens))]
    assert sorted(found) == sorted(wanted)


@layouts
@laws
@given(pairs=drawn_pairs(), row_tokens=row_sizes)
def test_rows_hold_whole_trees_and_padding_behind_them(
    layout: Layout, pairs: list[TokenPair], row_tokens: int | None
) -> None:
    batch = pack(pairs, layout, row_tokens=row_tokens)
    copies = [len(tree[0]) + len(tree[1]) + len(tree[2]) for tree in tokens_by_tree(batch)]
    homes: dict[int, int] = {}
    widths = []
    for row, (tree, tokens, positions) in enumerate(zip(batch.tree, batch.tokens, batch.positions, strict=True)):
        used = int((tree >= 0).sum())
        widths.append(used)
        assert (tree[:used] >= 0).all() and (tokens[:used] > 0).all()
        assert (tree[used:] == -1).all() and not tokens[used:].any() and not positions[used:].any()
        order = [t for i, t in enumerate(tree[:used].tolist()) if i == 0 or t != tree[i - 1]]
        assert len(order) == len(set(order))  # a tree is in one piece
        for t in order:
            assert homes.setdefault(t, row) == row  # and in one row
        if layout == "padded":
            assert len(order) == 1
    assert max(widths) == batch.tokens.shape[1] and min(widths) > 0
    if layout != "padded":
        assert max(widths) <= max(*copies, row_tokens or 0, 0)


@layouts
@laws
@given(pairs=drawn_pairs(), row_tokens=row_sizes)
def test_positions_restart_in_each_tree_and_both_answers_count_on_from_the_prompt(
    layout: Layout, pairs: list[TokenPair], row_tokens: int | None
) -> None:
    batch = pack(pairs, layout, row_tokens=row_tokens)
    place = {token: i for prompt, answer in sequences(pairs) for i, token in enumerate(prompt + answer)}
    for token, position, tree in zip(
        *(c.flatten().tolist() for c in (batch.tokens, batch.positions, batch.tree)), strict=True
    ):
        assert position == (place[token] if tree >= 0 else 0)


def seen_by_sequence(batch: PreferenceBatch, pairs: Sequence[TokenPair], window: int | None) -> Tensor:
    """`[R, T, T]` the oracle: a token sees those before it in its own sequence, the last `window` with itself."""
    before: dict[int, list[int]] = {}
    for prompt, answer in sequences(pairs):
        sequence = prompt + answer
        before |= {token: sequence[: i + 1] for i, token in enumerate(sequence)}
    if window is not None:
        before = {token: prefix[-window:] for token, prefix in before.items()}
    rows, width = batch.tokens.shape
    seen = torch.zeros(rows, width, width, dtype=torch.bool)
    for row in range(rows):
        tree, tokens = batch.tree[row].tolist(), batch.tokens[row].tolist()
        column = {(tree[i], tokens[i]): i for i in range(width) if tree[i] >= 0}  # a token once in a tree
        for (t, token), query in column.items():
            for other in before[token]:
                seen[row, query, column[t, other]] = True
    return seen


@layouts
@laws
@given(pairs=drawn_pairs(), row_tokens=row_sizes, window=st.one_of(st.none(), st.integers(1, 12)))
def test_a_token_sees_what_precedes_it_in_its_own_sequence_and_nothing_else(
    layout: Layout, pairs: list[TokenPair], row_tokens: int | None, window: int | None
) -> None:
    batch = pack(pairs, layout, row_tokens=row_tokens)
    seen = visible(batch, window)
    real = batch.tree >= 0
    queries = real[:, :, None]
    assert torch.equal(seen & queries, seen_by_sequence(batch, pairs, window))
    assert not (seen & ~queries & real[:, None, :]).any()  # padding sees no token
    assert seen.any(-1).all()  # and no query sees nothing, of which softmax would make NaN


@layouts
@laws
@given(pairs=drawn_pairs(), row_tokens=row_sizes)
def test_targets_are_the_answers_and_sources_hold_the_token_before(
    layout: Layout, pairs: list[TokenPair], row_tokens: int | None
) -> None:
    batch = pack(pairs, layout, row_tokens=row_tokens)
    wanted = [
        (previous, target, index)
        for index, (prompt, answer) in enumerate(sequences(pairs))
        for previous, target in list(zip((prompt + answer)[:-1], (prompt + answer)[1:], strict=True))[-len(answer) :]
    ]
    sources = batch.tokens.flatten()[batch.source]
    found = list(zip(sources.tolist(), batch.target.tolist(), batch.answer.tolist(), strict=True))
    assert found == wanted
    assert batch.num_pairs == len(pairs) and batch.num_answers == len(sequences(pairs))


@layouts
@laws
@given(pairs=drawn_pairs(), row_tokens=row_sizes)
def test_an_answer_is_read_out_of_its_own_tree_and_never_of_its_sibling(
    layout: Layout, pairs: list[TokenPair], row_tokens: int | None
) -> None:
    batch = pack(pairs, layout, row_tokens=row_tokens)
    trees, branches = batch.tree.flatten()[batch.source], batch.branch.flatten()[batch.source]
    homes = {}
    for tree, tokens in zip(batch.tree.flatten().tolist(), batch.tokens.flatten().tolist(), strict=True):
        homes.setdefault(tokens, set()).add(tree)
    for tree, branch, answer, target in zip(
        *(column.tolist() for column in (trees, branches, batch.answer, batch.target)), strict=True
    ):
        assert {tree} == homes[target]
        assert branch in (0, 1 if answer < batch.num_pairs else 2)


@laws
@given(pairs=drawn_pairs(), row_tokens=row_sizes)
def test_token_n_is_the_same_token_in_every_layout(pairs: list[TokenPair], row_tokens: int | None) -> None:
    shared, *others = (pack(pairs, layout, row_tokens=row_tokens) for layout in LAYOUTS)
    for other in others:
        assert torch.equal(other.target, shared.target) and torch.equal(other.answer, shared.answer)
        assert torch.equal(other.pair_ids, shared.pair_ids) and torch.equal(other.weights, shared.weights)
        assert (other.num_answers, other.num_tokens) == (shared.num_answers, shared.num_tokens)


@layouts
def test_an_empty_prompt_counts_its_answers_first_token_out(layout: Layout) -> None:
    batch = pack(token_pairs([(0, 3, 1), (0, 1, 2)]), layout)  # ids 1 2 3, 4 and 5, 6 7
    assert batch.target.tolist() == [2, 3, 7]
    assert batch.answer.tolist() == [0, 0, 3]
    assert batch.tokens.flatten()[batch.source].tolist() == [1, 2, 6]


@layouts
def test_a_batch_in_which_nothing_is_predicted_is_still_a_batch(layout: Layout) -> None:
    batch = pack(token_pairs([(0, 1, 1)]), layout)
    assert len(batch.source) == len(batch.target) == len(batch.answer) == 0
    assert batch.source.dtype == batch.target.dtype == batch.answer.dtype == torch.int64
    assert batch.num_answers == 2


def test_the_rejected_answers_window_does_not_reach_over_the_chosen_one() -> None:
    """Prompt 1 2 3, chosen 4 to 8, rejected 9: a window of 3 from 9 holds 2, 3 and 9, however long the chosen one."""
    batch = pack(token_pairs([(3, 5, 1)]), "shared")
    row = batch.tokens[0].tolist()
    assert [row[i] for i in visible(batch, 3)[0, row.index(9)].nonzero().flatten()] == [2, 3, 9]


@laws
@given(st.lists(st.integers(1, 20), min_size=1, max_size=15), st.integers(20, 50))
def test_rows_are_never_overfull_and_no_two_could_be_one(lengths: list[int], row_tokens: int) -> None:
    rows = fill_rows(lengths, row_tokens)
    assert Counter(item for row in rows for item in row) == Counter(range(len(lengths)))
    loads = sorted(sum(lengths[item] for item in row) for row in rows)
    assert loads[-1] <= row_tokens
    assert len(rows) == 1 or loads[0] + loads[1] > row_tokens


def test_the_shared_layout_needs_the_fewest_tokens() -> None:
    """8 tokens of prompt once instead of twice, and rows instead of padding."""
    pairs = token_pairs([(8, 4, 3), (2, 1, 1), (1, 2, 1)])
    size = {layout: pack(pairs, layout, row_tokens=15).tokens.numel() for layout in LAYOUTS}
    assert size["shared"] == 2 * 15  # 15 | 4 + 4
    assert size["packed"] == 3 * 15  # 12 + 3 | 11 + 3 | 3 + 2
    assert size["padded"] == 6 * 12


@layouts
def test_a_ghost_weighs_nothing_and_has_no_tokens(layout: Layout) -> None:
    pairs = token_pairs([(2, 3, 1), (4, 1, 2)])
    real, ghost = pack(pairs, layout), pack(pairs, layout, ghost=True)
    assert real.weights.tolist() == [1, 1] and ghost.weights.tolist() == [0, 0]
    assert real.num_tokens == 13 and ghost.num_tokens == 0  # prompts once, whatever the layout
    assert torch.equal(real.tokens, ghost.tokens) and torch.equal(real.source, ghost.source)


@layouts
def test_what_the_batch_is_told_it_keeps(layout: Layout) -> None:
    pairs = token_pairs([(2, 3, 1), (4, 1, 2)])
    default = pack(pairs, layout)
    assert default.pair_ids.tolist() == [0, 1] and default.pairs_in_step == 2
    told = pack(pairs, layout, pair_ids=np.array([70, 7]), pairs_in_step=32)
    assert told.pair_ids.tolist() == [70, 7] and told.pairs_in_step == 32


def test_supervised_pairs_lay_out_no_rejected_answer() -> None:
    pairs = token_pairs([(2, 3, 1), (4, 1, 2)], supervised=True)
    batch = pack(pairs, "shared")
    assert batch.num_answers == batch.num_pairs == 2 and batch.num_tokens == 10
    assert not (batch.branch == 2).any() and batch.answer.tolist() == [0, 0, 0, 1]


def test_a_batch_moves_whole() -> None:
    batch = pack(token_pairs([(2, 3, 1)]), "shared", pairs_in_step=5)
    moved = batch.to("meta")
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, Tensor):
            assert before.device.type == "cpu" and after.device.type == "meta"
            assert (after.shape, after.dtype) == (before.shape, before.dtype)
        else:
            assert after == before
    assert all(torch.equal(getattr(batch.to("cpu"), name), getattr(batch, name)) for name in ("tokens", "source"))
