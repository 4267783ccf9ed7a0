"""Which token sees which, as a model is told of it: tree by tree, by a mask, or by rows.

A tree needs three things of a model: that its attention can be told what to see, that positions come from
`position_ids`, and that nothing else mixes tokens. Tree by tree is the quickest: every query meets only the keys of its
own tree, there is no mask over whole rows, and a row may hold all trees, so that none is padded. A model whose
attention is its own gets a 4-D mask.

Legend: R rows  T tokens a row  H heads  D head dimension  Q queries  K keys of a sequence
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_lightning.data.packing import PreferenceBatch, Span, visible
from dpo_lightning.models import products
from dpo_lightning.models.products import Blocks, causal_mask, quicker
from dpo_lightning.models.varlen import Sequences, agrees, half_of

#: What transformers knows `attend` as.
TREES = "preference_trees"

#: Kinds of layers that attention of trees is known for.
KINDS = {"full_attention", "sliding_attention"}


class Attention(Protocol):
    """What a layout hands to the decoder beside the tokens.

    Attributes:
        row_tokens: tokens of a row at most; None: as many as the batch's longest tree has.
    """

    row_tokens: int | None

    def __call__(self, batch: PreferenceBatch) -> dict[str, Any]: ...


class TreeAttention:
    """Tree by tree, all of them in one row: of a model with `attend` as its attention."""

    row_tokens: int | None = sys.maxsize

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.asked: set[int | None] = set()  # windows, by layers

    def __str__(self) -> str:
        return "tree by tree"

    def __call__(self, batch: PreferenceBatch) -> dict[str, Any]:
        # A 4-D mask is taken as it is, so that the model makes none of its own.
        nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.tokens.device)
        sizes = parts(batch.trees, batch.tokens.numel())
        trees = Trees(batch.trees, sizes, Sequences.of(batch), Blocks(batch.trees), self.asked)
        return {"attention_mask": nothing, "position_ids": batch.positions, "trees": trees}

    def fault(self) -> str | None:
        """What is wrong with the windows that layers have asked for so far, or None.

        A model may make its windows by masks alone, and then `attend` never hears of them.
        """
        wanted, kinds = windows_of(self.config), set(getattr(self.config, "layer_types", None) or ())
        if other := sorted(kinds - KINDS):
            return f"it has layers of another kind, {other[0]}"
        if self.asked != wanted:
            return f"its layers ask for attention windows of {in_words(self.asked)}, its config of {in_words(wanted)}"
        return None


def windows_of(config: PreTrainedConfig) -> set[int | None]:
    """The attention windows of a model's layers; None is the whole."""
    return set(windows_by_kind(config).values()) or {getattr(config, "sliding_window", None)}


def windows_by_kind(config: PreTrainedConfig) -> dict[str, int | None]:
    """The attention window of each kind of layer that a config names; empty where it names none."""
    window, kinds = getattr(config, "sliding_window", None), KINDS & set(getattr(config, "layer_types", None) or ())
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def in_words(windows: set[int | None]) -> str:
    """Some windows."""
    return " and ".join(sorted("all" if window is None else f"{window:,}" for window in windows)) or "none"


