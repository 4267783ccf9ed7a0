"""Memory that a training step has freed is kept for the next one.

glibc gives tensors of more than a few MB back to the system as soon as they are freed, and the next ones are new pages
again, which the system clears: a sixth of a step of GPT-2 on a CPU in bf16 (benchmarks/NOTES.md).
"""

import ctypes

#: glibc's names for what `mallopt` sets: malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """For the rest of this process; whether its C library can."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
