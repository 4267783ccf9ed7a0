"""The page of runs: their curves on one plot, live while they train, samples and configs."""

import math
from collections.abc import Sequence
from pathlib import Path

import altair as alt
import pandas as pd
import streamlit as st

from dpo_lightning.paths import path_of
from dpo_lightning.training.curves import Series, read_metrics
from dpo_lightning.ui.look import LINES, legend_of_lines, said_on_the_page, show

#: Title of a plot -> the figure in it; two stand side by side.
PLOTS = {
    "Accuracy": "rewards/accuracies",
    "Margin, in rewards": "rewards/margins",
    "Reward of the chosen answer": "rewards/chosen",
    "Reward of the rejected answer": "rewards/rejected",
    "Loss": "loss",
    "KL(reference, policy), in nats": "kl_of_pairs",
}

SAMPLES = "val/samples/text_summary"

METRICS, EVENTS = "metrics.csv", "events.out.tfevents.*"

#: Seconds between two looks at runs that may still be training.
EVERY = 2.0

#: Runs whose figures are kept as they were read.
KEPT = 32

#: Where a visit keeps which runs it looks at, and the latest step of samples that it has seen of each.
CHOSEN, SEEN = "runs chosen", "samples seen"

#: Time and size of a run's files; other ones have other figures.
State = tuple[tuple[str, int, int], ...]


def page(folder: Path) -> None:
    """Which runs, and what they wrote."""
    st.header("Runs", anchor=False)
    typed = st.text_input(
        "Folder",
        str(folder),
        help="All runs in it and below it are offered.",
        key="runs folder",
        persist_state="session",
    )
    live(typed)


@st.fragment(run_every=EVERY)
def live(typed: str) -> None:
    """Everything that changes while a run trains; said here, since it runs without the page around it."""
    said_on_the_page(lambda: look_into(typed))


def look_into(typed: str) -> None:
    """The runs of a folder, those that are chosen, and what they wrote.

    Raises:
        InputError: if there can be no such folder.
    """
    folder = path_of(typed)
    names = {str(run.relative_to(folder)): run for run in runs_in(folder)}
    if not names:
        st.info(f"No run in {typed}: no folder below it has a metrics.csv or TensorBoard's files.")
        return
    state = st.session_state
    state[CHOSEN] = [name for name in state.get(CHOSEN, list(names)[:1]) if name in names]
    chosen = st.multiselect("Runs", list(names), key=CHOSEN, persist_state="session", placeholder="Choose runs")
    stage = st.segmented_control(
        "Figures of", ["Validation", "Training"], default="Validation", key="stage", persist_state="session"
    )
    if not chosen:
        st.info("Choose a run.")
        return
    curves({name: figures(names[name]) for name in chosen}, "train" if stage == "Training" else "val")
    for name in chosen:
        details(name, names[name])


def runs_in(folder: Path) -> list[Path]:
    """Folders of runs, the one that was begun last first."""
    begun: dict[Path, float] = {}
    if folder.is_dir():
        for file in (*folder.rglob(METRICS), *folder.rglob(EVENTS)):
            run = file.parent
            if run not in begun:
                begun[run] = min((time / 1e9 for _, time, _ in state_of(run, "*")), default=0.0)
    return sorted(begun, key=begun.__getitem__, reverse=True)


def state_of(run: Path, *patterns: str) -> State:
    """Of those of a run's files that are still there."""
    found = []
    for pattern in patterns:
        for file in run.glob(pattern):
            try:
                status = file.stat()
            except OSError:  # deleted meanwhile
                continue
            found.append((file.name, status.st_mtime_ns, status.st_size))
    return tuple(sorted(found))


def curves(series: dict[str, dict[str, Series]], stage: str) -> None:
    """A plot for each figure, a line for each run.

    Args:
        series: by run, by tag.
        stage: val or train.
    """
    shown = {title: f"{stage}/{tag}" for title, tag in PLOTS.items()}
    shown = {title: tag for title, tag in shown.items() if any(tag in found for found in series.values())}
    if not shown:
        st.info("These runs have not written such figures yet.")
        return
    last = max((steps[-1] for found in series.values() for steps, _ in found.values() if steps), default=0)
    st.caption(f"Step {last:,}")
    if len(series) > 1:
        show(legend_of_lines(list(series)))
    titles = list(shown)
    for pair in range(0, len(titles), 2):  # row by row, so that on a narrow page they stand in this order
        for column, title in zip(st.columns(2), titles[pair : pair + 2], strict=False):
            with column:
                of_runs = {name: found[shown[title]] for name, found in series.items() if shown[title] in found}
                st.markdown(f"**{title}**")
                if any(math.isfinite(value) for _, values in of_runs.values() for value in values):
                    st.altair_chart(line_chart(of_runs, list(series)))
                for name, (steps, values) in of_runs.items():
                    if remark := not_finite(steps, values):
                        st.caption(f"{name}: {remark}")


