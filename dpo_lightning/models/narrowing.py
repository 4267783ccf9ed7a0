"""A frozen model's matrices in half precision, cast once and not in every forward.

Under autocast a linear layer casts its weights to half precision each time that it is called; of weights that are not
trained nothing is kept of that from one call to the next. A model that is never trained may have them cast for good:
the same bits come out, in half of the memory. What autocast leaves in single precision (embeddings, norms) stays so.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

#: Layers whose parameters are used in nothing but a matrix product, which autocast casts. No subclasses: a router of
#: experts may compute in single precision on purpose.
LINEAR = (nn.Linear, Conv1D)


def narrow(model: nn.Module, dtype: torch.dtype, score: Callable[[], Tensor]) -> set[str]:
    """Cast the linear layers of a frozen model for good, unless that changes what it computes.

    Args:
        model: without gradients. A matrix that is the embedding, too, is cast apart from it.
        dtype: of autocast.
        score: computes something of the model, under autocast, that depends on all of it.

    Returns:
        the names of the parameters that were cast; none where the model is as it was.
    """
    wanted = score()
    layers = [(name, module) for name, module in model.named_modules() if type(module) in LINEAR]
    wide = {name: (layer, dict(layer.named_parameters(recurse=False))) for name, layer in layers}
    for layer, parameters in wide.values():
        for name, parameter in parameters.items():
            setattr(layer, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    same = False
    try:
        same = torch.equal(score(), wanted)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # where autocast is off for a layer, its types no longer match
        pass
    finally:
        for layer, parameters in () if same else wide.values():
            for name, parameter in parameters.items():
                setattr(layer, name, parameter)
    if not same:
        return set()
    return {f"{place}.{name}" for place, (_, ps) in wide.items() for name, p in ps.items() if p.dtype != dtype}
