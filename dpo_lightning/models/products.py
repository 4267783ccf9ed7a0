"""Attention of trees written out, on CPUs that multiply bf16 far quicker than PyTorch's attention for CPUs does.

That kernel multiplies bf16 as slowly as fp32 where a CPU has instructions for bf16 but no AMX, which is a quarter of a
step of GPT-2. oneDNN does not, and may be told to multiply what is in fp32 in bf16
(`torch.backends.mkldnn.matmul.fp32_precision`): queries, keys, values and the gradients of what they give come in bf16,
so that scores lose nothing by it; probabilities and scores' gradients are rounded when they are multiplied, as they are
in the kernel. All else is fp32.

A block of queries at a time meets the keys that it may see. Its scores stay in the CPU's caches and are made again in
backward, so that none are kept. It is used only where it has agreed once, values and gradients, with sequences
computed one by one.

Legend: T tokens of all trees  H heads  G heads of keys and values  D head dimension  Q queries of a block  K its keys
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_lightning.data.packing import Span
from dpo_lightning.models.varlen import TREES, as_one_by_one

#: Queries of a block: fewer make products that are slow, more compute scores that nobody sees. oneDNN compiles a
#: product for each shape, half a millisecond and half a megabyte, part of which it never gives back: so that they are
#: few, queries and keys are filled up to multiples of these with zeros, more keys to larger ones.
QUERIES, ROUND_QUERIES, ROUND_KEYS = 128, 32, 64

#: Width of all heads from which it is worth the calls. Not the trees' lengths: what a pair scores would depend on the
#: pairs beside it.
WIDTH = 512

#: Held while the process multiplies in another precision.
TOLD = RLock()


@cache
def quicker() -> bool:
    """Whether this is quicker on this machine than PyTorch's kernel: a CPU with instructions for bf16 but no AMX."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    told = hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision")
    return told and torch.backends.mkldnn.is_available() and bool(has.get("avx512_bf16")) and not has.get("amx_bf16")


