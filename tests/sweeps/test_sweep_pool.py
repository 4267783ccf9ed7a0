"""Runs at the same time: what they share out, how they end, and that no two sweeps share a folder."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dpo_lightning.commands import pool as pools
from dpo_lightning.commands import sweep
from dpo_lightning.commands.points import configured
from dpo_lightning.commands.pool import Devices, Going, Interruption, Pool, locked
from dpo_lightning.commands.runs import Run, launch
from dpo_lightning.errors import InputError
from tests.sweeps import BASE, Runs, grid, table

BETA = "model.loss.beta"


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, named: str | None = None) -> None:
    """A machine with so many GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)


# Shares


@pytest.mark.parametrize(("parallel", "most"), [(1, 1), (2, 2), (3, 3), (9, 4)])
def test_so_many_runs_go_on_at_once_as_asked_for_and_the_result_is_the_same(
    tmp_path: Path, runs: Runs, config: Path, parallel: int, most: int
) -> None:
    runs.looks = 3
    sweep.sweep([config], grid(tmp_path, f"{BETA}: [0.5, 0.1, 0.2, 0.4]"), tmp_path / "out", parallel)
    assert max(runs.going) == most
    assert sorted(runs.asked) == sorted((verb, beta) for beta in (0.5, 0.1, 0.2, 0.4) for verb in ("fit", "test"))
    assert [(row[BETA], row["test/kl"]) for row in table(tmp_path / "out")] == [
        (str(beta), str(1 / beta)) for beta in (0.5, 0.1, 0.2, 0.4)
    ]


@pytest.mark.parametrize("parallel", [0, -1])
def test_less_than_one_at_a_time_is_refused(tmp_path: Path, runs: Runs, config: Path, parallel: int) -> None:
    with pytest.raises(InputError, match="--parallel"):
        sweep.sweep([config], grid(tmp_path, f"{BETA}: 0.5"), tmp_path / "out", parallel)
    assert not (tmp_path / "out").exists()


def test_threads_are_divided_unless_somebody_has_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = [Devices(parallel).environment([]).get("OMP_NUM_THREADS") for parallel in (1, 2, 3, 20)]
    assert found == [None, "4", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert Devices(4).environment([])["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("trainer", "parallel", "expected"),
    [
        ({}, 2, 2),  # four GPUs between two
        ({"devices": "auto"}, 4, 1),
        ({"devices": -1}, 3, 1),
        ({"devices": 2}, 4, 2),
        ({"devices": "1"}, 2, 1),
        ({"devices": 8}, 2, 4),  # which Lightning will refuse
        ({"devices": 2, "accelerator": "cpu"}, 2, 0),
        ({"accelerator": "gpu"}, 9, 1),
        ({}, 1, 0),  # one at a time is Lightning's own business
    ],
)
def test_a_run_takes_the_gpus_of_its_config_or_its_part_of_all(
    monkeypatch: pytest.MonkeyPatch, trainer: dict[str, Any], parallel: int, expected: int
) -> None:
    gpus(monkeypatch, 4)
    assert Devices(parallel).needed({"trainer": trainer}) == expected


@pytest.mark.parametrize("devices", [[0, 1], "0,1", "2,"])
def test_devices_that_are_named_cannot_be_dealt_out_which_is_told_beforehand(
    tmp_path: Path, runs: Runs, config: Path, monkeypatch: pytest.MonkeyPatch, devices: object
) -> None:
    gpus(monkeypatch, 4)
    config.write_text(yaml.safe_dump(configured(BASE, {"trainer.accelerator": "gpu", "trainer.devices": devices})))
    with pytest.raises(InputError, match=r"trainer\.devices .* names devices"):
        sweep.sweep([config], grid(tmp_path, f"{BETA}: 0.5"), tmp_path / "out", 2)
    assert runs.asked == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("named", "own"), [(None, ["0", "1", "2", "3"]), ("4,5,6,7", ["4", "5", "6", "7"]), ("GPU-a,GPU-b,c,d", None)]
)
def test_no_gpu_is_given_to_two_runs_at_the_same_time(
    tmp_path: Path, runs: Runs, config: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, own: list[str] | None
) -> None:
    """Two GPUs a run, four in all: of three runs only two can go on."""
    gpus(monkeypatch, 4, named)
    config.write_text(yaml.safe_dump(configured(BASE, {"trainer.accelerator": "auto", "trainer.devices": 2})))
    runs.looks = 2
    sweep.sweep([config], grid(tmp_path, f"{BETA}: [0.1, 0.2, 0.3, 0.4, 0.5]"), tmp_path / "out", 3)
    assert max(runs.going) == 2 and len(runs.asked) == 10
    given = [environment["CUDA_VISIBLE_DEVICES"].split(",") for environment in runs.environments]
    assert all(len(names) == 2 for names in given)
    assert {name for names in given for name in names} == set(own or ["GPU-a", "GPU-b", "c", "d"])
    for first, second, going in zip(given, given[1:], runs.going[1:], strict=False):
        assert going == 1 or not set(first) & set(second) or first == second  # a test has its fit's own


