"""Which token sees which, as a model is told of it: run by run, by a mask, or by rows.

A tree needs three things of a model: that its attention can be told what to see, that positions come from
`position_ids`, and that nothing else mixes tokens. Run by run is the quickest: every query meets only the keys of its
own tree, there is no mask over whole rows, and rows may be of any length, so that none needs padding. A model whose
attention is its own gets a 4-D mask.

Legend: R rows  T tokens a row  H heads  D head dimension  Q queries  K keys of a run
"""

import sys
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_lightning.data.packing import PreferenceBatch, Run, visible

#: What transformers knows `attend` as.
TREES = "preference_trees"


class Attention(Protocol):
    """What a layout hands to the decoder beside the tokens.

    Attributes:
        row_tokens: tokens of a row at most; None: as many as the batch's longest tree has.
    """

    row_tokens: int | None

    def __call__(self, batch: PreferenceBatch) -> dict[str, Any]: ...


class RunAttention:
    """Runs of queries and the keys that they see, in one row of all trees; a model with `attend` as its attention."""

    row_tokens: int | None = sys.maxsize

    def __str__(self) -> str:
        return "run by run"

    def __call__(self, batch: PreferenceBatch) -> dict[str, Any]:
        # A 4-D mask is taken as it is, so that the model makes none of its own.
        nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.tokens.device)
        return {"attention_mask": nothing, "position_ids": batch.positions, "runs": batch.runs}


class TreeAttention:
    """The visibility rule as a 4-D mask, with the model's sliding windows in it, and the positions.

    A 4-D mask replaces the mask that the model would make, its sliding window included, so the window is put in here.
    Models that mix windowed and full layers take one mask per layer type.
    """

    row_tokens: int | None = None  # a mask grows with the square of the row

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        window = getattr(config, "sliding_window", None)
        types = set(getattr(config, "layer_types", None) or ())
        self.windows: dict[str, int | None] = {
            kind: window if kind == "sliding_attention" else None
            for kind in types & {"full_attention", "sliding_attention"}
        }
        self.window: int | None = window  # of every layer, where the config names no types
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
    runs: tuple[Run, ...] | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: run by run where there are runs, else as its `sdpa` does.

    Args:
        module: the layer's.
        query: `[R, H, T, D]`; keys and values may have fewer heads.
        key: likewise.
        value: likewise.
        attention_mask: not looked at where there are runs.
        dropout: rate.
        scaling: of the scores.
        runs: of the batch, in the flattened rows; what is in none is padding.
        sliding_window: tokens that a query sees, itself included.

    Returns:
        `[R, T, H, D]`, 0 in padding; and nothing, where transformers may have weights.
    """
    if runs is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])  # R, T, H, D
    query, key, value = (states.transpose(0, 1).flatten(1, 2)[None] for states in (query, key, value))
    pieces, end = [], 0
    for run in runs:
        pieces.append(query.new_zeros(1, run.start - end, *shape[2:]))
        seen = mask_of(run, sliding_window, query.device)
        keys, values = (keys_of(run, states) for states in (key, value))
        states = query[:, :, run.start : run.stop]
        pieces.append(sdpa_attention_forward(module, states, keys, values, seen, dropout, scaling, **others)[0])
        end = run.stop
    pieces.append(query.new_zeros(1, shape[0] * shape[1] - end, *shape[2:]))
    return torch.cat(pieces, dim=1).view(shape), None


def keys_of(run: Run, states: Tensor) -> Tensor:
    """What a run sees of `[1, H, R * T, D]`: `[1, H, K, D]`, the prompt's first."""
    own = states[:, :, run.start : run.stop]
    if run.prompt_start == run.prompt_stop:
        return own
    return torch.cat([states[:, :, run.prompt_start : run.prompt_stop], own], dim=2)


def mask_of(run: Run, window: int | None, device: torch.device) -> Tensor | None:
    """`[1, 1, Q, K]`, which key each query of a run sees; None where it is all before it, and itself."""
    queries, prompt = run.stop - run.start, run.prompt_stop - run.prompt_start
    narrow = window is not None and window < prompt + queries
    if prompt == 0 and not narrow:
        return None
    seen = torch.ones(1, 1, queries, prompt + queries, dtype=torch.bool, device=device).tril(prompt)
    return seen.triu(prompt - window + 1) if narrow else seen


AttentionInterface.register(TREES, attend)
AttentionMaskInterface.register(TREES, sdpa_mask)
