"""How things look on every page: texts as they are, shaded tokens, one style, and what went wrong in a sentence."""

import traceback
from collections.abc import Callable, Sequence
from html import escape
from itertools import cycle

import streamlit as st

from dpo_lightning.errors import InputError

STYLE = """<style>
.block-container { max-width: 68rem; padding-top: 4rem; }
.dpo-title { font-size: 1.5rem; font-weight: 700; letter-spacing: -0.02em; line-height: 1.3; }
.dpo-title small { display: block; font-size: 0.85rem; font-weight: 400; letter-spacing: 0; opacity: 0.85; }
.dpo-text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.55; min-height: 1.55em; }
.dpo-shaded span, .dpo-legend span { border-radius: 0.2rem; padding: 0.1em 0; }
.dpo-legend span { padding: 0.1em 0.4em; }
.dpo-small { opacity: 0.85; font-size: 0.85rem; }
.dpo-legend { font-size: 0.85rem; }
.dpo-lines { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; font-size: 0.85rem; overflow-wrap: anywhere; }
.dpo-lines i { display: inline-block; width: 0.7rem; height: 0.7rem; border-radius: 50%; margin-right: 0.4rem; }
</style>"""

TITLE = '<div class="dpo-title">dpo_lightning<small>What preference training changed</small></div>'

#: Colours of a token that training made likelier, and of one that it made less likely.
LIKELIER, LESS_LIKELY = "20, 184, 166", "249, 115, 22"

#: How much of its colour the strongest token has; more, and white text on it can no longer be read.
DEEPEST = 0.6

#: Colours of lines, on light and on dark.
LINES = ("#0d9488", "#ea580c", "#6366f1", "#a16207", "#db2777", "#64748b")

#: What stands for the token that ends an answer.
END = "∎"

WAITING = '<div class="dpo-small">The model is busy with another question ...</div>'

#: Seconds in which a click is heard even while the model answers somebody else.
EVERY = 0.5


def said(text: str) -> str:
    """HTML of a text that is shown as it is, right to left where it is so written.

    >>> said("<b>")
    '<div class="dpo-text" dir="auto">&lt;b&gt;</div>'
    """
    return f'<div class="dpo-text" dir="auto">{escape(text)}</div>'


def small(text: str) -> str:
    """HTML of a remark.

    >>> small("cut <here>")
    '<div class="dpo-small">cut &lt;here&gt;</div>'
    """
    return f'<div class="dpo-small">{escape(text)}</div>'


def shaded(pieces: Sequence[str], rewards: Sequence[float], strongest: float) -> str:
    """HTML of an answer, each token shaded by its reward, which is told where the pointer rests.

    Args:
        pieces: the text of each token.
        rewards: beta * log(policy / reference) of each token.
        strongest: the reward, in absolute value, that is shaded most.
    """
    spans = []
    for piece, reward in zip(pieces, rewards, strict=True):
        depth = min(abs(reward) / strongest, 1.0) ** 0.5 if strongest > 0 else 0.0  # so that the weaker are seen, too
        colour = LIKELIER if reward > 0 else LESS_LIKELY
        style = f"background: rgba({colour}, {DEEPEST * depth:.2f})"
        spans.append(f'<span style="{style}" title="{reward:+.3f}">{escape(piece)}</span>')
    return f'<div class="dpo-text dpo-shaded" dir="auto">{"".join(spans)}</div>'


def legend() -> str:
    """HTML that says what the shades mean."""
    likelier, less = (
        f'<span style="background: rgba({colour}, {DEEPEST})">{what}</span>'
        for colour, what in ((LIKELIER, "likelier after training"), (LESS_LIKELY, "less likely"))
    )
    return (
        f'<div class="dpo-legend">{likelier} {less} beta * log(policy / reference) of each token; {END} the end</div>'
    )


def legend_of_lines(names: Sequence[str]) -> str:
    """HTML that says whose line has which colour.

    >>> legend_of_lines(["<a>"])
    '<div class="dpo-lines"><span><i style="background: #0d9488"></i>&lt;a&gt;</span></div>'
    """
    spans = (
        f'<span><i style="background: {colour}"></i>{escape(name)}</span>'
        for name, colour in zip(names, cycle(LINES), strict=False)
    )
    return f'<div class="dpo-lines">{"".join(spans)}</div>'


def show(html: str) -> None:
    """Put HTML of this module on the page."""
    st.html(html)


def said_on_the_page(part: Callable[[], None]) -> None:
    """Show a part of a page, which says what went wrong outside of it in a sentence.

    What nobody has thought of is a sentence too, and the server's log has the rest.
    """
    try:
        part()
    except InputError as error:
        st.error(as_plain(str(error)))
    except Exception as error:
        traceback.print_exc()
        told = as_plain(f"{type(error).__name__}: {error}"[:300])
        st.error(f"This went wrong, and should not have ({told}). The server's output has more; please report it.")


def as_plain(text: str) -> str:
    """Text for a box that reads Markdown, in which nothing is markup.

    >>> as_plain("a_b *c*")
    'a\\\\_b \\\\*c\\\\*'
    """
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()#+-.!|<>$~:" else letter for letter in text)
