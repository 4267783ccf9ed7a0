"""The learning rate over a run: up from 0 in the warm-up, then down to 0 or not.

The formulas of `transformers.get_scheduler`, importing which imports all of transformers' trainer and peft.
"""

import math
from functools import partial
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["linear", "cosine", "constant"]


def schedule(name: Schedule, optimizer: Optimizer, warmup: int, total: int | None) -> LambdaLR:
    """The learning rate of each optimizer step.

    Args:
        name: what it does after the warm-up: falls linearly or as a cosine to 0, or stays.
        optimizer: with the highest rate.
        warmup: steps in which it rises.
        total: steps of the run; None where that is not known, which only a constant rate bears.
    """
    return LambdaLR(optimizer, partial(factor, name=name, warmup=warmup, total=total))


def factor(step: int, *, name: Schedule, warmup: int, total: int | None) -> float:
    """The share of the highest rate that a step has.

    >>> [factor(step, name="linear", warmup=2, total=6) for step in range(7)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup:
        return step / warmup
    if name == "constant":
        return 1.0
    if name == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
