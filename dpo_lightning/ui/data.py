"""The page of data: what `inspect` reports of a source."""

from collections.abc import Sequence

import streamlit as st

from dpo_lightning.commands.report import as_html
from dpo_lightning.data.advice import advise
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.inspection import Inspector
from dpo_lightning.models.checkpoint import context_length, load_config, load_tokenizer
from dpo_lightning.paths import path_of
from dpo_lightning.ui.look import show, small

#: What was asked for last: source and max_length.
ASKED = "data asked"

#: Height of the report, in pixels; it scrolls.
HEIGHT = 1000


def page(model: str, sources: Sequence[str]) -> None:
    """Which source, and its report.

    Args:
        model: whose tokenizer and context length count.
        sources: what is offered.
    """
    st.header("Data", anchor=False)
    with st.form("data", border=False):
        left, right = st.columns([3, 1])
        source = left.selectbox(
            "Source",
            list(dict.fromkeys(sources)),
            accept_new_options=True,
            help="As data.source of a fit: a file of JSON lines, CSV or Parquet, a folder, or a data set of the hub; "
            "type any other.",
            key="data source",
            persist_state="session",
        )
        length = right.number_input(
            "max_length",
            0,
            1_000_000,
            0,
            help="Tokens of a prompt and its longer answer; 0 is the default of a fit.",
            key="data length",
            persist_state="session",
        )
        if st.form_submit_button("Inspect", type="primary"):
            st.session_state[ASKED] = ((source or "").strip(), int(length))
    name, longest = st.session_state.get(ASKED, ("", 0))
    if not name:
        show(small("What is in a source, what will be cut, what looks wrong, and what to change before training."))
        return
    html = report(name, model, longest or None, st.context.theme.type or "light dark", state_of(name))
    show(small(f"{name}, with the tokenizer of {model}"))
    st.iframe(html, height=HEIGHT)
    st.download_button("Save the report", html, "inspect.html", "text/html")


@st.cache_data(max_entries=4, show_spinner="Reading and tokenizing ...")
def report(source: str, model: str, max_length: int | None, scheme: str, state: tuple[int, int] | None) -> str:
    """The report as HTML, light or dark, made once for each state of a source.

    Raises:
        InputError: if the source or the model's tokenizer cannot be used.
    """
    data = PreferenceDataModule(source, max_length=max_length)
    tokenizer = load_tokenizer(model)
    data.compile(tokenizer, context_length(load_config(model)), inspecting=True)
    found = Inspector(data, tokenizer)()
    return as_html(found, list(advise(found)), scheme)


def state_of(source: str) -> tuple[int, int] | None:
    """Time and size of a file; other ones are other data."""
    file = path_of(source)
    return (file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else None
