"""A sweep in a process of its own whose runs are forks of it: real runs, to be killed, without the time of imports."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from dpo_lightning.__main__ import main
from dpo_lightning.commands import runs
from dpo_lightning.training import cli


class Fork:
    """A child of this process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None

    def poll(self) -> int | None:
        if self.status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if ended else None
        return self.status

    def wait(self, timeout: float | None = None) -> int:
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status


def run_sweep(words: list[str], folder: str) -> None:
    """Run `python -m dpo_lightning sweep WORDS`.

    Args:
        words: of the command line.
        folder: where the numbers of all processes of runs are added to `started`, and what is printed goes to `said`.
    """
    started, said = Path(folder) / "started", Path(folder) / "said"

    def fork(command: list[str], log: TextIO, environment: Mapping[str, str], kept: Sequence[int]) -> Fork:
        number = os.fork()
        if number:
            return Fork(number)
        status = 1
        try:
            os.setsid()
            with started.open("a") as file:
                file.write(f"{os.getpid()}\n")
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            os.environ |= environment
            sys.argv = command[2:]
            status = main()
        finally:
            sys.stdout.flush()
            os._exit(status)

    with said.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    runs.launch = fork
    cli.draw_curves = lambda *_: None  # half of a small run's time
    tqdm.monitor_interval = 0  # a thread, which a fork would lose
    torch.set_num_threads(1)
    sys.argv = ["dpo_lightning", "sweep", *words]
    status = main()
    sys.stdout.flush()
    os._exit(status)