def test_without_gpus_or_on_the_cpu_nothing_is_dealt_out(
    tmp_path: Path, runs: Runs, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count, accelerator in ((0, "auto"), (4, "cpu")):
        gpus(monkeypatch, count)
        config.write_text(yaml.safe_dump(configured(BASE, {"trainer.accelerator": accelerator})))
        sweep.sweep([config], grid(tmp_path, f"{BETA}: [0.1, 0.2]"), tmp_path / accelerator, 2)
    assert len(runs.environments) == 8
    assert not any("CUDA_VISIBLE_DEVICES" in environment for environment in runs.environments)


# Ends

#: A process with a child of its own, both of which ignore being asked to end; their numbers go to its log.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # which inherits that
print(os.getpid(), child.pid, flush=True)
time.sleep(60)
"""


def alive(number: int) -> bool:
    """Whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(family: list[int]) -> bool:
    """Whether all of these end; a killed process that nobody waits for takes a moment."""
    until = time.monotonic() + 5
    while any(map(alive, family)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, family))


def numbers(log: Path) -> list[int]:
    """What a stubborn process has written, once it has."""
    until = time.monotonic() + 30
    while len(log.read_text().split()) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    return [int(word) for word in log.read_text().split()]


@pytest.fixture
def stubborn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Pool, list[int]]]:
    monkeypatch.setattr(pools, "PATIENCE", 0.3)
    found = Pool(Devices(1))
    with (tmp_path / "log.txt").open("w") as log:
        process = launch([sys.executable, "-c", STUBBORN], log, os.environ, ())
    found.going.append(Going(Run({}, tmp_path / "run", False), process, []))
    yield found, numbers(tmp_path / "log.txt")
    pools.send(process, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_stopping_ends_every_process_and_their_children_even_those_that_do_not_listen(
    stubborn: tuple[Pool, list[int]],
) -> None:
    pool, family = stubborn
    assert len(family) == 2 and all(map(alive, family))
    begun = time.monotonic()
    pool.stop()
    assert time.monotonic() - begun < 20, "they were waited for"
    assert gone(family) and pool.going == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_being_interrupted_while_stopping_leaves_no_process_either(
    stubborn: tuple[Pool, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, family = stubborn

    def impatient(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pools.time, "sleep", impatient)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pool.stop()
    monkeypatch.undo()
    assert time.monotonic() - begun < 20
    assert gone(family)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_and_a_second_one_interrupts(sign: signal.Signals) -> None:
    found = signal.signal(sign, signal.SIG_DFL)  # who runs the tests in the background may ignore it
    try:
        with Interruption() as interruption:
            interruption.check()
            os.kill(os.getpid(), sign)
            with pytest.raises(KeyboardInterrupt):
                interruption.check()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), sign)
                time.sleep(1)
        assert signal.getsignal(sign) == signal.SIG_DFL
    finally:
        signal.signal(sign, found)


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            interruption.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_stops_a_sweep_before_its_next_run_and_what_was_finished_is_kept(
    tmp_path: Path, runs: Runs, config: Path
) -> None:
    points = grid(tmp_path, f"search: {{test: false}}\n{BETA}: [0.1, 0.2, 0.3]")
    write = runs.write

    def signalled(run: Path, verb: str, beta: float | None) -> None:
        write(run, verb, beta)
        if beta == 0.2:
            os.kill(os.getpid(), signal.SIGTERM)

    runs.write = signalled
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep([config], points, tmp_path / "out")
    assert [beta for _, beta in runs.asked] == [0.1, 0.2]
    runs.write = write
    sweep.sweep([config], points, tmp_path / "out")
    assert [beta for _, beta in runs.asked][-1] == 0.3 and len(runs.asked) <= 4


# Folders


def test_two_sweeps_cannot_share_a_folder_nor_one_with_a_run_that_was_left_behind(tmp_path: Path) -> None:
    with locked(tmp_path) as (place, file):
        with pytest.raises(InputError, match="at work here"), locked(tmp_path):
            pass
        with (tmp_path / "log.txt").open("w") as log:
            orphan = launch([sys.executable, "-c", "import time; time.sleep(60)"], log, os.environ, (file,))
    with pytest.raises(InputError, match="at work here"), locked(tmp_path):
        pass
    pools.send(orphan, signal.SIGKILL)
    orphan.wait()
    with locked(tmp_path) as (again, _):
        assert again == place, "a folder keeps its name"
    with locked(tmp_path / "other") as (other, _):
        assert other != place
