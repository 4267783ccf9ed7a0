"""A training starts anew where glibc has not been told what it is only told before a process begins."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping

import pytest

from dpo_lightning import heap
from dpo_lightning.heap import settings, start_anew

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such setting")

OFF = "glibc.malloc.tcache_count=0"

#: Resident MB that a second round of tensors takes beyond a first one, when that is gone but for the small pieces.
ROUNDS = """
import ctypes, re, torch
from dpo_lightning.training.allocator import keep_freed_memory, make_places
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
def tensors():
    made = []
    for _ in range(300):
        made.append(torch.ones(2**18))
        for size in range(24, 104, 16):
            library.malloc(size)
    return made
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
assert keep_freed_memory()
make_places()
made = tensors()
before = resident()
del made
made = tensors()
print(resident() - before)
"""


def environment(**further: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != heap.VARIABLE} | further


def run(code: str, *words: str, **further: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, env=environment(**further)
    )
    return done.stdout.strip()


@glibc
def test_settings_are_what_is_lacking() -> None:
    assert settings({}) == {"GLIBC_TUNABLES": OFF}
    assert settings({"GLIBC_TUNABLES": "glibc.malloc.perturb=1"}) == {"GLIBC_TUNABLES": f"glibc.malloc.perturb=1:{OFF}"}
    assert settings({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=3"}) == {}  # somebody knows better
    assert settings(settings({})) == {}


@pytest.mark.parametrize("fault", [ValueError, OSError, AttributeError])
def test_another_c_library_is_left_alone(fault: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def confstr(name: str) -> str:
        raise fault(name)

    monkeypatch.setattr(os, "confstr", confstr, raising=False)
    assert settings({}) == {}


@glibc
def test_a_process_starts_anew_once_with_the_same_words() -> None:
    code = "import os, sys; from dpo_lightning.heap import start_anew; start_anew(); print(os.getpid(), sys.argv[1:])"
    started = subprocess.Popen(
        [sys.executable, "-c", code, "a b", "--c"], stdout=subprocess.PIPE, text=True, env=environment()
    )
    out, _ = started.communicate(timeout=60)
    assert started.returncode == 0
    assert out.split("\n") == [f"{started.pid} ['a b', '--c']", ""]  # the same process, and once


@glibc
def test_where_it_cannot_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Mapping[str, str]] = []

    def execve(path: str, words: list[str], environment: Mapping[str, str]) -> None:
        asked.append(environment)
        raise PermissionError(path)

    monkeypatch.delenv(heap.VARIABLE, raising=False)
    monkeypatch.setattr(os, "execve", execve)
    start_anew()
    assert [environment[heap.VARIABLE] for environment in asked] == [OFF]
    monkeypatch.setenv(heap.VARIABLE, OFF)
    start_anew()
    assert len(asked) == 1


VERB = """
import os, runpy, sys
os.execve = lambda path, words, environment: print("anew", environment["GLIBC_TUNABLES"])
try: runpy.run_module("dpo_lightning", run_name="__main__")
except SystemExit as stop: print(stop.code)
"""


@glibc
@pytest.mark.parametrize(("words", "anew"), [(["fit", "--help"], True), (["--help"], False), (["nothing"], False)])
def test_of_all_verbs_it_is_fit(words: list[str], anew: bool) -> None:
    assert (f"anew {OFF}\n" in run(VERB, *words)) == anew


@glibc
def test_tensors_find_the_places_that_others_have_left() -> None:
    assert float(run(ROUNDS, GLIBC_TUNABLES=OFF)) < 30
    assert float(run(ROUNDS)) > 100
