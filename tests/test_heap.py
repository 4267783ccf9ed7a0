"""A training starts anew where glibc has not been told what it is only told before a process begins."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

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
    left_out = {heap.VARIABLE, heap.MARK, "LD_PRELOAD"}
    return {name: value for name, value in os.environ.items() if name not in left_out} | further


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


#: Of a process that would become another one: what it would be, and how it ends where it goes on.
SHOWN = """
import os, runpy, sys
os.execve = lambda path, words, environment: print("replaced", words[1:], environment["GLIBC_TUNABLES"])
sys.orig_argv[1:] = sys.argv[1:]
sys.argv[1:] = sys.argv[sys.argv.index("WORDS") + 1 :]
sys.orig_argv.remove("WORDS")
try: runpy.run_module("dpo_lightning", run_name="__main__")
except SystemExit as stop: print(stop.code)
"""


@glibc
@pytest.mark.parametrize(
    ("before", "words", "anew"),
    [
        (["-m", "dpo_lightning"], ["fit", "--help"], True),
        (["-u", "-Xutf8", "-m", "dpo_lightning"], ["fit", "--help"], True),
        (["-m", "dpo_lightning"], ["--help"], False),
        (["-m", "dpo_lightning"], ["nothing", "fit"], False),
        (["-m", "pdb", "-m", "dpo_lightning"], ["fit", "--help"], False),
        (["/opt/debugger", "-m", "dpo_lightning"], ["fit", "--help"], False),
        (["-c", "import dpo_lightning"], ["fit", "--help"], False),
    ],
)
def test_it_is_the_command_fit_that_starts_anew(before: list[str], words: list[str], anew: bool) -> None:
    out = run(SHOWN, *before, "WORDS", *words)
    assert out.startswith(f"replaced {[*before, *words]} {OFF}\n") == anew
    assert ("replaced" in out) == anew


@glibc
def test_a_process_starts_anew_once_with_the_same_words(tmp_path: Path) -> None:
    """Even where what it lacks is lost on the way."""
    (tmp_path / "dpo_lightning").mkdir()
    for name in ("__init__.py", "heap.py"):
        (tmp_path / "dpo_lightning" / name).write_text((Path(heap.__file__).parent / name).read_text())
    (tmp_path / "dpo_lightning" / "__main__.py").write_text(
        "import os, sys\nprint(os.getpid(), os.environ.pop('GLIBC_TUNABLES', None), sys.argv[1:], flush=True)\n"
        "from dpo_lightning.heap import start_anew\nstart_anew()\n"
    )
    started = subprocess.Popen(
        [sys.executable, "-m", "dpo_lightning", "a b", "--c"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment(),
    )
    out, _ = started.communicate(timeout=60)
    assert started.returncode == 0
    lines = [f"{started.pid} {said} ['a b', '--c']" for said in (None, OFF)]  # the same process
    assert out.splitlines() == lines


@glibc
@pytest.mark.parametrize("fault", ["no leave", "no interpreter"])
def test_where_it_cannot_it_goes_on(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Mapping[str, str]] = []

    def execve(path: str, words: list[str], environment: Mapping[str, str]) -> None:
        asked.append(environment)
        raise PermissionError(path)

    monkeypatch.delenv(heap.VARIABLE, raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "dpo_lightning", "fit"])
    monkeypatch.setattr(os, "execve", execve)
    if fault == "no interpreter":
        monkeypatch.setattr(sys, "executable", None)
    start_anew()
    assert [environment[heap.VARIABLE] for environment in asked] == [OFF] * (fault == "no leave")


@glibc
def test_tensors_find_the_places_that_others_have_left() -> None:
    """Where the process knows no other C library's allocator."""
    assert float(run(ROUNDS, GLIBC_TUNABLES=OFF)) < float(run(ROUNDS)) / 3
