"""Attention of all trees of a batch in one kernel, on a GPU in half precision.

A prompt with its first answer is one sequence of queries, the second answer another, whose keys are the prompt's
followed by its own. PyTorch's attention of sequences of various lengths has no mask: where a sequence has more keys
than queries these are its last, each of which sees what is before it. It is used only where it has agreed once, values
and gradients, with sequences computed one by one.

Legend: T tokens of all rows  K keys of all sequences  H heads  D head dimension  S sequences
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention

from dpo_lightning.data.packing import PreferenceBatch, Span, sequences

#: How much larger an error may be than that of attention one by one in the same precision, and what may always be.
FACTOR, SLACK = 3.0, 1e-3

#: What is compared.
TREES = (Span(0, 70, 33, 90), Span(193, 5, 130, 0), Span(328, 64, 1, 64))


@dataclass(frozen=True)
class Sequences:
    """Sequences of queries that follow one another without padding, as a batch has them (see `PreferenceBatch`).

    Args:
        keys: `[K]`.
        query_ends: `[S + 1]`.
        key_ends: `[S + 1]`.
        longest: tokens of the longest sequence of queries, and of keys.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest: tuple[int, int]

    @classmethod
    def of(cls, batch: PreferenceBatch) -> "Sequences":
        """Those of a batch; nothing here waits for the device."""
        queries = max(max(tree.prompt + tree.first, tree.second) for tree in batch.trees)
        keys = max(tree.prompt + max(tree.first, tree.second) for tree in batch.trees)
        return cls(batch.keys, batch.query_ends, batch.key_ends, (queries, keys))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        """Attention of `[1, H, T, D]`, fewer heads in keys and values: `[1, T, H, D]`, in half precision."""
        dtype = half_of(query)
        query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # [T, H, D]
        found = varlen_attn()(
            query.contiguous(),
            key.index_select(0, self.keys),
            value.index_select(0, self.keys),
            self.query_ends,
            self.key_ends,
            *self.longest,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return found[None]


def half_of(states: Tensor) -> torch.dtype:
    """The precision in which attention is computed: that of autocast, where it is on."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


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

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = [torch.from_numpy(part).to(device) for part in sequences(TREES).values()]
        return Sequences(*parts, (135, 160)).attend(query, key, value, None, window)

    return as_one_by_one("one kernel for all trees", attend, device, dtype, (heads, key_heads, width), window)


def as_one_by_one(
    name: str,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    window: int | None,
) -> bool:
    """Whether attention of `TREES` computes what sequences one by one do, in values and gradients; if not, it is said.

    Args:
        name: of this way of attention.
        attend: query, keys and values `[1, H, T, D]` -> `[1, T, H, D]`.
        device: where.
        dtype: in what.
        shape: heads, heads of keys and values, D.
        window: as `one_by_one` has it.
    """
    heads, key_heads, width = shape
    # Wherever a model asks first: in a validation without gradients, or in a layer that is computed again in backward.
    with torch.inference_mode(False), saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        plainly = [(0, 0, 0, 103), (0, 70, 103, 193), (0, 0, 193, 328), (328, 328, 328, 393), (328, 392, 393, 457)]
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, n, 457, width) for n in (heads, key_heads, key_heads)] + [(1, 457, heads, width)]
        drawn = (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes)
        *states, slope = (tensor.to(device, dtype) for tensor in drawn)
        try:
            found = with_gradients(states, slope, attend)
        except torch.OutOfMemoryError:
            raise
        except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            # Not for this device, these heads or these options, or an older PyTorch: whichever, it is said.
            rank_zero_info(f"Attention: {name} is not used ({type(error).__name__}: {error})")
            return False
        plain = with_gradients(states, slope, lambda *s: one_by_one(plainly, *s, window))
        exact = with_gradients([s.float() for s in states], slope.float(), lambda *s: one_by_one(plainly, *s, window))
        same = all(
            bool((f - e).abs().max() <= FACTOR * (p - e).abs().max() + SLACK * e.abs().max())
            for f, p, e in zip(found, plain, exact, strict=True)
        )
        if not same:
            rank_zero_info(f"Attention: {name} is not used, since its values or gradients differ")
        return same


def with_gradients(states: Sequence[Tensor], slope: Tensor, function: Any) -> list[Tensor]:
    """What a function makes of query, key and value, and its gradients along a slope, in fp32."""
    with torch.enable_grad(), torch.autocast(slope.device.type, enabled=False):
        leaves = [state.detach().requires_grad_() for state in states]
        found = function(*leaves)
        return [t.detach().float() for t in (found, *torch.autograd.grad((found * slope).sum(), leaves))]


def one_by_one(
    bounds: Sequence[tuple[int, int, int, int]], query: Tensor, key: Tensor, value: Tensor, window: int | None
) -> Tensor:
    """The same, plainly, with a mask for each sequence: from the third number of its bounds to the fourth, which sees
    what is from the first to the second and itself.
    """
    pieces = []
    for a, b, c, d in bounds:
        keys, values = (torch.cat([s[:, :, a:b], s[:, :, c:d]], dim=2) for s in (key, value))
        seen = torch.ones(d - c, b - a + d - c, dtype=torch.bool, device=query.device).tril(b - a)
        if window is not None:
            seen = seen.triu(b - a - window + 1)
        pieces.append(scaled_dot_product_attention(query[:, :, c:d], keys, values, attn_mask=seen, enable_gqa=True))
    return torch.cat(pieces, dim=2).transpose(1, 2)
