"""A sweep's pictures: every figure over every option that was searched, and reward against KL.

The second is that of Rafailov et al. 2023 (arXiv:2305.18290), figure 2: how much true reward a policy gains for how far
it moves from its reference.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure

from dpo_lightning.commands.points import Point

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}

#: How the best run is marked.
STAR = {"marker": "*", "ls": "", "ms": 13, "color": "gold", "mec": "black", "mew": 0.8, "zorder": 3}

#: What the picture of reward shows over KL, where any point has it -> its label.
OVER_KL = {"test/true_reward": "true reward", "val/rewards/accuracies": "validation accuracy"}

#: What the picture of options shows, where any point has it -> its label.
OVER_OPTIONS = {
    "val/rewards/accuracies": "validation accuracy",
    "val/rewards/margins": "validation margin, rewards",
    "test/kl": "KL, nats an answer",
    "test/true_reward": "true reward",
    "val/loss": "validation loss",
}

#: Numbers of a logarithmic axis as a config has them: 0.1, 1e-05.
PLAIN = matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}")

#: An axis whose numbers span so much is logarithmic.
DECADES = 10.0

#: Options with so many values are told by colour.
HUES = range(2, 7)

#: Panels of one option stand in rows of so many at most.
ABREAST = 3


def draw_frontier(
    points: Sequence[Point],
    found: Sequence[Mapping[str, float]],
    picture: Path,
    title: str,
    best: Point | None = None,
    joined: bool = True,
) -> None:
    """True reward, and validation accuracy, against KL: a colour a loss, the points in the grid's order.

    Args:
        points: what was set.
        found: what came out, in the same order; points without a KL are left out.
        picture: the file to write.
        title: of the picture.
        best: the point that has a star.
        joined: whether the points of a loss are a line, each named, as those of a grid; those of a search would tangle.
    """
    named = [key for key in varying(points) if key != "model.loss"]
    points = [point for point, figures in zip(points, found, strict=True) if "test/kl" in figures]
    found = [figures for figures in found if "test/kl" in figures]
    panels = {tag: label for tag, label in OVER_KL.items() if any(tag in figures for figures in found)}
    panels = panels or {"val/loss": "validation loss"}
    losses = list(dict.fromkeys(str(point.get("model.loss", "")) for point in points))
    far = max((f["test/kl"] for f in found if math.isfinite(f["test/kl"])), default=0.0) > 10
    with matplotlib.rc_context(STYLE):
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
                style = "o-" if joined else "o"
                axes.plot(xs, ys, style, ms=5, lw=1, color=f"C{number}", label=loss or "policy")
                for x, y, (_, point) in zip(xs, ys, own, strict=True):
                    if point == best:
                        axes.plot(x, y, label="best run", **STAR)
                    if joined:
                        text = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in point.items() if k in named)
                        axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
            if (reference := known(found, f"{tag}/reference")) is not None:
                axes.plot(0, reference, "k*", ms=11, label="reference")
            if (possible := known(found, f"{tag}/best")) is not None:
                axes.axhline(possible, color="grey", lw=0.8, ls=":", label="best possible")
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


@dataclass(frozen=True)
class Axis:
    """One searched option as an x axis.

    Attributes:
        option: its dotted name; empty for the number of the run.
        places: where each point stands, NaN where it does not set the option.
        words: what stands at the places 0, 1, ... of values that are no numbers; None for numbers.
    """

    option: str
    places: list[float]
    words: list[str] | None


def draw_options(
    points: Sequence[Point],
    found: Sequence[Mapping[str, float]],
    best: int | None,
    objective: str,
    picture: Path,
    title: str,
) -> None:
    """Small multiples: a row for each figure, the objective first, a column for each option that varies.

    Points that differ in the column's option alone are joined; the colour tells another option of few values; the best
    run has a star everywhere.

    Args:
        points: what was set.
        found: what came out, in the same order.
        best: which of them is the best, if any is.
        objective: tag by which it is.
        picture: the file to write.
        title: of the picture.
    """
    labels = {objective: objective} | OVER_OPTIONS
    shown = [tag for tag in labels if known(found, tag) is not None]
    if objective != "val/loss" and len(shown) > 1 and "val/loss" in shown:
        shown.remove("val/loss")  # losses of different betas are not to be compared
    shown += [] if "test/kl" in shown or known(found, "val/kl_of_pairs") is None else ["val/kl_of_pairs"]
    searched = [axis_of(option, points) for option in varying(points)] or [numbered(points)]
    single = len(searched) == 1
    columns = min(ABREAST, -(-len(shown) // 2)) if single else len(searched)
    rows = -(-len(shown) // columns) if single else len(shown)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=((3.4 if single else 2.9) * columns + 0.6, 2.3 * rows + 0.7), dpi=120, layout="constrained"
        )
        figure.suptitle(title, fontsize=10)
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        panels = list(zip(grid, itertools.product(shown, searched), strict=False))
        for number, (axes, (tag, axis)) in enumerate(panels):
            draw_panel(axes, axis, points, [figures.get(tag, math.nan) for figures in found], best)
            if number == 0 and best is not None:
                axes.plot([], [], label="best run", **STAR)
            for end, name in (("reference", "reference"), ("best", "best possible")):
                if (value := known(found, f"{tag}/{end}")) is not None:
                    axes.axhline(value, color="grey", lw=0.9, ls="--" if end == "reference" else ":", label=name)
            label = OVER_OPTIONS.get(tag, tag)
            if single or number % columns == 0:
                axes.set_ylabel(f"{label}\n(objective)" if tag == objective else label)
            if single or number >= len(panels) - columns:
                axes.set_xlabel(axis.option or "run")
            if axes.get_legend_handles_labels()[1] and (single or number < columns or number % columns == 0):
                axes.legend(frameon=False, fontsize=7)
        for axes in grid[len(panels) :]:
            axes.remove()
        figure.savefig(picture)


def numbered(points: Sequence[Point]) -> Axis:
    """The axis where nothing was searched: the number of the run."""
    return Axis("", [float(number) for number in range(1, len(points) + 1)], None)


def varying(points: Sequence[Point]) -> list[str]:
    """The options that have more than one value among those that set them, or that only some set."""
    options = dict.fromkeys(key for point in points for key in point)
    return [key for key in options if len({repr(point.get(key)) for point in points if key in point}) > 1]


def axis_of(option: str, points: Sequence[Point]) -> Axis:
    """Where points stand on an option's axis: numbers as they are, anything else side by side."""
    values = [point.get(option) for point in points]
    numbers = [as_number(value) if option in point else math.nan for value, point in zip(values, points, strict=True)]
    given = [number for number, point in zip(numbers, points, strict=True) if option in point]
    if all(number is not None for number in given):
        return Axis(option, numbers, None)
    different = dict.fromkeys(repr(point[option]) for point in points if option in point)
    order = {value: place for place, value in enumerate(different)}
    places = [order[repr(point[option])] if option in point else math.nan for point in points]
    named = {repr(point[option]): short(point[option]) for point in points if option in point}
    return Axis(option, places, [named[value] for value in different])


