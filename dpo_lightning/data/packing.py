"""Token pairs -> one batch of rows, and which token may see which.

A pair is a tree: one prompt, two answers. A row holds one or more trees. Every token carries `(tree, branch)`: branch 0
is the prompt, 1 the chosen answer, 2 the rejected one; padding has tree -1. Positions restart in every tree and both
answers count on from the prompt's end. The three layouts differ only in what they lay out:

- `shared`: one tree a pair, the prompt once; trees packed into rows.
- `packed`: one tree an answer, each with its own copy of the prompt; trees packed into rows.
- `padded`: the trees of `packed`, each in a row of its own.

Legend: B pairs  R rows  T tokens a row  N answer tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from dpo_lightning.data.tokenization import TokenPair

Layout = Literal["shared", "packed", "padded"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
LayoutChoice = Literal["auto", "shared", "packed", "padded"]

PROMPT, CHOSEN, REJECTED = 0, 1, 2
PADDING = -1


class Span(NamedTuple):
    """Where a tree is in the flattened rows: from `start` its prompt, its first and its second answer, in tokens."""

    start: int
    prompt: int
    first: int
    second: int


@dataclass
class PreferenceBatch:
    """Rows of tokens and where in them the answers are.

    Args:
        tokens: `[R, T]` token ids; 0 in padding.
        positions: `[R, T]` position of each token in its own sequence; 0 in padding.
        tree: `[R, T]` tree of each token, numbered over the batch; -1 in padding.
        branch: `[R, T]` 0 prompt, 1 chosen, 2 rejected.
        source: `[N]` index into the flattened rows of the position that predicts each answer token.
        target: `[N]` the id of that token.
        answer: `[N]` which answer it belongs to: `i` is the chosen one of pair `i`, `B + i` its rejected one.
        read: `[S]` the places that `source` names, each once: a prompt's last token predicts two.
        pair_ids: `[B]` the pairs' ids: their places among all pairs of the split's
            sources, dropped ones too; in a stream each source counts for itself.
        weights: `[B]` 1, or 0 for a ghost: a pair that keeps an idle rank in step and counts for nothing.
        num_answers: `2 * B`, or `B` where no rejected answers were laid out.
        num_tokens: prompts once plus all answers, the tokens that the work needs, whatever the layout; ghosts are 0.
        pairs_in_step: pairs of the whole optimizer step, over all ranks and micro-batches: the mean's denominator.
        trees: where each tree is, in the order of the flattened rows.
        keys: `[K]` places in the flattened rows of what the sequences of queries see, one after another: a prompt with
            its first answer is one, which sees itself, the second answer another, which sees the prompt and itself.
        query_ends: `[S + 1]` where sequences end among all queries, 0 first.
        key_ends: `[S + 1]` where they end among all keys.
        reference_bits: `[N]` the bits of `reference_logps` as whole numbers, where these are known: Lightning casts
            whatever is a float in a batch to the precision of the weights, and bf16 would keep three digits of them.
    """

    tokens: Tensor
    positions: Tensor
    tree: Tensor
    branch: Tensor
    source: Tensor
    target: Tensor
    answer: Tensor
    read: Tensor
    pair_ids: Tensor
    weights: Tensor
    num_answers: int
    num_tokens: int
    pairs_in_step: int
    trees: tuple[Span, ...]
    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    reference_bits: Tensor | None = None

    @property
    def reference_logps(self) -> Tensor | None:
        """`[N]` the reference's log-probability of each answer token, in nats, where it is known."""
        if self.reference_bits is None:
            return None
        return self.reference_bits.view(torch.float64 if self.reference_bits.dtype == torch.int64 else torch.float32)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PreferenceBatch":
        """The same batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PreferenceBatch":
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> "PreferenceBatch":
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})

    @property
    def num_pairs(self) -> int:
        return len(self.pair_ids)


@dataclass(frozen=True)
class Tree:
    """One prompt and the answers that hang from it: `(branch, answer, ids)` each."""

    prompt: np.ndarray
    answers: tuple[tuple[int, int, np.ndarray], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(ids) for _, _, ids in self.answers)


def pack(
    pairs: Sequence[TokenPair],
    layout: Layout,
    *,
    pair_ids: Sequence[int] | None = None,
    row_tokens: int | None = None,
    ghost: bool = False,
    pairs_in_step: int | None = None,
) -> PreferenceBatch:
    """Lay pairs out in rows.

    Args:
        pairs: B token pairs; either all or none have a rejected answer.
        layout: `shared`, `packed` or `padded`.
        pair_ids: the pairs' ids; default 0 to B - 1.
        row_tokens: tokens a row may hold; the longest tree always fits, and is the default.
        ghost: the pairs have weight 0.
        pairs_in_step: default B.
    """
    trees = grow_trees(pairs, layout)
    longest = max(len(tree) for tree in trees)
    rows = [[tree] for tree in range(len(trees))]
    if layout != "padded":
        rows = fill_rows([len(tree) for tree in trees], max(longest, row_tokens or 0))
    shape = (len(rows), max(sum(len(trees[index]) for index in row) for row in rows))  # R, T
    tokens, positions, branch = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    tree = np.full(shape, PADDING, dtype=np.int64)
    readout: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # answer -> (source, target)
    spans: list[Span] = []
    for r, row in enumerate(rows):
        start = 0
        for index in row:
            length = len(trees[index])
            here = slice(start, start + length)
            tree[r, here] = index
            offset = r * shape[1] + start
            readout |= lay_out(trees[index], tokens[r, here], positions[r, here], branch[r, here], offset)
            spans.append(span(trees[index], offset))
            start += length
    # In the answers' order, wherever the rows put them: token n is the same token in every layout.
    source, target = (np.concatenate([readout[answer][i] for answer in sorted(readout)]) for i in (0, 1))
    answer = np.repeat(sorted(readout), [len(readout[answer][0]) for answer in sorted(readout)])
    pairwise = pairs[0].rejected is not None
    return PreferenceBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        tree=torch.from_numpy(tree),
        branch=torch.from_numpy(branch),
        source=torch.from_numpy(source),
        target=torch.from_numpy(target),
        answer=torch.from_numpy(answer),
        read=torch.from_numpy(np.unique(source)),
        pair_ids=torch.as_tensor(range(len(pairs)) if pair_ids is None else pair_ids, dtype=torch.int64),
        weights=torch.full((len(pairs),), 0.0 if ghost else 1.0),
        num_answers=len(pairs) * (2 if pairwise else 1),
        num_tokens=0 if ghost else sum(len(pair) for pair in pairs),
        pairs_in_step=len(pairs) if pairs_in_step is None else pairs_in_step,
        trees=tuple(spans),
        **{name: torch.from_numpy(values) for name, values in sequences(spans).items()},
    )


def grow_trees(pairs: Sequence[TokenPair], layout: Layout) -> list[Tree]:
    """The trees of a layout, in the pairs' order."""
    trees = []
    for i, pair in enumerate(pairs):
        answers = [(CHOSEN, i, pair.chosen)]
        if pair.rejected is not None:
            answers.append((REJECTED, len(pairs) + i, pair.rejected))
        groups = [answers] if layout == "shared" else [[answer] for answer in answers]
        trees += [Tree(pair.prompt, tuple(group)) for group in groups]
    return trees


