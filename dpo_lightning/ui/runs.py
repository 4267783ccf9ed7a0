"""The page of runs: their curves on one plot, live while they train, samples and configs."""

import csv
from pathlib import Path

import altair as alt
import pandas as pd
import streamlit as st

from dpo_lightning.training.curves import Series, read_metrics

#: Title of a plot -> the figure in it.
PLOTS = {
    "Accuracy": "rewards/accuracies",
    "Margin, in rewards": "rewards/margins",
    "Reward of the chosen answer": "rewards/chosen",
    "Reward of the rejected answer": "rewards/rejected",
    "Loss": "loss",
    "KL(reference, policy), in nats": "kl_of_pairs",
}

SAMPLES = "val/samples/text_summary"

#: Seconds between two looks at runs that may still be training.
EVERY = 2.0


def page(folder: Path) -> None:
    """Which runs, and what they wrote."""
    st.header("Runs", anchor=False)
    typed = st.text_input("Folder", str(folder), help="All runs in it and below it are offered.")
    found = runs_in(Path(typed).expanduser())
    if not found:
        st.info(f"No run in {typed}: no folder below it has a metrics.csv or TensorBoard's files.")
        return
    names = {str(run.relative_to(Path(typed).expanduser())) or ".": run for run in found}
    chosen = st.multiselect("Runs", list(names), default=list(names)[:1], placeholder="Choose runs")
    stage = st.segmented_control("Figures of", ["Validation", "Training"], default="Validation") or "Validation"
    if not chosen:
        st.info("Choose a run.")
        return
    curves([(name, names[name]) for name in chosen], "val" if stage == "Validation" else "train")
    for name in chosen:
        details(name, names[name])


def runs_in(folder: Path) -> list[Path]:
    """Folders of runs, the latest first."""
    if not folder.is_dir():
        return []
    files = [*folder.rglob("metrics.csv"), *folder.rglob("events.out.tfevents.*")]
    latest: dict[Path, float] = {}
    for file in files:
        if file.exists():
            latest[file.parent] = max(latest.get(file.parent, 0.0), file.stat().st_mtime)
    return sorted(latest, key=latest.__getitem__, reverse=True)


@st.fragment(run_every=EVERY)
def curves(chosen: list[tuple[str, Path]], stage: str) -> None:
    """A plot for each figure, a line for each run."""
    series = {name: figures(run) for name, run in chosen}
    shown = {title: f"{stage}/{tag}" for title, tag in PLOTS.items()}
    shown = {title: tag for title, tag in shown.items() if any(tag in found for found in series.values())}
    if not shown:
        st.info("These runs have not written such figures yet.")
        return
    last = max((steps[-1] for found in series.values() for steps, _ in found.values() if steps), default=0)
    st.caption(f"Step {last:,}")
    columns = st.columns(2)
    for number, (title, tag) in enumerate(shown.items()):
        with columns[number % 2]:
            st.markdown(f"**{title}**")
            st.altair_chart(line_chart({name: found[tag] for name, found in series.items() if tag in found}))


def line_chart(series: dict[str, Series]) -> alt.Chart:
    """A figure of several runs over their steps."""
    tables = [pd.DataFrame({"run": name, "step": steps, "value": values}) for name, (steps, values) in series.items()]
    chart = alt.Chart(pd.concat(tables)).mark_line(point=alt.OverlayMarkDef(size=18))
    named = alt.Legend(orient="bottom", title=None, columns=1, labelLimit=400) if len(series) > 1 else None
    return chart.encode(
        x=alt.X("step:Q", title="optimizer steps", axis=alt.Axis(tickCount=5, format="~s")),
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=4)),
        color=alt.Color("run:N", legend=named),
        tooltip=["run:N", alt.Tooltip("step:Q", format=","), alt.Tooltip("value:Q", format=".4f")],
    ).properties(height=200 + 22 * len(series) * (len(series) > 1))


def figures(run: Path) -> dict[str, Series]:
    """Tag -> steps and values, from metrics.csv, else from TensorBoard's files.

    A file that is just being written may end in half a line; what is whole is shown.
    """
    if (run / "metrics.csv").exists():
        try:
            return read_metrics(run / "metrics.csv")
        except (ValueError, OSError, KeyError, TypeError, csv.Error):
            return {}
    events = accumulated(run)
    return {
        tag: ([event.step for event in events.Scalars(tag)], [event.value for event in events.Scalars(tag)])
        for tag in events.Tags()["scalars"]
    }


def accumulated(run: Path):
    """TensorBoard's files of a run, read."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def samples(run: Path) -> dict[int, str]:
    """Step -> a table in Markdown of what the policy answered then."""
    events = accumulated(run)
    if SAMPLES not in events.Tags()["tensors"]:
        return {}
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(SAMPLES)}


def details(name: str, run: Path) -> None:
    """A run's samples over time, and its config."""
    with st.expander(f"{name}: samples"):
        found = samples(run)
        if not found:
            st.write("This run has sampled nothing yet.")
        else:
            steps = list(found)
            step = st.select_slider("Step", steps, steps[-1], key=f"step {name}") if len(steps) > 1 else steps[0]
            st.markdown(found[step].replace("<br>", " \u21b5 "))
    with st.expander(f"{name}: config"):
        config = run / "config.yaml"
        text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else "(no config.yaml)"
        st.code(text, language="yaml")
