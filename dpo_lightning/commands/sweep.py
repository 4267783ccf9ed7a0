"""`sweep`: one fit and one test for every point of a grid, as a table and a picture of reward against KL.

The picture is that of Rafailov et al. 2023 (arXiv:2305.18290), figure 2: how much true reward a policy gains for how
far it moves from its reference. Every point runs in processes of its own; a sweep that was interrupted goes on.
"""

import copy
import csv
import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import matplotlib
import yaml
from matplotlib.figure import Figure
from tqdm import tqdm

from dpo_lightning.errors import InputError
from dpo_lightning.training.callbacks import versions
from dpo_lightning.training.cli import CLASS_OPTIONS, RUNS
from dpo_lightning.training.curves import read_metrics
from dpo_lightning.training.options import NoDuplicates, read_config

#: What the table shows of a point, beside what the grid set.
FIGURES = ("val/loss", "val/rewards/accuracies", "test/true_reward", "test/good", "test/kl", "test/win_rate")

#: What the picture shows over KL, where any point has it -> its label.
PANELS = {"test/true_reward": "true reward", "val/rewards/accuracies": "validation accuracy"}

Point = dict[str, Any]


def read_grid(path: Path) -> list[Point]:
    """The points of a grid file, in its order.

    The file is a mapping of option -> value or list of values, which stands for every combination, or a list of such
    mappings, one after the other.

    Raises:
        InputError: if it cannot be read as such, or has no point.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such grid file; --grid takes a YAML file")
    try:
        blocks = yaml.load(path.read_text(encoding="utf-8"), NoDuplicates)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not YAML: {' '.join(str(error).split())}; mend it") from error
    blocks = blocks if isinstance(blocks, list) else [blocks]
    if not all(isinstance(block, Mapping) and block and all(isinstance(k, str) for k in block) for block in blocks):
        raise InputError(f"{path}: expected option: [values ...], or a list of such mappings, got {blocks!r:.80}")
    points: list[Point] = []
    for block in blocks:
        choices = [value if isinstance(value, list) else [value] for value in block.values()]
        points += [dict(zip(block, values, strict=True)) for values in itertools.product(*choices)]
        if not all(choices):
            raise InputError(f"{path}: a list of values is empty, so there is no point to run; remove it or fill it")
    if not points:
        raise InputError(f"{path}: is empty, so there is no point to run; expected option: [values ...]")
    return points


def merged(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Configs as one, later ones winning key by key."""
    result: dict[str, Any] = {}
    for config in configs:
        for key, value in config.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged([result[key], value]) if both else copy.deepcopy(value)
    return result


