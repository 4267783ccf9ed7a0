"""`sweep` with real fits and tests: what it finds is what the verbs find by hand, and nothing is run twice.

One sweep starts processes, as a user's does; in the others the verbs are called in this process, which is the same but
for the seconds that importing takes.
"""

import csv
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

import pytest
import yaml

from dpo_lightning.__main__ import main
from dpo_lightning.commands import runs
from dpo_lightning.commands.points import configured, name_of
from dpo_lightning.training.callbacks import LAST, versions
from dpo_lightning.training.curves import read_metrics
from tests.conftest import RunCli
from tests.e2e.processes import FORKS
from tests.e2e.sweeping import run_sweep
from tests.sweeps import Ended

#: Options of a fit that takes no time; the oracle is written by the fixture `mine`.
TINY: dict[str, Any] = {
    "model": {
        "loss": {"class_path": "Sigmoid", "init_args": {"beta": 0.2}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        "samples": 0,
        "max_new_tokens": 8,
    },
    "data": {
        "val_fraction": 0.2,
        "batch_size": 4,
        "max_train_pairs": 16,
        "max_test_prompts": 8,
        "oracle": "mine.count",
    },
    "trainer": {"accelerator": "cpu", "max_steps": 2, "log_every_n_steps": 1},
}


CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def mine(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config on the toy, `mine.yaml`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text("def count(prompt, answer):\n    return len(set(answer)) / 10\n")
    config = configured(TINY, {"model.checkpoint": str(toy / "model"), "data.source": str(toy / "pairs.jsonl")})
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that a sweep in this process has run, also in this process."""
    commands: list[list[str]] = []

    def run(command: list[str], log: TextIO, environment: Mapping[str, str], kept: Sequence[int]) -> Ended:
        commands.append(command[3:])
        with redirect_stdout(log), redirect_stderr(log), monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[2:])
            try:
                status = main()
            except SystemExit as stop:
                status = stop.code
            log.flush()
        return Ended(status)

    monkeypatch.setattr(runs, "launch", run)
    return commands


def grid(text: str) -> str:
    """A grid file in the working directory."""
    Path("grid.yaml").write_text(text)
    return "grid.yaml"


def other(text: str) -> str:
    """A further config in the working directory."""
    Path("other.yaml").write_text(text)
    return "other.yaml"


def table(folder: Path | str = "out") -> list[dict[str, str]]:
    with (Path(folder) / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def times(folder: Path) -> dict[Path, int]:
    """When each file was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def last(run: Path, tag: str) -> float:
    return read_metrics(run / "metrics.csv")[tag][1][-1]


@pytest.mark.e2e
def test_a_sweep_reports_what_ran_names_what_failed_and_goes_on_with_that_alone(
    mine: Path, run_cli: RunCli, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(mine.parent))
    words = ["--config", mine.name, "--grid", grid("data.max_length: [48, 100000]"), "--output_dir", "out"]
    done = run_cli("sweep", *words)
    good, bad = (Path("out") / name_of({"data.max_length": length}) for length in (48, 100000))

    assert done.status == 2 and "Traceback" not in "\n".join(done.err)
    message = done.err[-1]
    assert message.startswith("error: 1 of 2 points failed; ")
    for text in (f"{bad.name}: ", "fit failed", "data.max_length is 100000", str(bad / "log.txt")):
        assert text in message
    assert not versions(bad)

    fit, test = versions(good)
    assert (fit / LAST).exists() and (fit / "export" / "model.safetensors").exists()
    (row,) = table()
    assert row.pop("data.max_length") == "48" and row.pop("run") == str(good)
    tags = {f"val/{name}": fit for name in ("loss", "rewards/accuracies", "rewards/margins")}
    tags |= {f"test/{name}": test for name in ("kl", "true_reward", "win_rate")}
    assert row == {tag: str(last(run, tag)) for tag, run in tags.items()}
    assert (Path("out") / "frontier.png").read_bytes().startswith(b"\x89PNG")
    lines = done.out.strip().splitlines()
    assert lines[0].split() == ["data.max_length", *row]
    shown = [float(text) for text in lines[1].split()[1:-1]]
    assert shown == pytest.approx([float(value) for value in row.values()], abs=5e-5) and lines[1].endswith("*")
    assert f"true reward {last(test, 'test/true_reward/reference'):.4f} at KL 0" in done.out

    before = times(good)
    asked = request.getfixturevalue("asked")
    again = run_cli("sweep", *words)
    assert again.status == 2 and again.err[-1] == message
    assert again.out == done.out
    assert [(command[0], command[2]) for command in asked] == [("fit", str(bad / "config.yaml"))]
    assert times(good) == before


def test_a_points_figures_are_those_of_a_fit_and_a_test_by_hand(
    mine: Path, asked: list[list[str]], run_cli: RunCli
) -> None:
    """Also of a config that was changed, whose points all run anew."""
    words = ["sweep", "--config", mine, "--grid", grid("- {model.loss.beta: 0.5}\n- {data.max_length: 48}\n")]

    def by_hand(name: str, *options: object) -> tuple[float, float]:
        options = ("--config", mine, *options, "--trainer.default_root_dir", name)
        assert run_cli("fit", *options).status == 0
        assert run_cli("test", *options, "--ckpt_path", "last").status == 0
        fit, test = versions(Path(name))
        return last(fit, "val/loss"), last(test, "test/kl")

    def by_sweep() -> list[tuple[float, float]]:
        done = run_cli(*words, "--output_dir", "out")
        assert done.status == 0, done.err[-3:]
        return [(float(row["val/loss"]), float(row["test/kl"])) for row in table()]

    before = by_sweep()
    assert [command[0] for command in asked] == ["fit", "test"] * 2
    mine.write_text(yaml.safe_dump(configured(yaml.safe_load(mine.read_text()), {"trainer.max_steps": 3})))
    now = by_sweep()
    assert [command[0] for command in asked] == ["fit", "test"] * 4
    assert now == [by_hand("beta", "--model.loss.beta", 0.5), by_hand("length", "--data.max_length", 48)]
    assert len({*before, *now}) == 4


#: Options of a run on the built-in world that takes a second or two.
SMALL = """
trainer: {accelerator: cpu, max_steps: 2, val_check_interval: 1.0}
data: {max_train_pairs: 32, max_val_pairs: 32}
model: {samples: 0}
"""

#: Eight runs.
EIGHT = "search: {test: false}\nmodel.loss.beta: [0.05, 0.1, 0.2, 0.5]\nmodel.loss: [Sigmoid, IPO]\n"


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_sweep_of_eight_runs_that_is_killed_does_what_is_missing_and_its_best_config_can_be_fitted(
    tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the built-in world, two runs at a time; the sweep and its runs are killed when three have finished."""
    monkeypatch.chdir(tmp_path)
    words = ["--config", CONFIGS / "tiny.yaml", "--config", other(SMALL), "--grid", grid(EIGHT)]
    words = [*map(str, words), "--output_dir", str(tmp_path / "out"), "--parallel", "2"]

    def begin() -> Any:
        process = FORKS.Process(target=run_sweep, args=(words, str(tmp_path)))
        process.start()
        return process

    def numbers() -> list[int]:
        file = tmp_path / "started"
        return [int(word) for word in file.read_text().split()] if file.exists() else []

    def halfway() -> bool:
        """Three have finished, and a further one has begun: between two runs there is none for a moment."""
        finished = len(list(tmp_path.glob("out/*/finished.json")))
        return finished >= 3 and len(numbers()) > finished

    first = begin()
    until = time.monotonic() + 120
    while not halfway() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    time.sleep(0.2)
    started = numbers()
    for number in started:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    finished = [path.parent for path in tmp_path.glob("out/*/finished.json")]
    assert 3 <= len(finished) < 8 and len(started) > len(finished), "some had finished and some were going on"
    assert not list(tmp_path.glob("out/*.csv"))
    before = {folder: times(folder) for folder in finished}

    second = begin()
    second.join()
    assert second.exitcode == 0, (tmp_path / "said").read_text()
    again = (tmp_path / "started").read_text().split()[len(started) :]
    assert len(again) == 8 - len(finished)
    assert {folder: times(folder) for folder in finished} == before

    rows = table()
    accuracies = [float(row["val/rewards/accuracies"]) for row in rows]
    assert len(rows) == 8 == len({row["run"] for row in rows})
    assert all((Path("out") / name).read_bytes().startswith(b"\x89PNG") for name in ("sweep.png",))
    best = yaml.safe_load(Path("out/best.yaml").read_text())
    chosen = rows[accuracies.index(max(accuracies))]
    assert best["model"]["loss"]["class_path"].endswith(chosen["model.loss"])
    assert best["model"]["loss"]["init_args"]["beta"] == float(chosen["model.loss.beta"])
    assert chosen["run"] in (tmp_path / "said").read_text().rpartition("Best")[2]

    done = run_cli("fit", "--config", "out/best.yaml", "--trainer.max_steps", 1)
    assert done.status == 0, done.err[-3:]
    assert Path("runs/best/version_0/export/model.safetensors").exists()


#: case -> options beside `--output_dir`, and what the last line of stderr must name
BAD: dict[str, tuple[Callable[[Path], list[object]], tuple[str, ...]]] = {
    "no grid file": (lambda c: ["--config", c, "--grid", "none.yaml"], ("none.yaml", "no such grid file", "--grid")),
    "grid is no YAML": (lambda c: ["--config", c, "--grid", grid("a: [1")], ("grid.yaml", "is not YAML", "mend")),
    "grid without points": (lambda c: ["--config", c, "--grid", grid("a: []")], ("grid.yaml", "no point")),
    "grid is no mapping": (lambda c: ["--config", c, "--grid", grid("[1, 2]")], ("grid.yaml", "expected option")),
    "no config": (lambda c: ["--config", "none.yaml", "--grid", grid("a: 1")], ("none.yaml", "no such config")),
    "config is no mapping": (lambda c: ["--config", grid("- a"), "--grid", grid("- a")], ("grid.yaml", "mapping")),
    "no --grid": (lambda c: ["--config", c], ("--grid", "--help")),
    "no --config": (lambda c: ["--grid", grid("a: 1")], ("--config", "--help")),
    "unknown option": (lambda c: ["--config", c, "--grid", grid("a: 1"), "--seed", 3], ("--seed", "--help")),
    "unknown key": (lambda c: ["--config", c, "--grid", grid("data.batchsize: 3")], ("grid.yaml", "data.batch_size?")),
    "wrong type": (
        lambda c: ["--config", c, "--grid", grid("model.loss.beta: [0.1, abc]")],
        ("grid.yaml", "1 of 2 points cannot be run", "abc"),
    ),
    "unknown key of the config": (
        lambda c: ["--config", c, "--config", other("data: {batchsize: 3}"), "--grid", grid("seed_everything: 1")],
        ("other.yaml", "data.batch_size?"),
    ),
    "none at a time": (
        lambda c: ["--config", c, "--grid", grid("seed_everything: 1"), "--parallel", 0],
        ("--parallel", "at least 1"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_a_sentence_and_writes_nothing(
    case: str, mine: Path, asked: list[list[str]], run_cli: RunCli
) -> None:
    options, named = BAD[case]
    done = run_cli("sweep", *options(mine), "--output_dir", "out")
    assert done.status == 2
    assert done.err[-1].startswith("error: ")
    for text in named:
        assert text in done.err[-1]
    assert "Traceback" not in "\n".join(done.err)
    assert asked == [] and not Path("out").exists()


#: A config that names classes, and one that leaves them to their defaults.
BASES: dict[str, dict[str, Any]] = {"tiny": TINY, "bare": {"data": TINY["data"]}}


@pytest.mark.parametrize(
    ("base", "point"),
    [
        ("tiny", {"model.loss.beta": 0.5, "data.max_length": 64, "seed_everything": 3}),
        ("bare", {"model.loss.beta": 0.5, "model.optimizer.weight_decay": 0.1}),
        ("tiny", {"model.loss": "SFT"}),
        ("bare", {"model.optimizer.lr": "1e-4"}),  # which is a string in YAML
        ("tiny", {"model.optimizer": "SGD", "model.optimizer.lr": 0.1}),
        ("bare", {"model.reference": "FrozenModel", "model.reference.checkpoint": "other"}),
        ("tiny", {"data.source": ["a.jsonl", "b.jsonl"]}),
        ("tiny", {"model.loss.init_args.beta": 0.5}),
        ("tiny", {"model.loss.class_path": "SFT"}),
    ],
    ids=str,
)
def test_a_points_option_means_what_it_means_on_the_command_line(
    mine: Path, run_cli: RunCli, base: str, point: dict[str, Any]
) -> None:
    common = {"model.checkpoint": "some", "data.source": "pairs.jsonl"}
    given = [word for key, value in point.items() for word in (f"--{key}", str(value))]
    resolved = []
    for config, words in ((configured(BASES[base], common), given), (configured(BASES[base], common | point), [])):
        mine.write_text(yaml.safe_dump(config))
        done = run_cli("fit", "--config", mine, *words, "--print_config")
        assert done.status == 0, done.err[-1]
        resolved.append(yaml.safe_load(done.out))
    assert resolved[0] == resolved[1]
