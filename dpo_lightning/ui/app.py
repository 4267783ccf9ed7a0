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
    icons = {"Chat": "chat", "Compare": "compare_arrows", "Runs": "show_chart", "Data": "table_rows"}
    found = [
        st.Page(
            said_on_the_page(page),
            title=title,
            icon=f":material/{icons[title]}:",
            url_path=title.lower(),
            default=title == "Chat",
        )
        for title, page in pages.items()
    ]
    st.navigation(found, position="top").run()


def said_on_the_page(page: Callable[[], None]) -> Callable[[], None]:
    """A page that says what went wrong outside of it, in a sentence."""

    def shown() -> None:
        try:
            page()
        except InputError as error:
            st.error(as_plain(str(error)))

    return shown


def as_plain(text: str) -> str:
    """Text for a box that reads Markdown, in which nothing is markup.

    >>> as_plain("a_b *c*")
    'a\\\\_b \\\\*c\\\\*'
    """
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()#+-.!|<>$~:" else letter for letter in text)


if __name__ == "__main__":
    main()
