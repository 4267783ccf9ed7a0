"""What backward needs and a single pass makes again is made again there, to the bit, and not kept.

Autograd keeps what each operation's backward needs: of a feed-forward block its activation's input and its output, of a
layer norm its input and its output, and under autocast the copy in half precision of each matrix that is trained beside
the matrix. The second of each is one pass over the first. A step of GPT-2 in bf16 keeps two fifths less without it, and
takes by count some 2% longer (benchmarks/NOTES.md); checkpointing, which computes products again, too, takes less
memory yet and a third more time.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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

#: Who is told of what is kept.
TOLD: ContextVar[Callable[[Tensor], object] | None] = ContextVar("told", default=None)


@contextmanager
def computed_again(model: nn.Module) -> Iterator[None]:
    """Within, what a forward would keep for backward is left out where a single pass makes it again.

    Args:
        model: whose forward it is; of its layers none may be checkpointed, for what was computed in such a layer can be
            asked for once only.
    """
    epsilons = Epsilons(model)

    def keep(tensor: Tensor) -> Kept | Omitted:
        whole = tensor._base if tensor._is_view() else tensor
        untouched = whole._version == 0 and whole.is_contiguous() and whole.dtype == tensor.dtype
        recipe = recipe_of(whole.grad_fn, whole, epsilons) if untouched and whole.grad_fn is not None else None
        if recipe is not None:
            return Omitted(recipe, tensor.shape, tensor.stride(), tensor.storage_offset())
        if (tell := TOLD.get()) is not None:
            tell(tensor)
        # Detached, since a node that kept what it gave itself would keep itself.
        return Kept(tensor.detach(), tensor._version)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor_again()):
        yield


@contextmanager
def telling(tell: Callable[[Tensor], object]) -> Iterator[None]:
    """Within, each tensor that `computed_again` keeps is told of: hooks of autograd's around it do not hear of them."""
    token = TOLD.set(tell)
    try:
        yield
    finally:
        TOLD.reset(token)


@dataclass(frozen=True)
class Kept:
    """A tensor that is kept.

    Args:
        tensor: without its part in the graph.
        version: times that it had been changed in place.
    """

    tensor: Tensor
    version: int

    def tensor_again(self) -> Tensor:
        """Raises RuntimeError where it has been changed since, as autograd does where no hooks are."""
        if self.tensor._version != self.version:
            raise RuntimeError(f"a tensor {list(self.tensor.shape)} was changed in place between forward and backward")
        return self.tensor


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

    def tensor_again(self) -> Tensor:
        """Raises RuntimeError in a backward that is itself to be differentiated, for which nothing was kept."""
        if torch.is_grad_enabled():
            raise RuntimeError("what is computed again in backward has no second derivative")
        return self.recipe().as_strided(self.shape, self.strides, self.offset)


class Epsilons:
    """Of a model's layer norms, by their weights: a node of autograd has none.

    Args:
        model: whose layer norms are asked for.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if type(m) is nn.LayerNorm and m.weight is not None]
        self.whole = by_weight(module for module in norms if not isinstance(module.weight, DTensor))
        self.sharded = [module for module in norms if isinstance(module.weight, DTensor)]

    def of(self, weight: Tensor | None) -> float | None:
        """That of the norms with this weight; None where there are none, or they differ."""
        if weight is None:
            return None
        place, found = weight.data_ptr(), self.whole
        if place not in found:  # a sharded one is whole only while its layer computes
            found = by_weight(module for module in self.sharded if not isinstance(module.weight, DTensor))
        epsilons = found.get(place, set())
        return next(iter(epsilons)) if len(epsilons) == 1 else None


def by_weight(norms: Iterable[nn.LayerNorm]) -> dict[int, set[float]]:
    """Where a weight is -> the epsilons of the norms that have it."""
    found: dict[int, set[float]] = {}
    for module in norms:
        found.setdefault(module.weight.data_ptr(), set()).add(module.eps)
    return found


def recipe_of(node: Node, like: Tensor, epsilons: Epsilons) -> Recipe | None:
    """How to make again what an operation gave; None where that takes more than a pass, or more than is kept anyway.

    Args:
        node: of the operation.
        like: has the type and the device of what is to be made; nothing else of it is used.
        epsilons: of layer norms.
    """
    match node.name():
        case "GeluBackward0":
            return lambda: gelu(node._saved_self, approximate=node._saved_approximate)
        case "SiluBackward0":
            return lambda: silu(node._saved_self)
        case "MulBackward0" if is_gated(node):
            return lambda: node._saved_self * node._saved_other
        case "NativeLayerNormBackward0" if (epsilon := epsilons.of(node._saved_weight)) is not None:
            shape = node._saved_normalized_shape
            return lambda: layer_norm(node._saved_input, shape, node._saved_weight, node._saved_bias, epsilon)
        case "ToCopyBackward0":
            return cast_again(node, like, epsilons)
    return None


def is_gated(node: Node) -> bool:
    """Whether a product is one of a gated feed-forward block, and both its factors are kept: each the other's slope."""
    sources = [source for source, _ in node.next_functions]
    return None not in sources and any(source.name() in ACTIVATIONS for source in sources)


def cast_again(node: Node, like: Tensor, epsilons: Epsilons) -> Recipe | None:
    """In another type: a parameter, or what is made again itself, but for what was rounded on the way."""
    dtype, device = like.dtype, like.device
    ((source, _),) = node.next_functions
    if source.name() == "ViewBackward0":
        ((source, _),) = source.next_functions
    parameter = getattr(source, "variable", None)
    if parameter is not None:
        kept = Kept(parameter.detach(), parameter._version)
        return lambda: kept.tensor_again().to(device, dtype)
    inner = None if source.name() == node.name() else recipe_of(source, like, epsilons)
    return None if inner is None else lambda: inner().to(device, dtype)
