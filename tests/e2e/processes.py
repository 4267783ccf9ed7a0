"""Command lines in processes of their own, forked from one that has imported everything: imports are paid for once.

In that, and in the picture that is not drawn at its end, a run here differs from `python -m dpo_lightning WORDS`.
Several ranks are processes with the environment that torchrun or SLURM would give them.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.utils.tensorboard  # as the next two: imported late, so by every run, if not here
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.utilities import rank_zero_only

from dpo_lightning.__main__ import main
from dpo_lightning.training import cli

#: A rank that waits for another that has failed would wait for minutes.
SECONDS = 300

#: What a launcher tells a process of a rank, beside where all meet; with PWD, where it starts.
Environment = Callable[[int], dict[str, str]]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Done:
    """How a run ended: the exit status of each rank, negative for a signal, and what they wrote."""

    statuses: tuple[int | None, ...]
    output: str


def by_rank(rank: int) -> dict[str, str]:
    """Of processes on one machine that something else than Lightning has started."""
    return {"LOCAL_RANK": str(rank)}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(*words: object, ranks: int = 1, expected: int = 0, nodes: Environment | None = None) -> Done:
    """Run `python -m dpo_lightning WORDS` on so many ranks and wait for its end.

    Args:
        words: of the command line.
        ranks: how many; of several, each has the environment of a launcher.
        expected: the first rank's exit status.
        nodes: the environment where each rank is a node of its own; else they are devices of one.

    Raises:
        AssertionError: if the first rank ends with another status than `expected`, or another in spite of its success;
            with what was written.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(word) for word in words]
        meeting: dict[str, str] = {}
        if ranks > 1:
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            devices, count = (ranks, 1) if nodes is None else (1, ranks)
            arguments += ["--trainer.devices", str(devices), "--trainer.num_nodes", str(count)]
        environment = nodes or by_rank
        outputs = [Path(folder) / str(rank) for rank in range(ranks)]
        processes = [
            FORKS.Process(
                target=_run_rank,
                args=(arguments, meeting | environment(rank) if meeting else {}, str(outputs[rank])),
            )
            for rank in range(ranks)
        ]
        for process, output in zip(processes, outputs, strict=True):
            output.touch()  # a process may end before it writes
            process.start()
        for process in processes:
            process.join(SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        done = Done(tuple(process.exitcode for process in processes), "".join(o.read_text() for o in outputs))
    assert done.statuses[0] == expected and (expected != 0 or not any(done.statuses)), done.output
    return done


def _run_rank(words: list[str], environment: dict[str, str], output: str) -> None:
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    os.chdir(environment.get("PWD", "."))
    rank_zero_only.rank = _get_rank() or 0  # read from the environment when Lightning was imported
    multiprocessing.set_start_method(None, force=True)  # its own processes are made as ever
    cli.draw_curves = lambda *_: None  # half of a small run's time
    torch.set_num_threads(1)
    sys.argv = ["dpo_lightning", *words]
    sys.exit(main())
