"""The HTML report of `inspect`: one file with its figures in it, which needs neither network nor script."""

import io

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpo_lightning.data.findings import Lengths
from dpo_lightning.data.inspection import Inspection

BLUE, ORANGE, GREY = "#2166ac", "#d6604d", "#737373"

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "dpo_lightning",  # the same report twice is the same file
}


def as_html(found: Inspection, advice: list[str], scheme: str = "light dark") -> str:
    """The report.

    Args:
        found: what there is to tell.
        advice: what to change.
        scheme: colours, as CSS's `color-scheme`: light, dark, or both for what the reader's browser prefers.
    """
    environment = Environment(
        loader=PackageLoader("dpo_lightning", "assets"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"visible": visible, "percent": lambda share: f"{share:.1%}"}
    with matplotlib.rc_context(STYLE):
        figures = {"lengths": draw_lengths(found.lengths, found.max_length), "cuts": draw_cuts(found)}
        figures |= {"costs": draw_costs(found)} | ({"bias": draw_bias(found.lengths)} if found.bias else {})
    return environment.get_template("inspect.html").render(found=found, advice=advice, figures=figures, scheme=scheme)


def visible(text: str, spaces: bool = True) -> str:
    """A token's text with its white space to be seen; `spaces` too."""
    for character, sign in (("\n", "↵"), ("\t", "⇥"), ("\r", "␍"), ("\0", "␀"), *(((" ", "·"),) if spaces else ())):
        text = text.replace(character, sign)
    return text


def svg(figure: Figure, description: str) -> Markup:
    """A figure as an element of the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = file.getvalue().replace("#000000", "currentColor")  # of the page, light or dark
    drawn = drawn[drawn.index("<svg") :].replace(
        "<svg", f'<svg role="img" aria-label="{Markup.escape(description)}"', 1
    )
    return Markup(drawn)


def panel() -> tuple[Figure, Axes]:
    """One small picture; laid out by hand, since letting matplotlib do it takes as long as everything else."""
    figure = Figure(figsize=(4.2, 2.8))
    figure.subplots_adjust(left=0.17, right=0.97, bottom=0.18, top=0.9)
    return figure, figure.subplots()


def draw_lengths(lengths: Lengths, max_length: int) -> Markup:
    """Histograms of the parts, and of what `max_length` limits."""
    names = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "longest": "prompt + longer answer"}
    if not lengths.pairwise:
        names = {"prompt": "prompt", "chosen": "answer", "longest": "prompt + answer"}
    figure = Figure(figsize=(8.4, 4.6))
    figure.subplots_adjust(left=0.08, right=0.99, bottom=0.11, top=0.93, hspace=0.62, wspace=0.2)
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, names.items(), strict=False):
        values = getattr(lengths, name)
        end = max(2, int(np.quantile(values, 0.995)) + 1)
        colour = {"chosen": BLUE, "rejected": ORANGE}.get(name, GREY)
        axes.hist(np.minimum(values, end), bins=min(50, end), range=(0, end), color=colour)
        axes.set_title(title)
        axes.set_xlabel("tokens; the last bar has all that are longer")
        axes.set_ylabel("pairs")
        if name == "longest" and max_length < 1.5 * end:
            axes.axvline(max_length, color="black", lw=1, ls="--", label=f"max_length {max_length:,}")
            axes.legend(frameon=False)
    for axes in figure.axes[len(names) :]:
        axes.remove()
    return svg(figure, "Histograms of lengths in tokens")


def draw_cuts(found: Inspection) -> Markup:
    """The share of pairs that each `max_length` would cut."""
    ordered = np.sort(found.lengths.longest)
    figure, axes = panel()
    axes.plot(ordered, 1 - np.arange(1, len(ordered) + 1) / len(ordered), color=GREY, drawstyle="steps-post")
    axes.axvline(found.max_length, color="black", lw=1, ls="--", label=f"this run: {found.max_length:,}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.set_xlabel("max_length, tokens")
    axes.set_title("Share of pairs that are cut")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return svg(figure, "Share of pairs cut by max_length")


def draw_costs(found: Inspection) -> Markup:
    """Tokens a pair in each layout."""
    ordered = sorted(found.costs.items(), key=lambda item: item[1])
    figure, axes = panel()
    colours = [{"shared": BLUE, "needed": GREY}.get(name, "#bdbdbd") for name, _ in ordered]
    bars = axes.barh([name for name, _ in ordered], [tokens for _, tokens in ordered], color=colours)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.15)
    axes.set_xlabel("tokens through the model, padding included")
    axes.set_title(f"Tokens a pair, in batches of {found.batch_size}")
    return svg(figure, "Tokens a pair through the model in each layout")


def draw_bias(lengths: Lengths) -> Markup:
    """How much longer the chosen answer is."""
    difference = lengths.chosen - lengths.rejected
    end = max(2, int(np.quantile(np.abs(difference), 0.98)) + 1)
    figure, axes = panel()
    bins = np.linspace(-end, end, 41)  # 0 is an edge
    axes.hist(np.clip(difference[difference > 0], -end, end), bins=bins, color=BLUE, label="chosen is longer")
    axes.hist(np.clip(difference[difference < 0], -end, end), bins=bins, color=ORANGE, label="rejected is longer")
    axes.set_xlabel("chosen minus rejected, tokens")
    axes.set_ylabel("pairs")
    axes.set_title("Which answer is longer")
    axes.legend(frameon=False)
    return svg(figure, "Histogram of the difference in length")
