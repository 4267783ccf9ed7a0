"""`inspect`: what is in the data, what will be cut, what looks wrong, and what to change.

It takes the config of a `fit` and reads the same rows with the same tokenizer and options; the model's weights are not
loaded. The report goes to the terminal, and as one HTML file that needs nothing else into the run's directory.
"""

from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningDataModule, LightningModule, Trainer
from rich.bar import Bar
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dpo_lightning.commands.report import as_html, visible
from dpo_lightning.data.advice import advise
from dpo_lightning.data.inspection import Inspection, Inspector, Reason, Sample
from dpo_lightning.training.callbacks import LEDGER_FILE, claim_version
from dpo_lightning.training.cli import DPOCLI, RUNS, run_name, set_up_output

REPORT = "inspect.html"

#: Rows that are named in the terminal; the HTML report has all of them.
NAMED = 6

STYLES = {"prompt": "cyan", "chosen": "green", "rejected": "red"}


class Inspectable(Trainer):
    """A Trainer that the command line can ask for a report: its verbs are methods of a Trainer."""

    def inspect(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Report what is in the data.

        Args:
            model: whose tokenizer and context length count.
            datamodule: whose sources are looked at.
            ckpt_path: as in the config of a fit; not looked at.
            weights_only: as in the config of a fit; not looked at.
        """


class InspectCLI(DPOCLI):
    """The options of `fit`, without a trainer."""

    trainer_type = Inspectable

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"inspect": {"model", "datamodule"}}

    def before_instantiate_classes(self) -> None:
        if self.options.trainer.default_root_dir is None:
            self.options.trainer.default_root_dir = str(RUNS / run_name(self.options, self.subcommand))

    def instantiate_classes(self) -> None:
        chosen = self.parser.instantiate(self.config)[self.subcommand]
        self.model, self.datamodule = chosen.model, chosen.data

    def _run_subcommand(self, subcommand: str) -> None:
        """Compile, look, and report."""
        model, data = self.model, self.datamodule
        data.compile(model.tokenizer, model.context, model.loss.pairwise, inspecting=True)
        found = Inspector(data, model.tokenizer)()
        advice = list(advise(found))
        directory = claim_version(Path(self.options.trainer.default_root_dir))
        data.write_ledger(directory / LEDGER_FILE)
        (directory / REPORT).write_text(as_html(found, advice), encoding="utf-8")
        console = Console()
        console.print(as_terminal(found, advice))
        console.print(f"\nWritten to {directory}:")
        for name in (REPORT, LEDGER_FILE):
            if (directory / name).exists():
                console.print(f"  {directory / name}", soft_wrap=True, highlight=False)


def as_terminal(found: Inspection, advice: list[str]) -> Group:
    """The report for a terminal, what to change at its end."""
    parts: list[Any] = [sources(found), reasons(found.reasons), lengths(found), limits(found), costs(found)]
    parts += [repeated(found), bias(found), checks(found), characters(found)]
    parts += [sample(pair) for pair in found.samples]
    parts.append(Text("\nWhat to change", style="bold"))
    parts += [Text(f"  {number}. {what}") for number, what in enumerate(advice, 1)] or [Text("  Nothing.")]
    return Group(*parts)


def titled(title: str, *columns: str) -> Table:
    """An empty table whose columns but the first are figures."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", header_style="dim", overflow="fold")
    return table


def sources(found: Inspection) -> Table:
    table = titled("\nSources", "source", "split", "format", "rows", "pairs", "used", "dropped", "cut")
    for source in found.sources:
        figures = (source.rows, source.pairs, source.used, source.dropped, source.cut)
        table.add_row(Path(source.name).name, source.split, source.format, *(f"{figure:,}" for figure in figures))
    table.caption = f"{found.train:,} pairs train, of {found.prompts:,} prompts; {found.val:,} validate"
    table.caption += f"; {found.note}" if found.note else ""
    table.caption_justify = "left"
    return table


def reasons(found: list[Reason]) -> Table | Text:
    if not found:
        return Text("\nEvery row is used as it is.", style="bold")
    table = titled("\nDropped, cut or remarked", "what", "why", "pairs", "which")
    table.columns[1].justify = table.columns[3].justify = "left"
    for reason in found:
        named = ", ".join(reason.rows[:NAMED]) + (", ..." if reason.count > NAMED else "")
        table.add_row(reason.action, reason.reason, f"{reason.count:,}", named)
    return table


