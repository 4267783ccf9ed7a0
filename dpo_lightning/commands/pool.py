"""Runs at the same time: what they share out, how they are ended, and what keeps two sweeps apart."""

import fcntl
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from dpo_lightning.commands.runs import Process, Run
from dpo_lightning.errors import InputError

#: Seconds that a process has to end before it is killed.
PATIENCE = 5.0

#: Seconds between two looks at the processes.
TICK = 0.1


class Devices:
    """What runs at the same time do not share: GPUs, dealt out, and CPU cores, of which each gets as many threads.

    A sweep of one run at a time leaves everything to Lightning.

    Args:
        parallel: runs at the same time.
    """

    def __init__(self, parallel: int) -> None:
        self.parallel = parallel
        self.free = visible_devices() if parallel > 1 else []
        self.total = len(self.free)

    def needed(self, config: Mapping[str, Any]) -> int:
        """GPUs that a run takes: what its trainer.devices says, or its part of all.

        Raises:
            InputError: if it says which.
        """
        trainer = config.get("trainer") or {}
        if not self.total or trainer.get("accelerator", "auto") not in ("auto", "gpu", "cuda"):
            return 0
        devices = str(trainer.get("devices") or "auto")
        if devices.isdigit():
            return min(int(devices), self.total)
        if devices in ("auto", "-1"):
            return max(1, self.total // self.parallel)
        raise InputError(
            f"trainer.devices {devices} names devices, which --parallel {self.parallel} deals out itself; give their "
            "number"
        )

    def environment(self, taken: Sequence[str]) -> dict[str, str]:
        """The variables of a run that has taken these."""
        found = dict(os.environ)
        if self.parallel > 1:
            cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
            found.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.parallel)))
        return found | ({"CUDA_VISIBLE_DEVICES": ",".join(taken)} if taken else {})


def visible_devices() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES gives them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [str(number) for number in range(count)] if named is None else named.split(",")[:count]


@dataclass
class Going:
    """A run that goes on."""

    run: Run
    process: Process
    devices: list[str]


@dataclass
class Pool:
    """Runs at the same time.

    Args:
        devices: what they share out.
        kept: files that stay open while any of them lives.
    """

    devices: Devices
    kept: Sequence[int] = ()
    going: list[Going] = field(default_factory=list)

    @property
    def has_slot(self) -> bool:
        """Whether fewer runs go on than may."""
        return len(self.going) < self.devices.parallel

    def has_room(self, run: Run) -> bool:
        """Whether a run can start now: there may be a slot, and too few devices."""
        return self.has_slot and self.devices.needed(run.config) <= len(self.devices.free)

    def start(self, run: Run) -> None:
        """Start a run's first verb."""
        needed = self.devices.needed(run.config)
        taken, self.devices.free = self.devices.free[:needed], self.devices.free[needed:]
        self.going.append(Going(run, run.start(self.devices.environment(taken), self.kept), taken))

    def ended(self) -> Iterator[tuple[Run, str | None]]:
        """Runs that have ended since the last look, with what went wrong; those with verbs left go on."""
        for going in list(self.going):
            status = going.process.poll()
            if status is None:
                continue
            fault = None
            try:
                going.run.end(status)
            except InputError as error:
                fault = str(error)
            if fault is None and going.run.left:
                going.process = going.run.start(self.devices.environment(going.devices), self.kept)
                continue
            self.going.remove(going)
            self.devices.free = sorted(self.devices.free + going.devices)
            yield going.run, fault

    def stop(self) -> None:
        """End every process and all that it has started: kindly first, since a fit has a checkpoint to finish."""
        try:
            for going in self.going:
                send(going.process, signal.SIGTERM)
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until and any(going.process.poll() is None for going in self.going):
                time.sleep(TICK)
        finally:  # also where somebody grows impatient
            for going in self.going:
                send(going.process, signal.SIGKILL)
            for going in self.going:
                going.process.wait()
            self.going.clear()


def pause() -> None:
    """Wait a little, before the next look at the processes."""
    time.sleep(TICK)


def send(process: Process, sign: signal.Signals) -> None:
    """Send a signal to a process's group, if any of it is left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, sign)


class Interruption:
    """Ctrl-C, being asked to end (SIGTERM) and a terminal that closes (SIGHUP), while this context lasts.

    The first is only noted, so that no process is started unseen; a second one interrupts whatever is going on.
    """

    def __init__(self) -> None:
        self.noted = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(sign) != signal.SIG_IGN:  # as under nohup
                self.before[sign] = signal.signal(sign, self.note)
        return self

    def __exit__(self, *error: object) -> None:
        for sign, handler in self.before.items():
            signal.signal(sign, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        """What a signal does."""
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was a signal."""
        if self.noted:
            raise KeyboardInterrupt


@contextmanager
def locked(folder: Path) -> Iterator[tuple[str, int]]:
    """Keep any other sweep out of a folder, as long as this one or a process of its own lives.

    Yields:
        a name for the folder that no other has, and the file that a process keeps open.

    Raises:
        InputError: if it cannot be written to, or a sweep is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "sweep.lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror}); choose another --output_dir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{folder}: a sweep is at work here, or a run that it has left behind; wait for it, end it, or choose "
                "another --output_dir"
            ) from error
        file.seek(0)
        place = file.read().strip()
        if not place:
            place = uuid.uuid4().hex
            file.write(place)
            file.flush()
        yield place, file.fileno()