def not_finite(steps: Sequence[int], values: Sequence[float]) -> str:
    """Which steps have no value that could be drawn; nothing where all have.

    >>> not_finite([1, 2, 3], [0.1, float("nan"), float("inf")])
    'not finite at steps 2, 3'
    """
    wrong = [f"{step:,}" for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
    if not wrong:
        return ""
    more = f" and {len(wrong) - 4:,} more" if len(wrong) > 4 else ""
    return f"not finite at step{'s' if len(wrong) > 1 else ''} {', '.join(wrong[:4])}{more}"


def line_chart(series: dict[str, Series], runs: list[str]) -> alt.Chart:
    """A figure of several runs over their steps.

    Args:
        series: by run.
        runs: all that are looked at, so that one has the same colour in each plot.
    """
    tables = [pd.DataFrame({"run": name, "step": steps, "value": values}) for name, (steps, values) in series.items()]
    table = pd.concat(tables)
    table = table[table["value"].map(math.isfinite)]
    low, high = table["value"].min(), table["value"].max()
    room = 0.0 if low < high else abs(low) / 10 or 1.0
    scale = alt.Scale(zero=False, nice=True) if low < high else alt.Scale(domain=[low - room, low + room])
    return (
        alt.Chart(table)
        .mark_line(point=alt.OverlayMarkDef(size=18))
        .encode(
            x=alt.X("step:Q", title="optimizer steps", axis=alt.Axis(tickCount=5, format="~s")),
            y=alt.Y("value:Q", title=None, scale=scale, axis=alt.Axis(tickCount=4)),
            color=alt.Color("run:N", legend=None, scale=alt.Scale(domain=runs, range=list(LINES))),
            tooltip=["run:N", alt.Tooltip("step:Q", format=","), alt.Tooltip("value:Q", format=".4f")],
        )
        .properties(height=220)
    )


def figures(run: Path) -> dict[str, Series]:
    """Tag -> steps and values, from metrics.csv, else from TensorBoard's files."""
    return figures_of(str(run), state_of(run, METRICS, EVENTS))


@st.cache_data(max_entries=KEPT, show_spinner=False)
def figures_of(run: str, state: State) -> dict[str, Series]:
    """The same, once for each state of its files."""
    try:
        found = read_metrics(Path(run) / METRICS)
    except OSError:
        found = {}
    if found:
        return found
    events = accumulated(run)
    return {
        tag: ([event.step for event in events.Scalars(tag)], [event.value for event in events.Scalars(tag)])
        for tag in events.Tags()["scalars"]
    }


def accumulated(run: str):
    """TensorBoard's files of a run, read."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(run, size_guidance={"scalars": 0, "tensors": 0}).Reload()


@st.cache_data(max_entries=KEPT, show_spinner=False)
def samples_of(run: str, state: State) -> dict[int, str]:
    """Step -> a table in Markdown of what the policy answered then."""
    events = accumulated(run)
    if SAMPLES not in events.Tags()["tensors"]:
        return {}
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(SAMPLES)}


def details(name: str, run: Path) -> None:
    """A run's samples over time, and its config."""
    with st.expander(f"{name}: samples"):
        found = samples_of(str(run), state_of(run, EVENTS))
        if not found:
            st.write("This run has sampled nothing yet.")
        else:
            st.markdown(found[step_of(name, list(found))].replace("<br>", " \u21b5 "))
    with st.expander(f"{name}: config"):
        try:
            text = (run / "config.yaml").read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = "(no config.yaml)"
        st.code(text, language="yaml")


def step_of(name: str, steps: list[int]) -> int:
    """The step whose samples are looked at: the latest, until another is chosen."""
    state, key = st.session_state, f"step {name}"
    seen = state.setdefault(SEEN, {})
    if state.get(key) not in steps or state[key] == seen.get(name):
        state[key] = steps[-1]
    seen[name] = steps[-1]
    return st.select_slider("Step", steps, key=key, persist_state="session") if len(steps) > 1 else steps[0]
