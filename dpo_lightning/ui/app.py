"""The page: `python -m dpo_lightning chat`, or `streamlit run ui/app.py -- --model DIR`."""

import sys
from collections.abc import Callable
from pathlib import Path

import streamlit as st
from jsonargparse import ArgumentParser

from dpo_lightning.errors import InputError
from dpo_lightning.ui import chat, compare, data, runs
from dpo_lightning.ui.look import STYLE
from dpo_lightning.ui.models import choose
from dpo_lightning.ui.options import Options

#: Where a visit keeps the name of the page that it is on.
PAGE = "page"

ICONS = {"Chat": "chat", "Compare": "compare_arrows", "Runs": "show_chart", "Data": "table_rows"}


@st.cache_resource(show_spinner=False)
def told(words: tuple[str, ...]) -> Options:
    """The options of the command line, parsed once."""
    parser = ArgumentParser(prog="streamlit run ui/app.py --")
    parser.add_class_arguments(Options)
    return Options(**parser.parse_args(list(words)))


def main() -> None:
    """One visit of one page."""
    st.set_page_config("dpo_lightning", "⚖️", layout="wide")
    st.html(STYLE)
    options = told(tuple(sys.argv[1:]))
    # Here and not in the pages, so that what is chosen stays when the page is changed.
    chosen = choose(options)
    pages = {
        "Chat": lambda: chat.page(chosen),
        "Compare": lambda: compare.page(chosen, Path(options.votes), Path(options.runs)),
        "Runs": lambda: runs.page(Path(options.runs)),
        "Data": lambda: data.page(chosen.policy, [options.data, str(options.votes)]),
    }
    said_on_the_page(pages[turned_to(list(pages))])


def turned_to(names: list[str]) -> str:
    """The page that is looked at, by the bar on top, or by the address: `?page=runs`.

    Not by Streamlit's own addresses of pages, for which a browser first asks in vain where the server is, and logs that
    as errors.
    """
    asked = st.query_params.get("page", "").capitalize()
    if PAGE not in st.session_state:
        st.session_state[PAGE] = asked if asked in names else names[0]
    shown = {name: f":material/{ICONS[name]}: {name}" for name in names}
    found = st.segmented_control("Page", names, format_func=shown.get, key=PAGE, label_visibility="collapsed")
    found = found or (asked if asked in names else names[0])  # a second click on it takes the choice away
    if found != names[0] or asked:
        st.query_params["page"] = found.lower()
    return found


def said_on_the_page(page: Callable[[], None]) -> None:
    """Show a page, which says what went wrong outside of it in a sentence."""
    try:
        page()
    except InputError as error:
        st.error(as_plain(str(error)))


def as_plain(text: str) -> str:
    """Text for a box that reads Markdown, in which nothing is markup.

    >>> as_plain("a_b *c*")
    'a\\\\_b \\\\*c\\\\*'
    """
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()#+-.!|<>$~:" else letter for letter in text)


if __name__ == "__main__":
    main()
