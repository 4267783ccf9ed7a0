"""A decoder's layers; and the last one's feed-forward block, computed where somebody reads it and nowhere else.

Of what the last layer makes of a prompt only its attention's keys and values are read: a prompt's hidden states behind
it predict nothing. So two thirds of that layer's products (8 of 12 in GPT-2, five sixths in Llama 3) need not be
computed for the prompt's tokens, in forward or backward: 2% of what a step of GPT-2 computes on human dialogues.

Legend: R rows  T tokens a row  S places that are read  D hidden
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

#: What most families of transformers call that block of a layer.
FEED_FORWARD = "mlp"


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers: the members of its longest list of modules.

    Every family has such a list; what transformers itself names for this, `_no_split_modules`, some lack and some name
    more than layers in.
    """
    lists = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=[]))


def last_feed_forward(model: PreTrainedModel) -> str:
    """The name in the model of the last layer's feed-forward block; empty where none has the usual name."""
    found = next((getattr(layer, FEED_FORWARD, None) for layer in blocks(model)[-1:]), None)
    return next((name for name, module in model.named_modules() if module is found), "")


def is_checkpointed(model: PreTrainedModel) -> bool:
    """Whether any of its layers is computed again in backward when it trains."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def only_at(block: nn.Module, places: Tensor) -> Iterator[None]:
    """Within, a block is computed at some places of what it is given, and gives 0 elsewhere.

    Args:
        block: `[R, T, D]` -> `[R, T, D]`, each place by itself.
        places: `[S]` among the flattened rows, each once.
    """
    shape = torch.Size()

    def take(_: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor]:
        nonlocal shape
        (states,) = given
        shape = states.shape
        return (states.flatten(0, 1).index_select(0, places)[None],)

    def put(_: nn.Module, __: object, found: Tensor) -> Tensor:
        return found.new_zeros(shape).flatten(0, 1).index_copy(0, places, found[0]).view(shape)

    handles = [block.register_forward_pre_hook(take), block.register_forward_hook(put)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