def fill_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First fit, longest first: which items go into which row of at most `row_tokens`.

    At most 11/9 of the fewest rows possible, plus one (Johnson 1973).

    >>> fill_rows([5, 3, 4, 2], row_tokens=7)
    [[0, 3], [2, 1]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        row = next((r for r, free in enumerate(room) if free >= lengths[item]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(row_tokens)
        rows[row].append(item)
        room[row] -= lengths[item]
    return rows


def lay_out(
    tree: Tree, tokens: np.ndarray, positions: np.ndarray, branch: np.ndarray, offset: int
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Write one tree into its `[len(tree)]` slice of a row; `offset` is the slice's place in the flattened rows.

    Returns:
        answer -> `(source, target)`. The first token of an answer is predicted by the prompt's last; where
        the prompt is empty nothing predicts it, and it is counted out.
    """
    prompt = len(tree.prompt)
    tokens[:prompt] = tree.prompt
    positions[:prompt] = np.arange(prompt)
    readout = {}
    start = prompt
    for which, answer, ids in tree.answers:
        end = start + len(ids)
        tokens[start:end] = ids
        positions[start:end] = np.arange(prompt, prompt + len(ids))
        branch[start:end] = which
        source = np.arange(start - 1, end - 1)
        source[:1] = prompt - 1
        first = 0 if prompt else 1
        readout[answer] = (offset + source[first:], ids[first:].astype(np.int64))
        start = end
    return readout


def span(tree: Tree, start: int) -> Span:
    """Where a tree is that begins at `start` of the flattened rows."""
    first, second = (*(len(ids) for _, _, ids in tree.answers), 0)[:2]
    return Span(start, len(tree.prompt), first, second)


def sequences(trees: Sequence[Span]) -> dict[str, np.ndarray]:
    """The `keys`, `query_ends` and `key_ends` of a batch (see `PreferenceBatch`), as 32-bit integers.

    >>> found = sequences([Span(start=10, prompt=2, first=1, second=3)])
    >>> {name: values.tolist() for name, values in found.items()}
    {'keys': [10, 11, 12, 10, 11, 13, 14, 15], 'query_ends': [0, 3, 6], 'key_ends': [0, 3, 8]}
    """
    keys, queries, seen = [], [0], [0]
    for start, prompt, first, second in trees:
        middle = start + prompt + first
        keys.append(np.arange(start, middle))
        queries.append(prompt + first)
        seen.append(prompt + first)
        if second:
            keys += [np.arange(start, start + prompt), np.arange(middle, middle + second)]
            queries.append(second)
            seen.append(prompt + second)
    found = {"keys": np.concatenate(keys), "query_ends": np.cumsum(queries), "key_ends": np.cumsum(seen)}
    return {name: values.astype(np.int32) for name, values in found.items()}


def visible(batch: PreferenceBatch, window: int | None = None) -> Tensor:
    """Which key each query may see: `[R, T, T]` bool, `[row, query, key]`.

    Key k is visible to query q iff k <= q, both are in the same tree, and k is in the prompt or in q's own branch.
    With a sliding `window`, k must also be less than `window` positions back: positions, not row indices, because the
    rejected answer stands behind the chosen one in the row. Padding sees padding, so no query sees nothing.
    """
    same_tree = batch.tree[:, :, None] == batch.tree[:, None, :]
    same_branch = (batch.branch[:, None, :] == PROMPT) | (batch.branch[:, :, None] == batch.branch[:, None, :])
    causal = torch.ones(batch.tree.shape[1], batch.tree.shape[1], dtype=torch.bool, device=batch.tree.device).tril()
    seen = causal & same_tree & same_branch
    if window is not None:
        seen &= batch.positions[:, :, None] - batch.positions[:, None, :] < window
    return seen
