"""How things look on every page: texts as they are, shaded tokens, one style."""

from collections.abc import Sequence
from html import escape

import streamlit as st

STYLE = """<style>
.block-container { max-width: 68rem; padding-top: 4.5rem; }
.dpo-title { font-size: 1.05rem; font-weight: 650; letter-spacing: -0.01em; }
.dpo-text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.55; min-height: 1.55em; }
.dpo-shaded span { border-radius: 0.2rem; padding: 0.1em 0; }
.dpo-small { opacity: 0.7; font-size: 0.85rem; }
</style>"""

#: Colours of a token that training made likelier, and of one that it made less likely.
LIKELIER, LESS_LIKELY = "20, 184, 166", "249, 115, 22"


def said(text: str) -> str:
    """HTML of a text that is shown as it is, right to left where it is so written.

    >>> said("<b>")
    '<div class="dpo-text" dir="auto">&lt;b&gt;</div>'
    """
    return f'<div class="dpo-text" dir="auto">{escape(text)}</div>'


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
        style = f"background: rgba({colour}, {0.75 * depth:.2f})"
        spans.append(f'<span style="{style}" title="{reward:+.3f}">{escape(piece)}</span>')
    return f'<div class="dpo-text dpo-shaded" dir="auto">{"".join(spans)}</div>'


def legend() -> str:
    """HTML that says what the shades mean."""
    likelier, less = (
        f'<span style="background: rgba({colour}, 0.75); border-radius: 0.2rem">&nbsp;{what}&nbsp;</span>'
        for colour, what in ((LIKELIER, "likelier after training"), (LESS_LIKELY, "less likely"))
    )
    return f'<div class="dpo-small">{likelier} {less} beta * log(policy / reference) of each token</div>'


def show(html: str) -> None:
    """Put HTML of this module on the page."""
    st.html(html)
