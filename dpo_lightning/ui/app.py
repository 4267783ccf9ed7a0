"""The page: `python -m dpo_lightning chat`, or `streamlit run ui/app.py -- --model DIR`."""

import sys
from argparse import ArgumentError

import streamlit as st
from jsonargparse import ArgumentParser

from dpo_lightning.errors import InputError
from dpo_lightning.paths import path_of
from dpo_lightning.ui import chat, compare, data, runs
from dpo_lightning.ui.look import STYLE, TITLE, said_on_the_page, show
from dpo_lightning.ui.models import choose
from dpo_lightning.ui.options import Options

#: Where a visit keeps the name of the page that it is on, and of the one that its address named last.
PAGE, ADDRESS = "page", "page of the address"

ICONS = {"Chat": "chat", "Compare": "compare_arrows", "Runs": "show_chart", "Data": "table_rows"}


@st.cache_resource(show_spinner=False)
def told(words: tuple[str, ...]) -> Options:
    """The options of the command line, parsed once.

    Raises:
        InputError: if there is no such option, or it has no such value.
    """
    parser = ArgumentParser(prog="streamlit run ui/app.py --", exit_on_error=False)
    parser.add_class_arguments(Options)
    try:
        return Options(**parser.parse_args(list(words)))
    except ArgumentError as error:
        raise InputError(f"the page was started with options that it does not take: {error}") from error


def main() -> None:
    """One visit of one page."""
    st.set_page_config("dpo_lightning", "⚖️", layout="wide")
    st.html(STYLE)
    title, bar = st.columns([2, 3], vertical_alignment="center")
    with title:
        show(TITLE)
    with bar:
        name = turned_to(list(ICONS))
    said_on_the_page(lambda: visit(name))


def visit(name: str) -> None:
    """The page of a name, and the sidebar."""
    options = told(tuple(sys.argv[1:]))
    folder, votes = path_of(options.runs), path_of(options.votes)
    # Here and not in the pages, so that what is chosen stays when the page is changed.
    chosen = choose(options, folder)
    pages = {
        "Chat": lambda: chat.page(chosen),
        "Compare": lambda: compare.page(chosen, votes, folder),
        "Runs": lambda: runs.page(folder),
        "Data": lambda: data.page(chosen.policy, [options.data, str(votes)]),
    }
    pages[name]()


def turned_to(names: list[str]) -> str:
    """The page that is looked at, by the bar on top, or by the address, `?page=runs`, which the browser's Back changes.

    Not by Streamlit's own addresses of pages, for which a browser first asks in vain where the server is, and logs that
    as errors.
    """
    state = st.session_state
    asked = st.query_params.get("page", "").capitalize()
    asked = asked if asked in names else names[0]
    if asked != state.get(ADDRESS):
        state[PAGE] = asked
    shown = {name: f":material/{ICONS[name]}: {name}" for name in names}
    found = st.segmented_control(
        "Page", names, format_func=shown.get, key=PAGE, label_visibility="collapsed", required=True
    )
    if found != asked:
        st.query_params["page"] = found.lower()
    state[ADDRESS] = found
    return found


if __name__ == "__main__":
    main()
