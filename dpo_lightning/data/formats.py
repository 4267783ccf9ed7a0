"""A row of a dataset -> one preference. A new format is a function here, or anywhere and given by its import path."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dpo_lightning.errors import InputError


@dataclass(frozen=True)
class Preference:
    """A prompt and two answers to it as text; `rejected` is None in supervised rows."""

    prompt: str
    chosen: str
    rejected: str | None


class RowFault(ValueError):
    """This row cannot be used; the message says why and stands in the ledger."""


Format = Callable[[Mapping[str, Any]], Preference]

#: What ends the prompt in a whole dialogue of Anthropic's HH data.
ASSISTANT = "\n\nAssistant:"


def triples(row: Mapping[str, Any]) -> Preference:
    """Explicit `prompt`, `chosen`, `rejected`, as in Dahoas/rm-static and Dahoas/rm-single-context."""
    return Preference(text(row, "prompt"), text(row, "chosen"), text(row, "rejected"))


def dialogues(row: Mapping[str, Any]) -> Preference:
    """`chosen` and `rejected` as whole dialogues, the prompt implicit, as in Anthropic/hh-rlhf.

    The prompt ends with the last `\\n\\nAssistant:` of each dialogue and must be the same in both. It is never taken
    from their common prefix: "yes" and "yet" would leave a prompt that ends in "ye".
    """
    (prompt, chosen), (other, rejected) = split_dialogue(row, "chosen"), split_dialogue(row, "rejected")
    if prompt != other:
        raise RowFault("the two dialogues have different prompts")
    return Preference(prompt, chosen, rejected)


def answers(row: Mapping[str, Any]) -> Preference:
    """`prompt` and one answer in `completion`, `response` or `answer`: rows for supervised fine-tuning."""
    column = next((name for name in ("completion", "response", "answer") if name in row), "completion")
    return Preference(text(row, "prompt"), text(row, column), None)


#: Formats by the columns that they need, the most specific first.
BY_COLUMNS: tuple[tuple[frozenset[str], Format], ...] = (
    (frozenset({"prompt", "chosen", "rejected"}), triples),
    (frozenset({"chosen", "rejected"}), dialogues),
    (frozenset({"prompt", "completion"}), answers),
    (frozenset({"prompt", "response"}), answers),
    (frozenset({"prompt", "answer"}), answers),
)


def recognise(columns: Iterable[str], where: str) -> Format:
    """The format of a dataset with these columns; `where` names it in the error.

    Raises:
        InputError: if the columns are those of no format.
    """
    found = set(columns)
    for needed, format in BY_COLUMNS:
        if needed <= found:
            return format
    raise InputError(
        f"{where}: found the columns {', '.join(sorted(found)) or '(none)'}, expected prompt, chosen, rejected (or "
        "whole dialogues in chosen, rejected); rename the columns, or give data.format the import path of a function "
        "row -> dpo_lightning.data.formats.Preference"
    )


def named(name: str) -> Format:
    """A format by its name here (`triples`) or by its import path (`my_package.formats.my_rows`).

    Raises:
        InputError: if there is no such function.
    """
    known = {format.__name__: format for _, format in BY_COLUMNS}
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    try:
        format = getattr(import_module(module), attribute)
        if not callable(format):
            raise TypeError(f"{attribute} is {kind(format)}")
        return format
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"data.format: {name!r} is neither one of {', '.join(known)} nor a function that can be imported ({error})"
        ) from error


def text(row: Mapping[str, Any], column: str) -> str:
    """The string in a cell; raises RowFault if it is none."""
    if column not in row:
        raise RowFault(f"it has no column {column}")
    if not isinstance(row[column], str):
        raise RowFault(f"{column} is {kind(row[column])}, expected a string")
    return row[column]


def split_dialogue(row: Mapping[str, Any], column: str) -> tuple[str, str]:
    """A whole dialogue -> its prompt, up to and with the last marker, and the answer."""
    before, marker, answer = text(row, column).rpartition(ASSISTANT)
    if not marker:
        raise RowFault(f"{column} has no {ASSISTANT!r}")
    return before + marker, answer


def kind(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def check(preference: Preference, pairwise: bool) -> Preference:
    """The preference if something can be learned from it.

    Args:
        preference: what a format returned.
        pairwise: whether the loss compares two answers; a supervised one looks at `chosen` only.

    Raises:
        RowFault: if an answer is missing or nothing but white space, or the two are identical.
    """
    for name in ("prompt", "chosen", "rejected"):
        try:
            (getattr(preference, name) or "").encode()
        except UnicodeEncodeError as error:
            raise RowFault(f"{name} has a lone surrogate at character {error.start}") from None
    if not preference.chosen.strip():
        raise RowFault("chosen is empty")
    if not pairwise:
        return Preference(preference.prompt, preference.chosen, None)
    if preference.rejected is None:
        raise RowFault("there is no rejected answer; use the loss SFT, or a source of pairs")
    if not preference.rejected.strip():
        raise RowFault("rejected is empty")
    if preference.chosen == preference.rejected:
        raise RowFault("chosen and rejected are identical")
    return preference
