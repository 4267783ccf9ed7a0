"""Sweeps whose runs take no time: what stands for the processes, and what reads the results."""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import yaml
from matplotlib.image import imread

from dpo_lightning.training.callbacks import versions

#: A config, of which nothing is read but its options.
BASE: dict[str, Any] = {
    "seed_everything": 7,
    "model": {
        "checkpoint": "gpt2",
        "loss": {"class_path": "Sigmoid", "init_args": {"beta": 0.5, "label_smoothing": 0.1}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "fused": True}},
    },
    "data": {"source": "pairs.jsonl"},
    "trainer": {"max_steps": 2, "accelerator": "cpu"},
}

#: No process can have this number.
NOBODY = 2**30


class Ended:
    """Stands for a process.

    Args:
        status: with which it ends.
        looks: so many looks find it going on before.
    """

    def __init__(self, status: int, looks: int = 0) -> None:
        self.pid, self.status, self.looks = NOBODY, status, looks

    def poll(self) -> int | None:
        self.looks -= 1
        return self.status if self.looks < 0 else None

    def wait(self, timeout: float | None = None) -> int:
        self.looks = 0
        return self.status


class Runs:
    """Stands for `runs.launch`: what the verbs leave in a folder, and a list of what was asked for.

    Every figure is logged at two steps, and is first twice what it is in the end, which is what is meant below: of a
    loss with a `beta` the accuracy is 1 - beta and KL 1 / beta; of any other there is no accuracy and KL is 1. A
    beta above 1 is refused.

    Attributes:
        asked: verb and beta of every process.
        environments: what each was started with.
        going: how many had been started and not ended when each was started, itself included.
        stop_at: the process of this number never ends.
        looks: how often a process is found going on.
        without: figures that are not finite.
        ended: fits with these betas are ended before they export, with status 0.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, float | None]] = []
        self.environments: list[Mapping[str, str]] = []
        self.going: list[int] = []
        self.stop_at: int | None = None
        self.looks = 0
        self.without: dict[str, float] = {}
        self.ended: set[float] = set()
        self.processes: list[Ended] = []

    def __call__(self, command: list[str], log: TextIO, environment: Mapping[str, str], kept: Sequence[int]) -> Ended:
        assert command[:3] == [sys.executable, "-m", "dpo_lightning"]
        verb, words = command[3], command[4:]
        options = dict(zip(words[::2], words[1::2], strict=True))
        config = yaml.safe_load(Path(options["--config"]).read_text(encoding="utf-8"))
        beta = config["model"]["loss"].get("init_args", {}).get("beta")
        self.asked.append((verb, beta))
        self.environments.append(environment)
        root = Path(options["--trainer.default_root_dir"])
        run = root / f"version_{len(versions(root))}"
        refused = beta is not None and beta > 1
        if refused:
            log.write(f"a line\nerror: beta must be at most 1, got {beta}\n")
        else:
            self.write(run, verb, beta)
        if verb == "test":
            assert options["--ckpt_path"] == "last"
        if len(self.asked) - 1 == self.stop_at:
            raise KeyboardInterrupt
        self.processes.append(Ended(2 if refused else 0, self.looks))
        self.going.append(sum(process.looks >= 0 for process in self.processes))
        return self.processes[-1]

    def write(self, run: Path, verb: str, beta: float | None) -> None:
        """What a verb logs."""
        run.mkdir()
        if verb == "fit":
            if beta not in self.ended:
                (run / "export").mkdir()
            figures = {"val/loss": 0.5, "train/loss": 0.6}
            figures |= {} if beta is None else {"val/rewards/accuracies": 1 - beta}
        else:
            figures = {"test/kl": 1.0 if beta is None else 1 / beta}
        figures |= {tag: value for tag, value in self.without.items() if tag in figures}
        rows = [",".join(map(str, (step, *(value * 2 / step for value in figures.values())))) for step in (1, 2)]
        (run / "metrics.csv").write_text("\n".join([",".join(("step", *figures)), *rows]) + "\n")


def grid(folder: Path, text: str, name: str = "grid.yaml") -> Path:
    """A sweep's file."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of `sweep.csv`, without the runs' folders."""
    with (folder / "sweep.csv").open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key != "run"} for row in csv.DictReader(file)]


def image(path: Path) -> np.ndarray:
    """The pixels of a picture that is not blank."""
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = imread(path)
    assert pixels[..., :3].std() > 0, "it is blank"
    return pixels