def as_number(value: Any) -> float | None:
    """A number as such, also where YAML has read a text; None for anything else."""
    try:
        return None if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        return None


def short(value: Any) -> str:
    """A value's name on an axis: of a class or a file the last word."""
    text = str(value["class_path"] if isinstance(value, Mapping) and "class_path" in value else value)
    text = text if as_number(text) is not None else text.rstrip("/").rpartition("/")[2]
    return text if len(text) <= 18 else f"{text[:16]}…"


def hue_of(option: str, points: Sequence[Point]) -> str | None:
    """The option that colours tell in a column of another: the first other one with few values."""
    others = [key for key in varying(points) if key != option]
    return next((key for key in others if len({repr(point.get(key)) for point in points}) in HUES), None)


def colour_of(point: Point, hue: str | None) -> str:
    """What a point has of the option that colours tell."""
    return short(point[hue]) if hue in point else "unset" if hue else ""


def draw_panel(axes: Axes, axis: Axis, points: Sequence[Point], values: Sequence[float], best: int | None) -> None:
    """One figure over one option."""
    xs, ys = np.array(axis.places, dtype=float), np.array(values, dtype=float)
    drawn = np.isfinite(xs) & np.isfinite(ys)
    hue = hue_of(axis.option, points)
    hues = list(dict.fromkeys(colour_of(point, hue) for point in points))
    groups: dict[tuple[str, str], list[int]] = {}
    for number, point in enumerate(points):
        if drawn[number]:
            rest = repr(sorted((key, repr(value)) for key, value in point.items() if key != axis.option))
            groups.setdefault((colour_of(point, hue), rest), []).append(number)
    named: set[str] = set()
    for (colour, _), members in groups.items():
        members.sort(key=lambda number: xs[number])
        joined = axis.words is None and axis.option and len(members) > 1
        label = f"{hue.rpartition('.')[2]} {colour}" if hue and colour not in named else None
        named.add(colour)
        style = "o-" if joined else "o"
        axes.plot(xs[members], ys[members], style, ms=5, lw=1, color=f"C{hues.index(colour)}", label=label)
    if best is not None and drawn[best]:
        axes.plot(xs[best], ys[best], **STAR)
    if axis.words is not None:
        axes.set_xticks(range(len(axis.words)), axis.words, rotation=25 if len("".join(axis.words)) > 24 else 0)
        axes.set_xlim(-0.5, len(axis.words) - 0.5)
    elif spans_decades(xs[np.isfinite(xs)]):
        axes.set_xscale("log")
        label_decades(axes.xaxis, xs[np.isfinite(xs)])
    else:
        axes.locator_params(axis="x", nbins=4)
    if spans_decades(ys[drawn]):
        axes.set_yscale("log")
        label_decades(axes.yaxis, ys[drawn])
    if not drawn.any():
        axes.text(0.5, 0.5, "no finite value", ha="center", transform=axes.transAxes, color="grey")
    axes.grid(alpha=0.25)


def label_decades(axis: XAxis | YAxis, values: np.ndarray) -> None:
    """Numbers on a logarithmic axis: powers of ten, and 2 and 5 between them where there would be few."""
    few = values.max() / values.min() < 100
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.set_major_formatter(PLAIN)
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def spans_decades(values: np.ndarray) -> bool:
    """Whether a logarithmic axis shows these numbers better.

    >>> spans_decades(np.array([1e-6, 1e-4])), spans_decades(np.array([1.0, 2.0])), spans_decades(np.array([0.0, 99.0]))
    (True, False, False)
    """
    return bool(len(values) > 1 and values.min() > 0 and values.max() / values.min() >= DECADES)