@dataclass(frozen=True)
class Trees:
    """Those of a batch, as all layers use them.

    Args:
        spans: where they are.
        parts: tokens of padding, first sequence and second answer of each, and of padding at the end.
        sequences: the same, for one kernel.
        blocks: the same, for attention that is written out.
        asked: the windows that layers ask for.
        masks: of a size that a layer has made: (queries, keys, window) -> mask.
    """

    spans: tuple[Span, ...]
    parts: list[int]
    sequences: Sequences
    blocks: Blocks
    asked: set[int | None]
    masks: dict[tuple[int, int, int | None], Tensor | None] = field(default_factory=dict)

    def at_once(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> bool:
        """Whether one kernel attends to all: on a GPU, in half precision, where it has agreed with the plain way."""
        if not on_gpu(query) or any(self.parts[::3]) or query.shape[-1] != value.shape[-1]:
            return False
        dtype = half_of(query)
        half = dtype in (torch.bfloat16, torch.float16)
        return half and agrees(query.device, dtype, query.shape[1], key.shape[1], query.shape[-1], window)

    def in_blocks(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> bool:
        """Whether attention is written out: in bf16, on a CPU that is quicker so, where it has agreed likewise."""
        if not query.is_cpu or any(self.parts[::3]) or query.shape[-1] != value.shape[-1]:
            return False
        heads, width = query.shape[1], query.shape[-1]
        if half_of(query) != torch.bfloat16 or heads * width < products.WIDTH or not quicker():
            return False
        return products.agrees(heads, key.shape[1], width, window)


def on_gpu(states: Tensor) -> bool:
    """Whether the kernel may be there."""
    return states.is_cuda


class MaskAttention:
    """The visibility rule as a 4-D mask, with the model's sliding windows in it, and the positions.

    A 4-D mask replaces the mask that the model would make, its sliding window included, so the window is put in here.
    Models that mix windowed and full layers take one mask per layer type.
    """

    row_tokens: int | None = None  # a mask grows with the square of the row

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        self.windows = windows_by_kind(config)
        self.window: int | None = getattr(config, "sliding_window", None)  # of every layer, where no kinds are named
        # Eager attention adds its mask to the scores, where True would count as 1.
        self.additive = dtype if config._attn_implementation == "eager" else None

    def __str__(self) -> str:
        return "by a mask"

    def __call__(self, batch: PreferenceBatch) -> dict[str, Any]:
        if self.windows:
            mask = {kind: self._mask(batch, window) for kind, window in self.windows.items()}
        else:
            mask = self._mask(batch, self.window)
        return {"attention_mask": mask, "position_ids": batch.positions}

    def _mask(self, batch: PreferenceBatch, window: int | None) -> Tensor:
        seen = visible(batch, window)[:, None]  # [R, 1, T, T]
        if self.additive is None:
            return seen
        bias = torch.zeros(seen.shape, dtype=self.additive, device=seen.device)
        return bias.masked_fill_(~seen, torch.finfo(self.additive).min)


class RowAttention:
    """One sequence a row, padded on the right: an ordinary 2-D mask, and positions are the indices."""

    row_tokens: int | None = None

    def __str__(self) -> str:
        return "by rows"

    def __call__(self, batch: PreferenceBatch) -> dict[str, Any]:
        return {"attention_mask": (batch.tree >= 0).long()}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    trees: Trees | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: tree by tree where there are trees, else as its `sdpa` does.

    A prompt and its first answer are one sequence, each token of which sees itself and what is before it. The second
    answer sees the prompt, and itself likewise.

    Args:
        module: the layer's.
        query: `[R, H, T, D]`; keys and values may have fewer heads.
        key: likewise.
        value: likewise.
        attention_mask: not looked at where there are trees.
        dropout: rate.
        scaling: of the scores.
        trees: of the batch; what is in none is padding.
        sliding_window: tokens that a query sees, itself included.

    Returns:
        `[R, T, H, D]`, 0 in padding; and nothing, where transformers may have weights.
    """
    if trees is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)

    trees.asked.add(sliding_window)

    def meet(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[1, Q, H, D]` of queries that are the last of their keys."""
        case = (query.shape[2], key.shape[2], sliding_window)
        if case not in trees.masks:
            trees.masks[case] = mask_of(*case, query)
        return sdpa_attention_forward(module, query, key, value, trees.masks[case], dropout, scaling, **others)[0]

    rows, heads, tokens, _ = query.shape
    sizes = trees.parts
    if rows == 1 and trees.at_once(query, key, value, sliding_window):
        return trees.sequences.attend(query, key, value, scaling, sliding_window), None
    if rows == 1 and not dropout and trees.in_blocks(query, key, value, sliding_window):
        return trees.blocks.attend(query, key, value, scaling, sliding_window), None
    # Split, not sliced: in backward each slice would be a tensor as large as the whole.
    queries, keys, values = (
        states.transpose(0, 1).flatten(1, 2)[None].split(sizes, dim=2) for states in (query, key, value)
    )
    found = []
    for number, tree in enumerate(trees.spans):
        padding, first, second = range(3 * number, 3 * number + 3)
        found.append(value.new_zeros(1, sizes[padding], heads, value.shape[-1]))
        found.append(meet(queries[first], keys[first], values[first]))
        if tree.second:
            seen = (torch.cat([s[first][:, :, : tree.prompt], s[second]], dim=2) for s in (keys, values))
            found.append(meet(queries[second], *seen))
    found.append(value.new_zeros(1, sizes[-1], heads, value.shape[-1]))
    return torch.cat(found, dim=1).view(rows, tokens, heads, -1), None


def parts(trees: Sequence[Span], tokens: int) -> list[int]:
    """Tokens of each part of the flattened rows: for each tree padding before it, prompt with first answer, second
    answer; and padding at the end.

    >>> parts([Span(0, 3, 2, 4), Span(10, 1, 1, 1)], tokens=15)
    [0, 5, 4, 1, 2, 1, 2]
    """
    found, end = [], 0
    for tree in trees:
        found += [tree.start - end, tree.prompt + tree.first, tree.second]
        end = tree.start + tree.prompt + tree.first + tree.second
    return [*found, tokens - end]


def mask_of(queries: int, keys: int, window: int | None, like: Tensor) -> Tensor | None:
    """What `sdpa` needs to be told of queries that are the last of the keys; None where it knows by itself."""
    plain = queries == keys and (window is None or window >= keys)
    return None if plain else causal_mask(queries, keys, window, like)


AttentionInterface.register(TREES, attend)
AttentionMaskInterface.register(TREES, sdpa_mask)
