"""Attention of all trees of a batch in one kernel, on a GPU in half precision.

A prompt with its first answer is one sequence of queries, the second answer another, whose keys are the prompt's
followed by its own. PyTorch's attention of sequences of various lengths has no mask: where a sequence has more keys
than queries these are its last, each of which sees what is before it. It is used only where it has agreed once, values
and gradients, with sequences computed one by one.

Legend: T tokens of all rows  K keys of all sequences  H heads  D head dimension  S sequences
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dpo_lightning.data.packing import Span

#: How much larger an error may be than that of attention one by one in the same precision, and what may always be.
FACTOR, SLACK = 3.0, 1e-3


@dataclass(frozen=True)
class Sequences:
    """Queries and keys of trees that follow one another without padding.

    Args:
        trees: in order.
        device: of what will be attended to.
    """

    trees: tuple[Span, ...]
    device: torch.device

    @cached_property
    def bounds(self) -> list[tuple[int, int, int, int]]:
        """`(prompt start, prompt end, start, end)` of each: the queries, and what of a prompt they see beside."""
        found = []
        for start, prompt, first, second in self.trees:
            middle = start + prompt + first
            found.append((start, start, start, middle))
            if second:
                found.append((start, start + prompt, middle, middle + second))
        return found

    @cached_property
    def keys(self) -> Tensor:
        """`[K]` places of the keys."""
        places = [torch.arange(*pair) for a, b, c, d in self.bounds for pair in ((a, b), (c, d))]
        return torch.cat(places).to(self.device)

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor, int, int]:
        """`[S + 1]` where sequences end among all queries, and all keys; the longest of either."""
        queries = [d - c for _, _, c, d in self.bounds]
        keys = [b - a + d - c for a, b, c, d in self.bounds]
        sums = (
            torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32) for lengths in (queries, keys)
        )
        return (*(s.to(self.device) for s in sums), max(queries), max(keys))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        """Attention of `[1, H, T, D]`, fewer heads in keys and values: `[1, T, H, D]`, in half precision."""
        device = query.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
        query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # [T, H, D]
        found = varlen_attn()(
            query.contiguous(),
            key.index_select(0, self.keys),
            value.index_select(0, self.keys),
            *self.ends,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return found[None]


def varlen_attn() -> Any:
    """PyTorch's kernel.

    Raises:
        ImportError: if this PyTorch has none.
    """
    return import_module("torch.nn.attention.varlen").varlen_attn


@cache
def agrees(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int, window: int | None
) -> bool:
    """Whether the kernel is there and computes what sequences one by one do, for heads of this shape."""
    trees = (Span(0, 70, 33, 90), Span(193, 5, 130, 0), Span(328, 64, 1, 64))
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, 457, width), (1, key_heads, 457, width), (1, key_heads, 457, width), (1, 457, heads, width))
    *states, slope = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    sequences = Sequences(trees, device)
    try:
        found = with_gradients(states, slope, lambda *s: sequences.attend(*s, None, window))
    except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    plain = with_gradients(states, slope, lambda *s: one_by_one(sequences, *s, window))
    exact = with_gradients([s.float() for s in states], slope.float(), lambda *s: one_by_one(sequences, *s, window))
    return all(
        (f - e).abs().max() <= FACTOR * (p - e).abs().max() + SLACK * e.abs().max()
        for f, p, e in zip(found, plain, exact, strict=True)
    )


def with_gradients(states: Sequence[Tensor], slope: Tensor, function: Any) -> list[Tensor]:
    """What a function makes of query, key and value, and its gradients along a slope, in fp32."""
    with torch.enable_grad(), torch.autocast(slope.device.type, enabled=False):
        leaves = [state.detach().requires_grad_() for state in states]
        found = function(*leaves)
        return [t.detach().float() for t in (found, *torch.autograd.grad((found * slope).sum(), leaves))]


def one_by_one(sequences: Sequences, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """The same, plainly: a mask for each sequence."""
    pieces = []
    for a, b, c, d in sequences.bounds:
        keys, values = (torch.cat([s[:, :, a:b], s[:, :, c:d]], dim=2) for s in (key, value))
        seen = torch.ones(d - c, b - a + d - c, dtype=torch.bool, device=query.device).tril(b - a)
        if window is not None:
            seen = seen.triu(b - a - window + 1)
        pieces.append(scaled_dot_product_attention(query[:, :, c:d], keys, values, attn_mask=seen, enable_gqa=True))
    return torch.cat(pieces, dim=2).transpose(1, 2)