@cache
def agrees(heads: int, key_heads: int, width: int, window: int | None) -> bool:
    """Whether what is written out is what sequences one by one compute, for heads of this shape, in bf16."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return Blocks(TREES).attend(query, key, value, None, window)

    shape = heads, key_heads, width
    return as_one_by_one("what is written out", attend, torch.device("cpu"), torch.bfloat16, shape, window)


class Block(NamedTuple):
    """Some queries that follow one another, and the keys that they may see, of which they are the last.

    Args:
        queries: where they are among all tokens.
        keys: where they are, one part after another.
        window: tokens that a query sees, itself included, where it does not see all that are before it.
    """

    queries: slice
    keys: tuple[slice, ...]
    window: int | None

    @property
    def sizes(self) -> tuple[int, int]:
        """Queries and keys."""
        return length(self.queries), sum(map(length, self.keys))

    @property
    def filled(self) -> tuple[int, int]:
        """Queries and keys, with what they are filled up with."""
        queries, keys = self.sizes
        return filled_up(queries, ROUND_QUERIES), filled_up(keys, max(ROUND_KEYS, 2 ** ((keys - 1).bit_length() - 3)))


def filled_up(count: int, step: int) -> int:
    return -(-count // step) * step


@dataclass(frozen=True)
class Blocks:
    """Those of a batch's trees, which follow one another without padding, as all layers use them.

    Args:
        trees: where they are.
        found: by window.
        masks: of a size that a layer has made.
    """

    trees: tuple[Span, ...]
    found: dict[int | None, list[Block]] = field(default_factory=dict)
    masks: dict[tuple[int, int, int, int, int | None], Tensor] = field(default_factory=dict)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        """Attention of `[1, H, T, D]`, G heads in keys and values, which are taken in bf16: `[1, T, H, D]`."""
        if window not in self.found:
            self.found[window] = blocks(self.trees, window)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = (states[0].to(torch.bfloat16) for states in (query, key, value))
        return WrittenOut.apply(query, key, value, self, self.found[window], scaling)[None]

    def mask(self, block: Block) -> Tensor:
        """What is added to the scores of the last keys of a block, before which all are seen."""
        (queries, keys), (all_queries, all_keys) = block.sizes, block.filled
        before = keys - queries if block.window is None else 0
        case = queries, keys - before, all_queries, all_keys - before, block.window
        if case not in self.masks:
            mask = torch.full(case[2:4], -math.inf, dtype=torch.float32)
            mask[:, 0] = 0  # of what is no query, which is read by nobody, so that it is a number
            mask[:queries, : keys - before] = causal_mask(queries, keys - before, block.window, mask)[0, 0]
            self.masks[case] = mask
        return self.masks[case]


def blocks(trees: Sequence[Span], window: int | None) -> list[Block]:
    """The queries of all trees, each once.

    A prompt with its first answer is one sequence, the second answer with the prompt before it another.

    >>> blocks([Span(0, 3, 2, 4)], None)
    [Block(queries=slice(0, 5, None), keys=(slice(0, 5, None),), window=None), \
Block(queries=slice(5, 9, None), keys=(slice(0, 3, None), slice(5, 9, None)), window=None)]
    """
    found = []
    for start, prompt, first, second in trees:
        found += blocks_of([(start, prompt + first)], prompt + first, window)
        found += blocks_of([(start, prompt), (start + prompt + first, second)], second, window)
    return found


def blocks_of(parts: Sequence[tuple[int, int]], queries: int, window: int | None) -> list[Block]:
    """Those of a sequence, given by where its parts start and how long they are; the last of its tokens ask."""
    tokens = sum(long for _, long in parts)
    found = []
    for a in range(tokens - queries, tokens, QUERIES):
        b = min(a + QUERIES, tokens)
        narrow = window is not None and window < b
        keys = cut(parts, max(0, a - window + 1) if narrow else 0, b)
        found.append(Block(*cut(parts, a, b), keys, window if narrow else None))
    return found


def cut(parts: Sequence[tuple[int, int]], a: int, b: int) -> tuple[slice, ...]:
    """Where the tokens `a` to `b` of a sequence are.

    >>> cut([(10, 3), (20, 5)], 1, 6)
    (slice(11, 13, None), slice(20, 23, None))
    """
    found, before = [], 0
    for start, long in parts:
        if (low := max(a - before, 0)) < (high := min(b - before, long)):
            found.append(slice(start + low, start + high))
        before += long
    return tuple(found)


def length(part: slice) -> int:
    return part.stop - part.start


class WrittenOut(torch.autograd.Function):
    """softmax(Q K' scaling + mask) V, block by block: query `[H, T, D]`, key and value `[G, T, D]` -> `[T, H, D]`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, all_of: Blocks, these: Sequence[Block], scaling: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.rest = all_of, these, scaling
        found = query.new_empty(query.shape[1], len(query), value.shape[-1])
        with multiplied_in_bf16():
            for block in these:
                queries, keys = filled(block, query, key)
                seen = probabilities(queries, keys, all_of.mask(block), scaling)
                put(found.transpose(0, 1), block, seen @ wide(value, block.filled[1], *block.keys))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        all_of, these, scaling = ctx.rest
        found = torch.empty_like(query)
        by_key, by_value = (torch.zeros_like(states, dtype=torch.float32) for states in (key, value))
        with multiplied_in_bf16():
            for block in these:
                queries, keys = filled(block, query, key)
                slopes, values = filled(block, slope.transpose(0, 1), value)
                seen = probabilities(queries, keys, all_of.mask(block), scaling)
                add(by_value, block, seen.mT @ slopes)
                by_score = torch.ops.aten._softmax_backward_data(slopes @ values.mT, seen, -1, torch.float32)
                put(found, block, (by_score @ keys).mul_(scaling))
                add(by_key, block, (by_score.mT @ queries).mul_(scaling))
        return found, by_key.to(key.dtype), by_value.to(value.dtype), None, None, None


def filled(block: Block, by_query: Tensor, by_key: Tensor) -> tuple[Tensor, Tensor]:
    """What belongs to a block's queries, `[G, H / G * Q, D]`, those that meet the same keys one after another, and to
    its keys, `[G, K, D]`.
    """
    queries, keys = wide(by_query, block.filled[0], block.queries), wide(by_key, block.filled[1], *block.keys)
    return queries.view(len(keys), -1, queries.shape[-1]), keys


def wide(states: Tensor, size: int, *parts: slice) -> Tensor:
    """Some of the tokens of `[H, T, D]` in fp32, one part after another, and zeros behind them: `[H, size, D]`, dense,
    as oneDNN takes them.
    """
    found = torch.empty(len(states), size, states.shape[-1], dtype=torch.float32)  # whatever the default is
    end = 0
    for part in parts:
        start, end = end, end + length(part)
        found[:, start:end] = states[:, part]
    found[:, end:] = 0
    return found


def probabilities(queries: Tensor, keys: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """How much each query sees of each key: `[G, H / G * Q, K]`."""
    scores = (queries @ keys.mT).mul_(scaling)
    scores.view(-1, len(mask), scores.shape[-1])[..., -mask.shape[-1] :] += mask
    return scores.softmax(dim=-1)


def put(total: Tensor, block: Block, states: Tensor) -> None:
    """What was found for a block's queries, `[G, H / G * Q, D]`, to where they are in `[H, T, D]`."""
    total[:, block.queries] = states.view(len(total), -1, states.shape[-1])[:, : length(block.queries)]


def add(total: Tensor, block: Block, states: Tensor) -> None:
    """What was found for a block's keys, `[G, K, D]`, to what there is of them in `[G, T, D]`."""
    end = 0
    for part in block.keys:
        start, end = end, end + length(part)
        total[:, part] += states[:, start:end]


@contextmanager
def multiplied_in_bf16() -> Iterator[None]:
    """Products of what is in fp32 are computed in bf16 by oneDNN, summed in fp32, where the CPU can; nothing else is.

    It holds for all threads of the process, of which one at a time may ask for it.
    """
    matmul = torch.backends.mkldnn.matmul
    with TOLD:
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            with torch.autocast("cpu", enabled=False):
                yield
        finally:
            matmul.fp32_precision = before


def causal_mask(queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    """What is added to the scores `[1, 1, Q, K]` of queries that are the last of the keys: 0, or minus infinity where a
    query does not see a key. Of the type and on the device of `like`.
    """
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)
    if window is not None:
        seen = seen.triu(keys - queries - window + 1)
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -math.inf)
