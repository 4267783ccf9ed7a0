"""What backward needs and a single pass makes again is made again there, to the bit, and not kept.

Autograd keeps what each operation's backward needs: of a feed-forward block its activation's input and its output, of a
layer norm its input and its output, and under autocast each matrix's copy in half precision beside the matrix. The
second of each is one pass over the first. A step of GPT-2 in bf16 keeps two fifths less without it, and takes some 2%
longer (benchmarks/NOTES.md); checkpointing, which computes products again, too, takes less memory yet and a third more
time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import gelu, layer_norm, silu

#: A node of autograd's graph: the backward of an operation, which has what that was given.
Node = Any

#: Computes again what an operation gave.
Recipe = Callable[[], Tensor]

#: Nodes of activations.
ACTIVATIONS = ("GeluBackward0", "SiluBackward0")

#: Those who are told of what is kept.
TOLD: list[Callable[[Tensor], object]] = []


@contextmanager
def computed_again(model: nn.Module) -> Iterator[None]:
    """Within, what a forward would keep for backward is left out where a single pass makes it again.

    Args:
        model: whose forward it is.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]

    def keep(tensor: Tensor) -> "Tensor | Omitted":
        whole = tensor._base if tensor._is_view() else tensor
        node = whole.grad_fn if whole.is_contiguous() else None
        recipe = None if node is None else recipe_of(node, whole.dtype, norms)
        if recipe is not None:
            return Omitted(recipe, tensor.shape, tensor.stride(), tensor.storage_offset())
        for tell in TOLD:
            tell(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, made):
        yield


@contextmanager
def telling(tell: Callable[[Tensor], object]) -> Iterator[None]:
    """Within, each tensor that `computed_again` keeps is told of: hooks of autograd's around it do not hear of them."""
    TOLD.append(tell)
    try:
        yield
    finally:
        TOLD.remove(tell)


@dataclass(frozen=True)
class Omitted:
    """A tensor that is not kept.

    Args:
        recipe: makes it again, or that of which it is a view.
        shape: its own, and so its strides and its offset.
        strides: in elements.
        offset: likewise.
    """

    recipe: Recipe
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


def made(kept: Tensor | Omitted) -> Tensor:
    """What was kept, or else is made again now.

    Raises:
        RuntimeError: in a backward that is itself to be differentiated, for which nothing was kept.
    """
    if isinstance(kept, Tensor):
        return kept
    if torch.is_grad_enabled():
        raise RuntimeError("what is computed again in backward has no second derivative")
    return kept.recipe().contiguous().as_strided(kept.shape, kept.strides, kept.offset)


def recipe_of(node: Node, dtype: torch.dtype, norms: Sequence[nn.LayerNorm]) -> Recipe | None:
    """How to make again what an operation gave; None where that takes more than a pass, or more than is kept anyway.

    Args:
        node: of the operation.
        dtype: of what it gave.
        norms: the model's.
    """
    match node.name():
        case "GeluBackward0":
            return lambda: gelu(node._saved_self, approximate=node._saved_approximate)
        case "SiluBackward0":
            return lambda: silu(node._saved_self)
        case "MulBackward0" if is_gated(node):
            return lambda: node._saved_self * node._saved_other
        case "NativeLayerNormBackward0":
            return norm(node, norms)
        case "ToCopyBackward0":
            return copy(node, dtype, norms)
    return None


def is_gated(node: Node) -> bool:
    """Whether a product is one of a gated feed-forward block, and both its factors are kept: each the other's slope."""
    sources = [source for source, _ in node.next_functions]
    return None not in sources and any(source.name() in ACTIVATIONS for source in sources)


def norm(node: Node, norms: Sequence[nn.LayerNorm]) -> Recipe | None:
    """Of a layer norm, which is found by its weight: a node has no epsilon."""
    weight = node._saved_weight
    epsilon = next((module.eps for module in norms if are_one(module.weight, weight)), None)
    if epsilon is None:
        return None
    shape = node._saved_normalized_shape
    return lambda: layer_norm(node._saved_input, shape, node._saved_weight, node._saved_bias, epsilon)


def are_one(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same memory; one that is sharded is none."""
    if one is None or other is None or isinstance(one, DTensor):
        return False
    return one.data_ptr() == other.data_ptr()


def copy(node: Node, dtype: torch.dtype, norms: Sequence[nn.LayerNorm]) -> Recipe | None:
    """In another type: of a weight, or of what is made again itself."""
    ((source, _),) = node.next_functions
    if source.name() == "ViewBackward0":
        ((source, _),) = source.next_functions
    weight = getattr(source, "variable", None)
    if weight is None:
        inner = recipe_of(source, dtype, norms)
        return None if inner is None else lambda: inner().to(dtype)
    version = weight._version

    def cast() -> Tensor:
        if weight._version != version:
            raise RuntimeError("a weight has changed between forward and backward")
        return weight.detach().to(dtype)

    return cast