def lengths(found: Inspection) -> Table:
    table = titled("\nTokens, before any cut", "part", "mean", "median", "95%", "longest")
    for name in ("prompt", "chosen", "rejected", "longest") if found.lengths.pairwise else ("prompt", "chosen"):
        values = getattr(found.lengths, name)
        figures = [values.mean(), *np.quantile(values, (0.5, 0.95, 1.0), method="lower")]
        what = "prompt + longer answer" if name == "longest" else name
        table.add_row(what, *(f"{figure:,.0f}" for figure in figures))
    return table


def limits(found: Inspection) -> Table:
    table = titled("\nWhat max_length cuts", "max_length", "pairs", "tokens", "")
    for cut in found.cuts:
        mark = Text("this run", style="bold") if cut.max_length == found.max_length else Text("")
        table.add_row(f"{cut.max_length:,}", f"{cut.pairs:.1%}", f"{cut.tokens:.1%}", mark)
    return table


def costs(found: Inspection) -> Table:
    title = f"\nTokens a pair through the model, in batches of {found.batch_size}"
    table = titled(title, "layout", "tokens", "of padded", "")
    most = found.costs["padded"]
    for name, tokens in sorted(found.costs.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{tokens:,.0f}", f"{tokens / most:.0%}", Bar(most, 0, tokens, width=30))
    return table


def repeated(found: Inspection) -> Table:
    table = titled("\nRepetitions among the pairs to train on", "what", "groups", "pairs", "for instance")
    table.columns[3].justify = "left"
    words = {"prompts": "prompts of several pairs", "pairs": "identical pairs", "contradictions": "contradictory pairs"}
    for name, what in words.items():
        groups = found.repetitions[name]
        first = " and ".join(groups[0][:3]) if groups else ""
        table.add_row(what, f"{len(groups):,}", f"{sum(map(len, groups)):,}", first)
    both = ", ".join(found.both_sides[:NAMED])
    table.add_row("prompts that also validate", "", f"{len(found.both_sides):,}", both)
    return table


def bias(found: Inspection) -> Table | Text:
    if found.bias is None:
        return Text("")
    said = (
        f"the longer one is chosen in {found.bias.longer_wins:.1%} of the pairs of unequal lengths; as a rule for all "
        f"pairs that has an accuracy of {found.bias.accuracy:.1%} ± {found.bias.error:.1%}; the chosen answer is "
        f"{found.bias.mean_difference:+.1f} tokens longer on average"
    )
    if not found.bias.by_difference:
        return Text("\nBoth answers of every pair are equally long.", style="bold")
    table = titled("\nHow often the longer answer is the chosen one", "difference in tokens", "pairs", "share", "")
    for least, most, pairs, share in found.bias.by_difference:
        table.add_row(f"{least:,} to {most:,}", f"{pairs:,}", f"{share:.1%}", Bar(1, 0, share, width=30))
    table.caption, table.caption_justify = said, "left"
    return table


def checks(found: Inspection) -> Group:
    lines = [Text("\nTokens and template", style="bold")]
    for check in found.checks:
        mark = Text("  ok  ", style="green") if check.sound else Text("  !   ", style="bold red")
        lines.append(mark + Text(check.text))
    return Group(*lines)


def characters(found: Inspection) -> Group:
    shares = (f"{'unclear' if code == '?' else code} {share:.0%}" for code, share in found.languages.items())
    spoken = f"  {', '.join(shares)}, of {found.classified:,} pairs"
    lines = [Text("\nLanguages and characters", style="bold"), Text(spoken)]
    lines += [
        Text(f"  {odd.texts:,} of {found.looked_at:,} with {odd.what}: {', '.join(rows)}")
        for odd, rows in found.oddities
    ]
    return Group(*lines)


def sample(pair: Sample) -> Text:
    """A pair's tokens, coloured by branch; those in the loss are underlined."""
    text = Text(f"\nSample {pair.place}: ", style="bold")
    for part in pair.tokens:
        text.append(f"{part} ", style=STYLES[part])
    text.append("(underlined: in the loss)\n", style="dim")
    for part, tokens in pair.tokens.items():
        if part == "prompt" and pair.hidden[part]:
            text.append(f"  [{pair.hidden[part]:,} tokens before] ", style="dim not bold")
        for place, token in enumerate(tokens):
            style = f"not bold {STYLES[part]}{' underline' if token.in_loss else ''}{' on grey11' if place % 2 else ''}"
            text.append(visible(token.text, spaces=False), style=style)
        if part != "prompt" and pair.hidden[part]:
            text.append(f" [{pair.hidden[part]:,} tokens more]", style="dim not bold")
        text.append("\n")
    return text


def main() -> None:
    """Run the verb of the command line."""
    set_up_output()
    InspectCLI()
