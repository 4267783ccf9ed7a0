"""What a sweep ends with: a table, two pictures, and the best config."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.commands.pictures import draw_frontier, draw_options, known
from dpo_lightning.commands.proposals import Result

#: What the table shows of a run, beside what was set.
FIGURES = (
    *("val/loss", "val/rewards/accuracies", "val/rewards/margins"),
    *("test/true_reward", "test/good", "test/kl", "test/win_rate"),
)

#: What stands for the last where nothing was sampled.
KL_OF_PAIRS = "val/kl_of_pairs"

TABLE, OPTIONS, FRONTIER, BEST = "sweep.csv", "sweep.png", "frontier.png", "best.yaml"


@dataclass(frozen=True)
class Goal:
    """By what runs are compared: a tag, and whether more of it is better."""

    objective: str
    maximize: bool

    def __str__(self) -> str:
        return f"{'highest' if self.maximize else 'lowest'} {self.objective}"

    def best(self, results: Sequence[Result]) -> int | None:
        """Which run is the best, the first of equals; a run without a finite figure never is."""
        values = [result.figures.get(self.objective, math.nan) for result in results]
        finite = [number for number, value in enumerate(values) if math.isfinite(value)]
        sign = 1 if self.maximize else -1
        return max(finite, key=lambda number: sign * values[number], default=None)


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys, aligned for a terminal; a float that four places would hide is written whole."""

    def cell(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) and (abs(value) >= 0.01 or not value) else str(value)

    lines = [list(rows[0])] + [list(map(cell, row.values())) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in text)


def briefly(figure: float | str) -> float | str:
    """A figure that four places would hide, to four digits; others as they are."""
    return f"{figure:.4g}" if isinstance(figure, float) and 0 < abs(figure) < 0.01 else figure


def report(results: Sequence[Result], output_dir: Path, title: str, goal: Goal, ranked: bool = False) -> Result | None:
    """Write table and pictures, and print the table.

    Args:
        results: of the runs that have figures.
        output_dir: where the files go.
        title: of the pictures.
        goal: by what the runs are compared.
        ranked: whether the printed table has the best first, or the order of the runs.

    Returns:
        the best run, if any can be.
    """
    points, found = [result.point for result in results], [result.figures for result in results]
    options = list(dict.fromkeys(key for point in points for key in point))
    tags = dict.fromkeys((*FIGURES, *(() if known(found, "test/kl") is not None else (KL_OF_PAIRS,)), goal.objective))
    shown = [tag for tag in tags if known(found, tag) is not None]
    rows = [
        {key: result.point.get(key, "") for key in options} | {tag: result.figures.get(tag, "") for tag in shown}
        for result in results
    ]
    with (output_dir / TABLE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], "run"])
        writer.writeheader()
        writer.writerows(row | {"run": result.folder} for row, result in zip(rows, results, strict=True))
    best = goal.best(results)
    draw_options(points, found, best, goal.objective, output_dir / OPTIONS, title)
    if known(found, "test/kl") is not None:
        star = None if best is None else points[best]
        draw_frontier(points, found, output_dir / FRONTIER, title, star, joined=not ranked)
    else:
        (output_dir / FRONTIER).unlink(missing_ok=True)  # of an earlier sweep

    order = list(range(len(rows)))
    if ranked:
        sign = -1 if goal.maximize else 1
        values = [result.figures.get(goal.objective, math.nan) for result in results]
        order.sort(key=lambda number: sign * values[number] if math.isfinite(values[number]) else math.inf)
    printed = [
        row | {tag: f"{row[tag]:.4g}" for tag in shown if row[tag] != "" and 0 < abs(row[tag]) < 0.01} for row in rows
    ]
    print(f"\n{as_table([printed[number] | {'': '*' if number == best else ''} for number in order])}")
    if (reference := known(found, "test/true_reward/reference")) is not None:
        print(f"Reference: true reward {reference:.4f} at KL 0")
    return None if best is None else results[best]


def write_best(path: Path, config: str, best: Result, runs: int, goal: Goal) -> None:
    """Write the best run's config, with a word on why it is.

    Args:
        path: the file.
        config: every option, as YAML.
        best: the run.
        runs: among how many.
        goal: by what.
    """
    value = best.figures[goal.objective]
    why = f"# The {goal} of {runs} runs: {value:.6g}, with {' '.join(best.label.split())}, in {best.folder}\n"
    path.write_text(f"{why}# python -m dpo_lightning fit --config {path}\n{config}", encoding="utf-8")