def configured(config: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """A config with a point's options in it. A class that a point names replaces the config's, with all its fields.

    >>> configured({"model": {"loss": {"class_path": "Sigmoid", "init_args": {"beta": 0.1}}}}, {"model.loss": "SFT"})
    {'model': {'loss': {'class_path': 'SFT'}}}
    """
    result = merged([config])
    for key, value in sorted(point.items(), key=lambda item: item[0].count(".")):  # a class before its fields
        value = copy.deepcopy(value)
        owner = next((name for name in CLASS_OPTIONS if key == name or key.startswith(f"{name}.")), None)
        if owner is None:
            result = merged([result, nested(key, value)])
        elif key in (owner, f"{owner}.class_path"):
            put(result, owner.split("."), {"class_path": value} if isinstance(value, str) else value)
        else:
            field = key.removeprefix(f"{owner}.").removeprefix("init_args.")
            put(result, [*owner.split("."), "init_args", *field.split(".")], value)
            default = CLASS_OPTIONS[owner][1]
            at(result, owner.split(".")).setdefault("class_path", default.__name__ if default else None)
    return result


def nested(key: str, value: Any) -> dict[str, Any]:
    """A dotted key as mappings.

    >>> nested("trainer.max_steps", 5)
    {'trainer': {'max_steps': 5}}
    """
    for word in reversed(key.split(".")):
        value = {word: value}
    return value


def at(config: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The mapping at a nested key, made where there is none; a class's bare name becomes its `class_path`."""
    for word in words:
        inner = config.get(word)
        if not isinstance(inner, dict):
            inner = config[word] = {"class_path": inner} if isinstance(inner, str) else {}
        config = inner
    return config


def put(config: dict[str, Any], words: Sequence[str], value: Any) -> None:
    """Set a nested key."""
    at(config, words[:-1])[words[-1]] = value


def name_of(point: Point) -> str:
    """A folder's name for a point: what it sets, shortly, and a hash of all of it, since short names may coincide.

    >>> name_of({"model.loss": "Sigmoid", "model.loss.beta": 0.1})
    'loss=Sigmoid,beta=0.1-2ca0c8fc'
    """
    short = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items())
    digest = hashlib.blake2b(json.dumps(point, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
    return f"{re.sub(r'[^a-zA-Z0-9=,._+-]', '_', short)[:80]}-{digest}"


def run_point(config: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Fit and test one point, unless the folder has its figures from before.

    Returns:
        the last value of every validation and test figure.

    Raises:
        InputError: if a command fails; the message has its last line.
    """
    file, finished = folder / "config.yaml", folder / "finished.json"
    text = yaml.safe_dump(dict(config), sort_keys=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        same = file.exists() and file.read_text(encoding="utf-8") == text
        if not (same and finished.exists()):
            finished.unlink(missing_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror}); choose another --output_dir") from error
    if not finished.exists():
        older = set(versions(folder))  # of another config, or interrupted
        fresh = ["--config", str(file), "--trainer.default_root_dir", str(folder)]
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            for words in (["fit", *fresh], ["test", *fresh, "--ckpt_path", "last"]):
                quiet = ["--trainer.enable_progress_bar", "false"]
                command = [sys.executable, "-m", "dpo_lightning", *words, *quiet]
                done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
                if done.returncode:
                    last = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
                    raise InputError(f"{words[0]} failed: {''.join(last)} (all of it is in {folder / 'log.txt'})")
        own = [run.name for run in versions(folder) if run not in older]
        unfinished = folder / "finished.part"
        unfinished.write_text(json.dumps(own), encoding="utf-8")
        unfinished.replace(finished)
    found: dict[str, float] = {}
    for name in json.loads(finished.read_text(encoding="utf-8")):
        metrics = folder / name / "metrics.csv"
        series = read_metrics(metrics) if metrics.exists() else {}
        found |= {tag: values[-1] for tag, (_, values) in series.items() if tag.startswith(("val/", "test/"))}
    return found


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys, aligned for a terminal; a float that four places would hide is written whole."""

    def cell(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) and (abs(value) >= 0.01 or not value) else str(value)

    lines = [list(rows[0])] + [list(map(cell, row.values())) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def draw_frontier(points: Sequence[Point], found: Sequence[Mapping[str, float]], picture: Path, title: str) -> None:
    """True reward, and validation accuracy, against KL: one line a loss, through its points in the grid's order.

    Args:
        points: what was set.
        found: what came out, in the same order.
        picture: the file to write.
        title: of the picture.
    """
    panels = {tag: label for tag, label in PANELS.items() if any(tag in figures for figures in found)}
    panels = panels or {"val/loss": "validation loss"}
    losses = list(dict.fromkeys(str(point.get("model.loss", "")) for point in points))
    far = max((f["test/kl"] for f in found if math.isfinite(f["test/kl"])), default=0.0) > 10
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(6.0 * len(panels), 4.4), dpi=120, layout="constrained")
        figure.suptitle(title)
        for axes, (tag, label) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
            if far:  # one point would press all others together
                axes.set_xscale("symlog", linthresh=1.0)
            for number, loss in enumerate(losses):
                own = [
                    (figures, point)
                    for point, figures in zip(points, found, strict=True)
                    if str(point.get("model.loss", "")) == loss and tag in figures
                ]
                if not own:
                    continue
                xs, ys = [f["test/kl"] for f, _ in own], [f[tag] for f, _ in own]
                axes.plot(xs, ys, "o-", ms=5, lw=1, color=f"C{number}", label=loss or "policy")
                for x, y, (_, point) in zip(xs, ys, own, strict=True):
                    text = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in point.items() if k != "model.loss")
                    axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
            if (reference := known(found, f"{tag}/reference")) is not None:
                axes.plot(0, reference, "k*", ms=11, label="reference")
            if (best := known(found, f"{tag}/best")) is not None:
                axes.axhline(best, color="grey", lw=0.8, ls=":", label="best possible")
            if far:
                axes.set_xlim(left=-0.2)
            axes.set_xlabel("KL(policy, reference), nats an answer")
            axes.set_ylabel(label)
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)
        figure.savefig(picture)


def known(found: Sequence[Mapping[str, float]], tag: str) -> float | None:
    """A figure that is the same for all points, of the first that has it."""
    return next((figures[tag] for figures in found if tag in figures), None)


def sweep(configs: Sequence[Path], grid: Path, output_dir: Path) -> None:
    """Run every point, then write `sweep.csv` and `frontier.png`.

    Raises:
        InputError: if an input cannot be read, or any point failed; the others are run and reported all the same.
    """
    base = merged([read_config(path) for path in configs])
    points = read_grid(grid)
    done: list[tuple[Point, dict[str, float]]] = []
    faults: list[str] = []
    for point in tqdm(points, desc="Points"):
        try:
            done.append((point, run_point(configured(base, point), output_dir / name_of(point))))
        except InputError as error:
            faults.append(f"{name_of(point)}: {error}")
    if done:
        report(done, output_dir, f"{configs[0].stem} over {grid.stem}")
    if faults:
        raise InputError(f"{len(faults)} of {len(points)} points failed; {'; '.join(faults)}")


def report(done: Sequence[tuple[Point, Mapping[str, float]]], output_dir: Path, title: str) -> None:
    """Table and picture of the points that were run."""
    points, found = [point for point, _ in done], [figures for _, figures in done]
    options = list(dict.fromkeys(key for point in points for key in point))
    shown = [tag for tag in FIGURES if any(tag in figures for figures in found)]
    rows = [
        {key: point.get(key, "") for key in options} | {tag: figures.get(tag, "") for tag in shown}
        for point, figures in done
    ]
    with (output_dir / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw_frontier(points, found, output_dir / "frontier.png", title)
    print(f"\n{as_table(rows)}")
    if (reference := known(found, "test/true_reward/reference")) is not None:
        print(f"Reference: true reward {reference:.4f} at KL 0")
    print("\n".join(["Written to:", *(f"  {output_dir / name}" for name in ("sweep.csv", "frontier.png"))]))


class Parser(ArgumentParser):
    """Says what is wrong on one line, the last on stderr."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; --help lists all keys", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Run the verb of the command line."""
    parser = Parser(prog="python -m dpo_lightning sweep", description="Fit and test every point of a grid.")
    parser.add_argument("--config", type=Path, action="append", required=True, help="a fit config; later ones win")
    parser.add_argument("--grid", type=Path, required=True, help="YAML: option -> value or list of values")
    parser.add_argument("--output_dir", type=Path, default=None, help="where runs, table and picture go")
    options = parser.parse_args(sys.argv[2:])
    sweep(options.config, options.grid, options.output_dir or RUNS / f"sweep-{options.grid.stem}")
