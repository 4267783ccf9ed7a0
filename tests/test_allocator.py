"""Memory that a step has freed is not given back, and what stays lies apart from what comes and goes."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dpo_lightning.training import allocator
from dpo_lightning.training.allocator import KeptMemory
from tests.conftest import RunCli

# Asked of Python, and not of the code that is tested, which would then skip its own faults.
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads /proc, and needs glibc's mallopt")

RESIDENT = """
import re, sys, torch
from dpo_lightning.training.allocator import keep_apart, keep_freed_memory
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
"""

#: Resident MB after a tensor of 400 MB was freed, over that before it was made.
FREED = (
    RESIDENT
    + """
if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resident()
made = torch.ones(100, 2**20)
del made
print(resident() - before)
"""
)

#: Resident MB after two steps over that before them: a step makes 300 MB in pieces and frees them, the first also makes
#: 100 MB that stay, a piece between each two of the others'; the second step's pieces are larger.
STEPS = (
    RESIDENT
    + """
assert keep_apart() if sys.argv[1] == "apart" else keep_freed_memory()
before, stays = resident(), []
for step, pieces in enumerate((300, 150)):
    made = []
    for _ in range(pieces):
        made.append(torch.ones(300 * 2**18 // pieces))
        if step == 0 and len(made) % 3 == 0:
            stays.append(torch.ones(2**18))
    del made
    if step == 0:
        assert keep_freed_memory()
print(resident() - before)
"""
)


def measured(script: str, word: str) -> float:
    done = subprocess.run([sys.executable, "-c", script, word], capture_output=True, text=True, check=True)
    return float(done.stdout)


@glibc
@pytest.mark.parametrize(("word", "least", "most"), [("keep", 380, 450), ("leave", -50, 50)])
def test_what_was_freed_stays_with_the_process(word: str, least: float, most: float) -> None:
    assert least < measured(FREED, word) < most


@glibc
def test_what_stays_leaves_no_gaps_where_it_was_made_apart() -> None:
    """All that is ever in use at once are 400 MB."""
    assert measured(STEPS, "apart") < 430
    assert measured(STEPS, "at once") > 450  # gaps into which the second step's pieces do not fit


class Calls(list[str]):
    """What the callback has asked of the C library, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        for name in ("keep_apart", "keep_freed_memory", "make_places"):
            monkeypatch.setattr(allocator, name, lambda name=name: self.append(name))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def module(needs_table: bool = False) -> SimpleNamespace:
    return SimpleNamespace(reference=SimpleNamespace(needs_table=needs_table))


def trainer(device: str, step: int = 0) -> SimpleNamespace:
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), global_step=step)


@pytest.mark.parametrize("begun_at", [0, 40])
def test_a_fit_keeps_what_it_frees_from_the_end_of_its_first_optimizer_step(calls: Calls, begun_at: int) -> None:
    kept = KeptMemory()
    kept.setup(trainer("cpu"), module(), "fit")
    kept.on_train_start(trainer("cpu", begun_at), module())
    kept.on_train_batch_end(trainer("cpu", begun_at))  # of a micro-batch that ends no step
    assert calls == ["keep_apart"]
    for step in (1, 2, 3):
        kept.on_train_batch_end(trainer("cpu", begun_at + step))
    assert calls == ["keep_apart", "keep_freed_memory", "make_places"]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_what_does_not_train_keeps_it_from_the_start(calls: Calls, stage: str) -> None:
    KeptMemory().setup(trainer("cpu"), module(), stage)
    assert calls == ["keep_freed_memory"]


def test_a_fit_that_scores_all_pairs_first_keeps_it_from_the_start(calls: Calls) -> None:
    KeptMemory().setup(trainer("cpu"), module(needs_table=True), "fit")
    assert calls == ["keep_freed_memory"]


def test_without_a_reference_nothing_is_scored(calls: Calls) -> None:
    KeptMemory().setup(trainer("cpu"), SimpleNamespace(reference=None), "fit")
    assert calls == ["keep_apart"]


def test_on_a_gpu_the_c_library_is_left_as_it_is(calls: Calls) -> None:
    kept = KeptMemory()
    kept.setup(trainer("cuda"), module(), "fit")
    kept.on_train_start(trainer("cuda"), module())
    kept.on_train_batch_end(trainer("cuda", 1))
    assert calls == []


def test_precompute_has_it(calls: Calls, run_cli: RunCli, toy_words: list[str]) -> None:
    done = run_cli("precompute", *toy_words)
    assert done.status == 0, done.err
    assert calls == ["keep_freed_memory"]


def test_the_command_line_has_it(calls: Calls, run_cli: RunCli, toy_words: list[str]) -> None:
    done = run_cli("fit", *toy_words, "--trainer.max_steps", 3)
    assert done.status == 0, done.err
    trained, validated = ["keep_apart", "keep_freed_memory", "make_places"], ["keep_freed_memory"]
    assert calls == trained + validated


@pytest.mark.parametrize("name", allocator.CAPACITY)
def test_onednn_keeps_few_products_unless_told_otherwise(
    name: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = allocator.CAPACITY
    for other in allocator.CAPACITY:
        monkeypatch.setenv(other, "")  # so that it is put back as it was
        monkeypatch.delenv(other)
    KeptMemory().setup(trainer("cuda"), module(), "fit")
    assert ours not in os.environ
    KeptMemory().setup(trainer("cpu"), module(), "fit")
    assert os.environ.pop(ours) == "192"
    monkeypatch.setenv(name, "7")
    KeptMemory().setup(trainer("cpu"), module(), "fit")
    assert {os.environ.get(ours, "7"), os.environ[name]} == {"7"}
