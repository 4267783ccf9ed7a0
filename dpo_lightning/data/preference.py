"""What a format makes of a row: a prompt and two answers, as text or as messages; or why it cannot."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: One turn of a conversation: `role` (system, user, assistant, tool), `content`, and what else a chat template reads.
Message = dict[str, Any]


@dataclass(frozen=True)
class Preference:
    """A prompt and two answers to it as text; `rejected` is None in supervised rows.

    `templated` texts come from a chat template and hold their special tokens, BOS too, as the template wrote them.
    """

    prompt: str
    chosen: str
    rejected: str | None
    templated: bool = False


@dataclass(frozen=True)
class Conversation:
    """The same as messages: the turns before the answer, and the content of two assistant turns that may follow.

    Args:
        prompt: all messages before the answer, a system prompt among them.
        chosen: the preferred answer.
        rejected: the other one; None in supervised rows.
        tools: JSON schemas of functions that the assistant may call, for templates that know of them.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str | None
    tools: tuple[Mapping[str, Any], ...] = ()


#: Columns with a system prompt.
SYSTEM = ("system", "system_prompt")

#: What a format gives: one preference, or as many as a row holds.
Preferences = Preference | Conversation | Sequence[Preference | Conversation]

Format = Callable[[Mapping[str, Any]], Preferences]


class RowFault(ValueError):
    """This row cannot be used; the message says why and stands in the ledger."""


class NoPreference(RowFault):
    """There is nothing wrong with this row, but it prefers no answer: a tie. It does not count as a bad row."""


def text(row: Mapping[str, Any], column: str) -> str:
    """The string in a cell; raises RowFault if it is none."""
    if column not in row:
        raise RowFault(f"it has no column {column}")
    if not isinstance(row[column], str):
        raise RowFault(f"{column} is {kind(row[column])}, expected a string")
    return row[column]


def number(row: Mapping[str, Any], column: str) -> float:
    """The number in a cell; raises RowFault if it is none."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise RowFault(f"{column} is {kind(value)}, expected a number")
    return value


def plain(row: Mapping[str, Any], prompt: str, chosen: str, rejected: str | None) -> Preference:
    """A preference of texts out of a row without a system text.

    Raises:
        RowFault: if the row has one, for which plain text has no place.
    """
    if system_of(row):
        raise RowFault(
            "the row has a system text, for which plain text has no place; set data.format to one of ..._as_chat or "
            "to a function of yours (docs/data.md), or drop the column"
        )
    return Preference(prompt, chosen, rejected)


def system_of(row: Mapping[str, Any]) -> str | None:
    """The row's system text, if it has one that says something.

    Raises:
        RowFault: if it is no text, or there are two.
    """
    given = {name: row[name] for name in SYSTEM if row.get(name)}
    for name, value in given.items():
        if not isinstance(value, str):
            raise RowFault(f"{name} is {kind(value)}, expected text")
    texts = {value for value in given.values() if value.strip()}
    if len(texts) > 1:
        raise RowFault(f"{' and '.join(given)} are two different system texts")
    return next(iter(texts), None)


def first_of(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The first of some columns that the row has; the first of all where it has none."""
    return next((name for name in columns if row.get(name) is not None), columns[0])


def kind(value: object) -> str:
    if value is None:
        return "missing"
    return "not a number" if value != value else f"of type {type(value).__name__}"


def check(preference: Preference | Conversation, pairwise: bool) -> Preference | Conversation:
    """The preference if something can be learned from it; without its rejected answer if that is not asked for.

    Args:
        preference: what a format returned.
        pairwise: whether the loss compares two answers; a supervised one looks at `chosen` only.

    Raises:
        RowFault: if an answer is missing or nothing but white space, or the two are identical.
    """
    if not isinstance(preference, Preference | Conversation):
        name = type(preference).__name__
        raise RowFault(f"the format returned a {name}, expected a Preference, a Conversation or a list of them")
    if isinstance(preference, Conversation) and not (
        isinstance(preference.prompt, Sequence)
        and all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in preference.prompt)
    ):
        raise RowFault("the format returned a Conversation whose prompt is no sequence of messages with a role")
    parts = {"chosen": preference.chosen} | ({} if preference.rejected is None else {"rejected": preference.rejected})
    if isinstance(preference, Preference):
        parts["prompt"] = preference.prompt
    else:
        parts |= {f"message {i}": str(turn.get("content") or "") for i, turn in enumerate(preference.prompt)}
    for name, part in parts.items():
        if not isinstance(part, str):
            raise RowFault(f"{name} is {kind(part)}, expected a string")
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise RowFault(f"{name} has a lone surrogate at character {error.start}") from None
    if not preference.chosen.strip():
        raise RowFault("chosen is empty")
    if not pairwise:
        return without_rejected(preference)
    if preference.rejected is None:
        raise RowFault("there is no rejected answer; use the loss SFT, or a source of pairs")
    if not preference.rejected.strip():
        raise RowFault("rejected is empty")
    if preference.chosen == preference.rejected:
        raise RowFault("chosen and rejected are identical")
    return preference


def without_rejected(preference: Preference | Conversation) -> Preference | Conversation:
    if isinstance(preference, Preference):
        return Preference(preference.prompt, preference.chosen, None, preference.templated)
    return Conversation(preference.prompt, preference.chosen, None, preference.tools)
