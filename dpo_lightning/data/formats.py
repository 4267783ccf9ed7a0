"""A row of a dataset -> preferences. A new format is a function here, or anywhere and given by its import path.

Formats of rows with messages stand in `conversations`, those of rows with several answers in `rankings`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from dpo_lightning.data.conversations import (
    chat_answers,
    chats,
    instructions,
    messages,
    messages_and_texts,
    sharegpt,
    tools_of,
    with_system,
)
from dpo_lightning.data.preference import (
    SYSTEM,
    Conversation,
    Format,
    Preference,
    Preferences,
    RowFault,
    first_of,
    plain,
    text,
)
from dpo_lightning.data.rankings import (
    ANSWERS,
    PROMPTS,
    all_pairs,
    arena,
    best_worst,
    helpsteer3,
    safe_rlhf,
    shp,
    stack_exchange,
)
from dpo_lightning.errors import InputError

#: What ends the prompt in a whole dialogue of Anthropic's HH data.
ASSISTANT = "\n\nAssistant:"


def triples(row: Mapping[str, Any]) -> Preference:
    """Explicit `prompt`, `chosen`, `rejected`, as in Dahoas/rm-static and Dahoas/rm-single-context."""
    return plain(row, text(row, "prompt"), text(row, "chosen"), text(row, "rejected"))


def dialogues(row: Mapping[str, Any]) -> Preference:
    """`chosen` and `rejected` as whole dialogues, the prompt implicit, as in Anthropic/hh-rlhf.

    The prompt ends with the last `\\n\\nAssistant:` of each dialogue and must be the same in both. It is never taken
    from their common prefix: "yes" and "yet" would leave a prompt that ends in "ye".
    """
    (prompt, chosen), (other, rejected) = split_dialogue(row, "chosen"), split_dialogue(row, "rejected")
    if prompt != other:
        raise RowFault("the two dialogues have different prompts")
    return plain(row, prompt, chosen, rejected)


def answers(row: Mapping[str, Any]) -> Preference:
    """`prompt` and one answer in `completion`, `response` or `answer`: rows for supervised fine-tuning."""
    if row.get("label") is False:
        raise RowFault("its label says that the answer is a bad one, from which nothing is to be learned by imitation")
    return plain(row, text(row, "prompt"), text(row, first_of(row, ("completion", "response", "answer"))), None)


def split_dialogue(row: Mapping[str, Any], column: str) -> tuple[str, str]:
    """A whole dialogue -> its prompt, up to and with the last marker, and the answer."""
    before, marker, answer = text(row, column).rpartition(ASSISTANT)
    if not marker:
        raise RowFault(f"{column} has no {ASSISTANT!r}")
    return before + marker, answer


#: What a column holds, as far as formats differ by it; `unknown` where the first rows have nothing in it.
Kind = Literal["text", "messages", "message", "list", "number", "other", "unknown"]

#: Formats by the columns that they need and what these hold, the most specific first; `a|b` is either of two columns.
BY_COLUMNS: tuple[tuple[Format, dict[str, Kind]], ...] = (
    (sharegpt, {"conversations": "messages", "chosen": "message", "rejected": "message"}),
    (messages, {"chosen": "messages", "rejected": "messages"}),
    (triples, {"prompt": "text", "chosen": "text", "rejected": "text"}),
    (instructions, {"question|instruction|input": "text", "chosen": "text", "rejected": "text"}),
    (messages_and_texts, {"prompt": "messages", "chosen": "text", "rejected": "text"}),
    (dialogues, {"chosen": "text", "rejected": "text"}),
    (safe_rlhf, {"prompt": "text", "response_0": "text", "response_1": "text", "better_response_id": "number"}),
    (shp, {"history": "text", "human_ref_A": "text", "human_ref_B": "text", "labels": "number"}),
    (stack_exchange, {"question": "text", "response_j": "text", "response_k": "text"}),
    (helpsteer3, {"context": "messages", "response1": "text", "response2": "text", "overall_preference": "number"}),
    (arena, {"conversation_a": "messages", "conversation_b": "messages", "winner": "text"}),
    (best_worst, {"|".join(PROMPTS): "text", "|".join(ANSWERS): "list"}),
    (chat_answers, {"prompt": "messages", "completion": "messages"}),
    (answers, {"prompt": "text", "completion|response|answer": "text"}),
    (chats, {"messages|conversations": "messages"}),
)

#: Formats that only a name chooses; and those of plain text whose pairs a name can make conversations of.
BY_NAME: tuple[Format, ...] = (all_pairs,)
PLAIN: tuple[Format, ...] = (triples, best_worst, all_pairs, safe_rlhf, shp, stack_exchange, answers)


@dataclass(frozen=True)
class AsChat:
    """A format of plain text, the prompt of which becomes a user's turn, behind the row's system text if it has one."""

    format: Format

    @property
    def __name__(self) -> str:
        return f"{self.format.__name__}_as_chat"

    def __call__(self, row: Mapping[str, Any]) -> Preferences:
        found = self.format({name: value for name, value in row.items() if name not in SYSTEM})
        return [self._chat(row, pair) for pair in found] if isinstance(found, list) else self._chat(row, found)

    def _chat(self, row: Mapping[str, Any], pair: Preference) -> Conversation:
        prompt = with_system(row, ({"role": "user", "content": pair.prompt},))
        return Conversation(prompt, pair.chosen, pair.rejected, tools_of(row))


def recognise(rows: Sequence[Mapping[str, Any]], where: str) -> Format:
    """The format of a source, by the columns of its first rows and what they hold; `where` names it in the error.

    Raises:
        InputError: if the columns are those of no format.
    """
    found = kinds(rows)
    for format, needed in BY_COLUMNS:
        if all(
            any(found.get(name) in (kind, "unknown") for name in names.split("|")) for names, kind in needed.items()
        ):
            return format
    columns = ", ".join(f"{name} ({found[name]})" for name in sorted(found)) or "(none)"
    raise InputError(
        f"{where}: found the columns {columns}, expected prompt, chosen, rejected (or whole dialogues in chosen, "
        "rejected; docs/data.md lists all formats); rename the columns, or give data.format the import path of a "
        "function row -> dpo_lightning.data.preference.Preference"
    )


def kinds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Kind]:
    """What each column holds, by the first row that has anything in it."""
    found: dict[str, Kind] = {}
    for row in rows:
        for name, value in row.items():
            if found.get(name, "unknown") == "unknown":
                found[name] = kind_of(value)
    return found


def kind_of(value: object) -> Kind:
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool | int | float):
        return "number"
    if isinstance(value, Mapping):
        return "message" if {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys() else "other"
    if isinstance(value, list):
        if not value:
            return "unknown"
        return "messages" if all(kind_of(entry) == "message" for entry in value) else "list"
    return "unknown" if value is None else "other"


def named(name: str) -> Format:
    """A format by its name here (`triples`) or by its import path (`my_package.formats.my_rows`).

    Raises:
        InputError: if there is no such function.
    """
    chats = (AsChat(format) for format in PLAIN)
    known = {format.__name__: format for format in (*(format for format, _ in BY_COLUMNS), *BY_NAME, *chats)}
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    try:
        format = getattr(import_module(module), attribute)
        if not callable(format) or not hasattr(format, "__name__"):
            raise TypeError(f"{attribute} is of type {type(format).__name__}")
        return format
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"data.format: {name!r} is neither one of {', '.join(known)} nor a function that can be imported ({error})"
        ) from error
