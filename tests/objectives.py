"""What the tests of the objectives share: all losses, found by walking, pairs drawn at random, and a few scalars.

Legend: B pairs
"""

import importlib
import inspect
import math
import pkgutil
import random
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch

from dpo_lightning import objective
from dpo_lightning.errors import InputError
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.preference import PreferenceLoss, call

for found in pkgutil.iter_modules(objective.__path__, f"{objective.__name__}."):
    importlib.import_module(found.name)

#: Some are outside of any range that a field may have, some are inside.
FLOATS = (0.25, 0.05, 0.0, 1e-3, 0.45, 0.75, 1.0, 1.7)


def concrete(base: type) -> list[type]:
    """Every class that the package derives from `base` and that can be made, by name."""
    known, waiting = set(), [base]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        if cls.__module__.startswith("dpo_lightning.") and not inspect.isabstract(cls):
            known.add(cls)
    return sorted(known, key=lambda cls: cls.__name__)


def candidates(hint: Any) -> list[Any]:
    """Values of a field of this type, of which a class may refuse some, but not all.

    Raises:
        TypeError: if nobody has said yet what values such a field has.
    """
    if hint is bool:
        return [False, True]
    if hint is float:
        return list(FLOATS)
    if hint is NoneType:
        return [None]
    if get_origin(hint) in (Union, UnionType):
        return [value for part in get_args(hint) for value in candidates(part)]
    if get_origin(hint) is tuple:
        values = candidates(get_args(hint)[0])
        return list(pairwise(values))
    if inspect.isclass(hint) and concrete(hint):
        plain = [cls for cls in concrete(hint) if all(field.default is not MISSING for field in fields(cls))]
        return [cls() for cls in plain]
    raise TypeError(f"tests.objectives.candidates: add values for fields of type {hint}")


def field_types(cls: type) -> dict[str, Any]:
    """Name -> type of every field of a dataclass."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def make(cls: type, **options: Any) -> Any:
    """One of `cls` with these options; what has no default is the first candidate that it takes."""
    missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in options]
    if not missing:
        return cls(**options)
    for value in candidates(field_types(cls)[missing[0]]):
        try:
            return make(cls, **options, **{missing[0]: value})
        except InputError:
            continue
    raise TypeError(f"tests.objectives.make: {cls.__name__} takes no candidate for {missing[0]}")


def run(loss: PreferenceLoss, policy: PairLogps, reference: PairLogps | None, **state: float) -> torch.Tensor:
    """Losses `[B]`, with the state that is given and for the rest the one at the start."""
    values = {name: torch.tensor(value, dtype=policy.token_logps.dtype) for name, value in loss.initial_state.items()}
    values |= {name: torch.tensor(value, dtype=policy.token_logps.dtype) for name, value in state.items()}
    return call(loss, policy, reference, values)


def pair_logps(
    chosen: Sequence[Sequence[float]], rejected: Sequence[Sequence[float]], dtype: torch.dtype = torch.float64
) -> PairLogps:
    """Pairs whose answers have tokens of these log-probabilities; they take gradient."""
    tokens = [*chosen, *rejected]
    values = torch.tensor([value for answer in tokens for value in answer], dtype=dtype, requires_grad=True)
    places = torch.tensor([number for number, answer in enumerate(tokens) for _ in answer], dtype=torch.long)
    return PairLogps(values, places, num_pairs=len(chosen), num_answers=len(tokens))


def answers(chosen: Sequence[float], rejected: Sequence[float], dtype: torch.dtype = torch.float64) -> PairLogps:
    """Pairs whose answers have one token each, of these log-probabilities."""
    return pair_logps([[value] for value in chosen], [[value] for value in rejected], dtype)


@dataclass(frozen=True)
class Drawn:
    """Pairs as lists of lists, `[answer of pair][token]`, in nats: what an oracle loops over."""

    chosen: list[list[float]]
    rejected: list[list[float]]
    chosen_reference: list[list[float]]
    rejected_reference: list[list[float]]

    @property
    def policy(self) -> PairLogps:
        return pair_logps(self.chosen, self.rejected)

    @property
    def reference(self) -> PairLogps:
        return pair_logps(self.chosen_reference, self.rejected_reference)

    def __len__(self) -> int:
        return len(self.chosen)


def draw(seed: int, count: int = 6) -> Drawn:
    """Answers of 1 to 5 tokens between -3 and 0 nats."""
    generator = random.Random(seed)
    chosen, rejected = ([generator.randint(1, 5) for _ in range(count)] for _ in range(2))
    lists = [[[generator.uniform(-3, 0) for _ in range(n)] for n in lengths] for lengths in (chosen, rejected) * 2]
    return Drawn(*lists)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def log_sigma(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))
