"""Two nodes: a process each, that meet over an address, as torchrun, SLURM or Lightning's own variables start them."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file

from dpo_lightning.errors import InputError
from dpo_lightning.training.callbacks import LAST
from dpo_lightning.training.world import check_world
from tests.conftest import RunCli
from tests.e2e import processes

#: precision -> how far apart two runs may be, relative to their norm
TOLERANCES = {"64-true": 1e-9, "32-true": 1e-5}

#: launcher -> what it tells the one process of a node
LAUNCHERS: dict[str, processes.Environment] = {
    "SLURM": lambda node: {
        **{"SLURM_JOB_NAME": "dpo", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"},
        **{"SLURM_NODEID": str(node), "SLURM_PROCID": str(node), "SLURM_LOCALID": "0"},
    },
    "Lightning": lambda node: {"NODE_RANK": str(node)},
}


def torchrun(words: list[object], nodes: int = 2, per_node: int = 1) -> list[tuple[int, str]]:
    """`torchrun ... -m dpo_lightning WORDS` on each node: exit statuses and what was written to stderr."""
    meeting = ["--nnodes", nodes, "--nproc_per_node", per_node]
    meeting += ["--master_addr", "127.0.0.1", "--master_port", processes.free_port()]
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *map(str, meeting), "--node_rank", str(node)),
                *("-m", "dpo_lightning", *map(str, words)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for node in range(nodes)
    ]
    try:
        return [(agent.wait(), err) for agent in agents for _, err in [agent.communicate(timeout=processes.SECONDS)]]
    finally:
        for agent in agents:
            agent.terminate()  # which ends its workers too
            agent.wait()


def weights(run: Path) -> torch.Tensor:
    state = load_file(run / "export" / "model.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state)])


def distance(run: Path, other: Path) -> float:
    return float((weights(run) - weights(other)).norm() / weights(other).norm())


@pytest.fixture
def words(toy_words: list[str]) -> list[object]:
    """49 pairs in steps of 8, the last of one pair; 2 epochs; without batch size and directory."""
    short = dict(zip(toy_words[::2], toy_words[1::2], strict=True))
    for name in ("--data.batch_size", "--trainer.default_root_dir"):
        del short[name]
    return [*(word for pair in short.items() for word in pair), "--model.samples", 1, "--model.max_new_tokens", 4]


@pytest.mark.e2e
def test_two_agents_of_torchrun_train_what_one_process_does_and_go_on_as_it_does(
    words: list[object], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    words += ["--trainer.precision", "64-true", "--model.lr_scheduler", "constant"]
    alone = ["--data.batch_size", 8, "--trainer.default_root_dir", one]
    together = ["--data.batch_size", 4, "--trainer.default_root_dir", two]
    processes.run("fit", *words, *alone, "--trainer.max_steps", 4)
    started = torchrun(
        ["fit", *words, *together, "--trainer.max_steps", 4, "--trainer.devices", 1, "--trainer.num_nodes", 2]
    )
    assert [status for status, _ in started] == [0, 0], started
    resume = ["--trainer.max_steps", 8, "--ckpt_path", "last"]
    processes.run("fit", *words, *alone, *resume)
    processes.run("fit", *words, *together, *resume, ranks=2, nodes=LAUNCHERS["SLURM"])
    for name in ("version_0", "version_1"):
        assert distance(two / name, one / name) < TOLERANCES["64-true"]
        files = {path.name for path in (two / name).iterdir() if "tfevents" not in path.name}
        assert files >= {"export", "checkpoints", "metrics.csv", "config.yaml"}
    assert sorted(path.name for path in two.iterdir()) == ["version_0", "version_1"]  # one of each run
    assert torch.load(two / "version_1" / LAST, weights_only=True)["global_step"] == 8


@pytest.mark.e2e
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_nodes_train_what_one_process_does(
    words: list[object], tmp_path: Path, launcher: str, strategy: str
) -> None:
    """With one run directory, though nothing but the trainer knows which process is the first."""
    one, two = tmp_path / "one", tmp_path / "two"
    processes.run("fit", *words, "--data.batch_size", 8, "--trainer.default_root_dir", one)
    options = ["--data.batch_size", 4, "--trainer.strategy", strategy, "--trainer.default_root_dir", two]
    processes.run("fit", *words, *options, ranks=2, nodes=LAUNCHERS[launcher])
    assert [path.name for path in two.iterdir()] == ["version_0"]
    assert distance(two / "version_0", one / "version_0") < TOLERANCES["32-true"]


@pytest.mark.e2e
def test_where_nodes_share_no_directory_the_first_has_the_run(
    words: list[object], tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other writes nothing, and says so if it is to go on from what it has not."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    options = [*words, "--data.batch_size", 4, "--trainer.default_root_dir", "runs"]
    processes.run(
        "fit",
        *(*options, "--trainer.max_steps", 2),
        ranks=2,
        nodes=lambda node: LAUNCHERS["Lightning"](node) | {"PWD": str(folders[node])},
    )
    assert (folders[0] / "runs" / "version_0" / "export" / "model.safetensors").exists()
    assert not list(folders[1].iterdir())
    monkeypatch.chdir(folders[1])
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    done = run_cli("fit", *options, "--ckpt_path", "last")
    assert done.status == 2 and "this is rank 1: every node must see the run" in done.err[-1]
    assert not list(folders[1].iterdir())


# Processes that were not started as the options say

TORCHRUN = {
    **{"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"},
    **{"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"},
}
SLURM = {
    **{"SLURM_JOB_NAME": "dpo", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
    **{"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"},
}


@pytest.mark.parametrize(("devices", "nodes"), [(1, 1), (2, 1), (1, 2), (4, 1), (3, 2), (1, 4)])
@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (TORCHRUN, "torchrun has started 4 (WORLD_SIZE 4, LOCAL_WORLD_SIZE 2, GROUP_WORLD_SIZE 2)"),
        (SLURM, "SLURM has started 4 (SLURM_NTASKS 4, SLURM_NTASKS_PER_NODE 2, SLURM_NNODES 2)"),
    ],
    ids=["torchrun", "SLURM"],
)
def test_another_world_than_was_started_is_refused_before_anything_is_read(
    run_cli: RunCli,
    words: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    named: str,
    devices: int,
    nodes: int,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options = ["--trainer.devices", devices, "--trainer.num_nodes", nodes, "--data.source", "/nowhere/pairs.jsonl"]
    done = run_cli("fit", *words, *options, "--trainer.default_root_dir", tmp_path / "runs")
    assert done.status == 2
    assert f"error: trainer.devices {devices} on each of trainer.num_nodes {nodes}" in done.err[-1]
    assert named in done.err[-1] and "Traceback" not in "".join(done.err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM], ids=["torchrun", "SLURM"])
def test_the_world_that_was_started_passes(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_world(devices=2, nodes=2)


def test_what_was_started_is_read_from_todays_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets replaces os.environ by a copy when it maps in several processes."""
    monkeypatch.setattr(os, "environ", copy.deepcopy(os.environ))
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="torchrun has started 4"):
        check_world(devices=2, nodes=1)


def test_tasks_that_slurm_does_not_count_by_node_are_refused(
    run_cli: RunCli, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SLURM.items():
        if name != "SLURM_NTASKS_PER_NODE":
            monkeypatch.setenv(name, value)
    options = ["--trainer.devices", 2, "--trainer.num_nodes", 2, "--trainer.default_root_dir", tmp_path / "runs"]
    done = run_cli("fit", *words, *options)
    assert done.status == 2 and "--ntasks-per-node" in done.err[-1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.e2e
def test_a_run_is_not_resumed_on_another_number_of_ranks(words: list[object], tmp_path: Path) -> None:
    """Each process says why, and no directory is left."""
    options = [*words, "--trainer.max_steps", 2, "--data.batch_size", 4, "--trainer.default_root_dir", tmp_path]
    processes.run("fit", *options)
    options += ["--ckpt_path", "last", "--trainer.max_steps", 4]
    done = processes.run("fit", *options, ranks=2, nodes=LAUNCHERS["SLURM"], expected=2)
    assert done.statuses == (2, 2)
    assert "written with ranks 1, now 2" in done.output and "Traceback" not in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["version_0"]
