"""A training starts anew with glibc told to keep no crumbs, since glibc asks for that before a process begins.

Between tensors, which begin at multiples of 64 bytes, glibc leaves crumbs of a few dozen bytes. Small pieces that are
freed, crumbs too, it keeps for a thread's next small requests, and where one lies in a crumb when the tensor beside it
goes, the place that is left is too small for another tensor of the same size. So a step of GPT-2 on a CPU took half a
gigabyte more than it held (benchmarks/NOTES.md).
"""

import contextlib
import os
import sys
from collections.abc import Mapping

VARIABLE, CACHE = "GLIBC_TUNABLES", "glibc.malloc.tcache_count"

#: Set in a process that was started anew, since not every system lets it have the other.
MARK = "DPO_LIGHTNING_STARTED_ANEW"


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What an environment lacks for a training; nothing where the C library is another, or has been told already."""
    try:
        glibc = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, OSError, ValueError):  # another system, another library
        glibc = None
    said = environment.get(VARIABLE, "")
    if not glibc or CACHE in said:
        return {}
    return {VARIABLE: ":".join([said, f"{CACHE}=0"] if said else [f"{CACHE}=0"])}


def start_anew() -> None:
    """Run this process's own command, `python -m dpo_lightning ...`, again in its place, once, if the environment lacks
    something. What another program runs, a debugger or a notebook, is left as it is.
    """
    words = sys.orig_argv[1:]
    command = words[words.index("-m") :] if "-m" in words else []
    options = words[: len(words) - len(command)]
    own = command[1:2] == ["dpo_lightning"] and all(word.startswith("-") for word in options)
    lacking = settings(os.environ)
    if own and lacking and MARK not in os.environ and sys.executable:
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(OSError):  # as it is, a training takes more memory, and is the same else
            os.execve(sys.executable, [sys.executable, *words], {**os.environ, **lacking, MARK: "1"})
