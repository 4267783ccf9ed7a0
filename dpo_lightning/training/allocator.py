"""Memory that a training step has freed is kept for the next one, on a CPU.

glibc gives tensors of more than some KB back to the system as soon as they are freed, and the next ones are new pages
again, which the system clears: a sixth of a step of GPT-2 on a CPU in bf16. Kept from the start on, they would lie
between what stays, the weights and the optimizer's state, and larger ones would no longer fit into the gaps. So what is
made up to the end of the first step, where all that stays has been made, has pages of its own: a twelfth less memory
(benchmarks/NOTES.md).

oneDNN, which multiplies bf16, compiles a product for each shape and keeps a thousand of them, half a megabyte each. No
step has as many tokens as another, so that it would keep those of fifty steps, in the midst of what comes and goes.

Small pieces lie in the midst, too, wherever there is room. They are given places of their own beforehand, which are
taken first where glibc keeps no crumbs (`dpo_lightning.heap`).
"""

import ctypes
import os
from functools import cache

from lightning import Callback, LightningModule, Trainer

#: glibc's names for what `mallopt` sets: malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_MXFAST = -1, -3, -4, 1

#: Bytes from which an allocation has pages of its own, and how many may: glibc's defaults. It would raise the first by
#: itself, and an earlier run of this process may have set the second to 0.
LARGE, MANY = 128 * 1024, 65_536

#: How many products oneDNN may keep, more than one step has; and where it looks for that when it makes its first.
PRODUCTS, CAPACITY = 192, ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")

#: Bytes of small pieces, as glibc rounds them, and how many of each have a place: 4 MB in all.
SIZES, PLACES = range(24, 136, 16), 5_000


def keep_apart() -> bool:
    """Large allocations have pages of their own from now on, but for what fits into memory that was kept before.

    Returns:
        whether the C library can.
    """
    return mallopt({M_MMAP_THRESHOLD: LARGE, M_MMAP_MAX: MANY})


def keep_freed_memory() -> bool:
    """What is freed stays with the process from now on; whether the C library can."""
    return mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})


@cache
def make_places() -> None:
    """Once, frees small pieces between others that stay, so that no two of them ever become one place; and lets what is
    freed from now on become one with what is free beside it.
    """
    if not mallopt({M_MXFAST: 0}):
        return
    library = ctypes.CDLL(None)
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    places = []
    for size in SIZES:
        for _ in range(PLACES):
            places.append(library.malloc(size))
            library.malloc(SIZES[0])  # never freed
    for place in places:
        library.free(place)


def mallopt(settings: dict[int, int]) -> bool:
    """Settings of the C library's allocator; whether it took them."""
    try:
        function = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return False
    taken = [bool(function(name, value)) for name, value in settings.items()]  # all are tried
    return all(taken)


class KeptMemory(Callback):
    """On a CPU, keeps what is freed: where a run trains, from the end of its first optimizer step on; and less of what
    oneDNN has compiled, unless the environment says how much.

    Not where all pairs are scored before: that is long, and quicker with what it has freed.
    """

    def __init__(self) -> None:
        self.first: int | None = None  # optimizer steps before this run's; None where there is nothing to wait for

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.strategy.root_device.type == "cpu":
            if not os.environ.keys() & set(CAPACITY):
                os.environ[CAPACITY[0]] = str(PRODUCTS)
            scores = pl_module.reference is not None and pl_module.reference.needs_table
            (keep_apart if stage == "fit" and not scores else keep_freed_memory)()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.strategy.root_device.type == "cpu":
            self.first = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if self.first is not None and trainer.global_step > self.first:
            self.first = None
            keep_freed_memory()
            make_places()
