"""The figures of a run as one picture."""

import csv
import io
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

#: Panel title -> figures drawn in it.
PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "accuracy": ("rewards/accuracies",),
    "margin, in rewards": ("rewards/margins",),
    "rewards": ("rewards/chosen", "rewards/rejected"),
    "log-probability of an answer, in nats": ("logps/chosen", "logps/rejected"),
    "gradient norm": ("grad_norm",),
    "accuracy where the chosen answer is longer, shorter": ("rewards/accuracies/longer", "rewards/accuracies/shorter"),
    "share of pairs": ("displacement", "rewards/saturation"),
    "KL(reference, policy) of the pairs, in nats": ("kl_of_pairs",),
}

Series = tuple[list[int], list[float]]


def read_metrics(path: Path) -> dict[str, Series]:
    """Tag -> optimizer steps and values, from a metrics.csv.

    Where a step was logged twice the later value stands. A row that is not whole, as where one is just being written,
    is left out.
    """
    points: dict[str, dict[int, float]] = defaultdict(dict)
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = io.StringIO(text[: text.rfind("\n") + 1], newline="")
    for row in csv.DictReader(whole):
        try:
            step = int(row["step"])
            values = {tag: float(value) for tag, value in row.items() if tag != "step" and value}
        except (KeyError, TypeError, ValueError):
            continue
        for tag, value in values.items():
            points[tag][step] = value
    return {tag: (sorted(series), [series[step] for step in sorted(series)]) for tag, series in points.items()}


def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Draw `metrics.csv` as a PNG: training thin, validation with dots; chosen blue, rejected orange.

    Args:
        metrics: the run's metrics.csv.
        picture: the file to write.
        title: of the whole picture.
    """
    series = read_metrics(metrics)
    logged = {tag.partition("/")[2] for tag in series}
    panels = {name: tags for name, tags in PANELS.items() if logged & set(tags)}
    columns = min(3, max(1, len(panels)))
    rows = -(-len(panels) // columns) or 1
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.5), dpi=120, layout="constrained")
        figure.suptitle(title, parse_math=False)  # a folder's name may have dollars in it
        for axes, (name, tags) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items(), strict=False):
            for tag, colour in zip(tags, ("tab:blue", "tab:orange"), strict=False):
                short = tag.rpartition("/")[2] if len(tags) > 1 else ""
                for stage, style in (("train", {"lw": 1, "alpha": 0.6}), ("val", {"lw": 1.5, "marker": "o", "ms": 4})):
                    if f"{stage}/{tag}" in series:
                        axes.plot(*series[f"{stage}/{tag}"], color=colour, label=f"{stage} {short}".strip(), **style)
            if name == "accuracy":
                axes.axhline(0.5, color="grey", lw=0.8, ls=":")
            axes.set_title(name)
            axes.set_xlabel("optimizer steps")
            axes.grid(alpha=0.25)
            axes.legend(frameon=False, fontsize=8)
        for axes in figure.axes[len(panels) :]:
            axes.remove()
        figure.savefig(picture)
