"""One run of a sweep: a `fit`, and a `test` unless that is left out, in a folder of its own.

What a folder has finished is written down when it is, so that a sweep that was killed does only what is missing.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import yaml

from dpo_lightning.errors import InputError
from dpo_lightning.training.callbacks import versions
from dpo_lightning.training.curves import read_metrics

LOG = "log.txt"


class Process(Protocol):
    """What is needed of a process."""

    pid: int

    def poll(self) -> int | None:
        """Its exit status, None while it goes on."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended."""


def launch(command: list[str], log: TextIO, environment: Mapping[str, str], kept: Sequence[int]) -> Process:
    """Start a process as the leader of a group, so that it can be ended with all that it has started.

    Args:
        command: its words.
        log: where what it says goes.
        environment: its variables.
        kept: files that stay open in it.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
        pass_fds=tuple(kept),
    )


class Run:
    """A config in its folder, and what is left to do of it.

    Args:
        config: of its `fit`.
        folder: its own.
        test: whether `test` follows.

    Raises:
        InputError: if the folder cannot be written to.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path, test: bool) -> None:
        self.config, self.folder = config, folder
        self.finished, file = folder / "finished.json", folder / "config.yaml"
        text = yaml.safe_dump(dict(config), sort_keys=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                self.finished.unlink(missing_ok=True)  # it is of another config
                file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be written to ({error.strerror}); choose another --output_dir"
            ) from error
        self.own = json.loads(self.finished.read_text(encoding="utf-8")) if self.finished.exists() else []
        tested = any(tag.startswith("test/") for tag in self.figures())
        self.left = ([] if self.own else ["fit"]) + (["test"] if test and not tested else [])
        self.older: set[Path] = set()

    def start(self, environment: Mapping[str, str], kept: Sequence[int]) -> Process:
        """Start the next verb."""
        self.older = set(versions(self.folder))  # of another config, interrupted, or of an earlier verb
        verb = self.left[0]
        words = [verb, "--config", str(self.folder / "config.yaml"), "--trainer.default_root_dir", str(self.folder)]
        words += ["--ckpt_path", "last"] if verb == "test" else []
        command = [sys.executable, "-m", "dpo_lightning", *words, "--trainer.enable_progress_bar", "false"]
        with (self.folder / LOG).open("w" if verb == "fit" else "a", encoding="utf-8") as log:
            return launch(command, log, environment, kept)

    def end(self, status: int) -> None:
        """Note that the verb that was started has ended.

        Raises:
            InputError: if it failed; the message has its last line.
        """
        verb, log = self.left[0], self.folder / LOG
        if status:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise InputError(f"{verb} failed: {''.join(last) or f'status {status}'} (all of it is in {log})")
        made = [run for run in versions(self.folder) if run not in self.older]
        if verb == "fit" and not any(
            (run / "export").exists() for run in made
        ):  # a fit that a signal ends says nothing
            raise InputError(f"fit was ended before it was done (its log is {log}); the same command runs it anew")
        self.own += [run.name for run in made]
        unfinished = self.folder / "finished.part"
        unfinished.write_text(json.dumps(self.own), encoding="utf-8")
        unfinished.replace(self.finished)
        self.left.pop(0)

    def figures(self) -> dict[str, float]:
        """The last value of every validation and test figure."""
        found: dict[str, float] = {}
        for name in self.own:
            metrics = self.folder / name / "metrics.csv"
            series = read_metrics(metrics) if metrics.exists() else {}
            found |= {tag: values[-1] for tag, (_, values) in series.items() if tag.startswith(("val/", "test/"))}
        return found
