"""Formats of rows that hold messages: lists of turns, each with a role and a content.

`role` and `content` may also be called `from` and `value`, as in ShareGPT's files, and the roles human, gpt and bot.
The prompt is everything before the last turn, which must be the assistant's. It is never the two conversations' common
prefix: that would make a user's turn part of an answer where they part earlier.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_lightning.data.preference import Conversation, Message, RowFault, first_of, kind, system_of, text

#: Other names of roles.
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def messages(row: Mapping[str, Any]) -> Conversation:
    """`chosen` and `rejected` as lists of messages; the prompt in both of them, or in a `prompt` of its own.

    As in HuggingFaceH4/ultrafeedback_binarized, trl-lib/ultrafeedback_binarized, Capybara preferences, orpo-dpo-mix,
    Tulu 3's preferences and TRL's conversational rows. A `system` text and `tools` are taken where there are any.
    """
    before = prompt_messages(row)
    (prompt, chosen), (other, rejected) = split_last(row, "chosen", before), split_last(row, "rejected", before)
    if prompt != other:
        raise RowFault("the two conversations differ before their last message")
    return Conversation(with_system(row, prompt), chosen, rejected, tools_of(row))


def sharegpt(row: Mapping[str, Any]) -> Conversation:
    """`conversations` as the prompt's messages, `chosen` and `rejected` as one message each: LLaMA-Factory's pairs."""
    prompt = turns(row.get("conversations"), "conversations")
    answers = {name: split_last({name: [row.get(name)]}, name, prompt) for name in ("chosen", "rejected")}
    return Conversation(with_system(row, prompt), answers["chosen"][1], answers["rejected"][1], tools_of(row))


def instructions(row: Mapping[str, Any]) -> Conversation:
    """`question`, `instruction` or `input` with the texts `chosen` and `rejected`, and perhaps `system`: Orca pairs.

    As in Intel/orca_dpo_pairs and argilla's distilabel-intel-orca-dpo-pairs. An instruction with an input has it on the
    next line.
    """
    column = first_of(row, ("question", "instruction", "input"))
    content = text(row, column)
    if column == "instruction" and row.get("input"):
        content = f"{content}\n{text(row, 'input')}"
    question = {"role": "user", "content": content}
    return Conversation(with_system(row, (question,)), text(row, "chosen"), text(row, "rejected"), tools_of(row))


def messages_and_texts(row: Mapping[str, Any]) -> Conversation:
    """`prompt` as messages, `chosen` and `rejected` as texts."""
    prompt = with_system(row, turns(row.get("prompt"), "prompt"))
    return Conversation(prompt, text(row, "chosen"), text(row, "rejected"), tools_of(row))


def chats(row: Mapping[str, Any]) -> Conversation:
    """`messages` or `conversations` whose last turn is the answer: rows for supervised fine-tuning."""
    column = first_of(row, ("messages", "conversations"))
    prompt, chosen = split_last(row, column, ())
    return Conversation(with_system(row, prompt), chosen, None, tools_of(row))


def chat_answers(row: Mapping[str, Any]) -> Conversation:
    """`prompt` as messages and `completion` as one more: rows for supervised fine-tuning."""
    prompt, chosen = split_last(row, "completion", prompt_messages(row))
    return Conversation(with_system(row, prompt), chosen, None, tools_of(row))


# Messages


def turns(value: object, column: str) -> tuple[Message, ...]:
    """A cell as messages with `role` and `content`; what is None in them, or empty lists of calls, is left out.

    Raises:
        RowFault: if it is no list of messages.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(m, Mapping) for m in value):
        raise RowFault(f"{column} is {kind(value)}, expected a list of messages")
    found = []
    for place, message in enumerate(value):
        known = {name: entry for name, entry in without_none(message).items() if entry != []}
        role, content = known.pop("role", known.pop("from", None)), known.pop("content", known.pop("value", None))
        if not isinstance(role, str):
            raise RowFault(f"message {place} of {column} has no role")
        if isinstance(content, list):
            content = joined(content, f"message {place} of {column}")
        if not isinstance(content, str) and not (content is None and "tool_calls" in known):
            raise RowFault(f"the content of message {place} of {column} is {kind(content)}, expected a string")
        found.append({"role": ROLES.get(role.lower(), role.lower()), "content": content or "", **known})
    return tuple(found)


def joined(parts: Sequence[Any], where: str) -> str:
    """The text of a content in parts; raises RowFault if one is no text."""
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise RowFault(f"the content of {where} is not text alone")
    return "".join(part["text"] for part in parts)


def prompt_messages(row: Mapping[str, Any]) -> tuple[Message, ...] | str | None:
    """An explicit prompt: messages, a text, or None where there is none."""
    prompt = row.get("prompt")
    return prompt if prompt is None or isinstance(prompt, str) else turns(prompt, "prompt")


def split_last(
    row: Mapping[str, Any], column: str, before: tuple[Message, ...] | str | None
) -> tuple[tuple[Message, ...], str]:
    """The messages before the last, and the last one's content.

    Args:
        row: of the source.
        column: of a conversation, or of an answer alone.
        before: an explicit prompt. Messages stand before the answer, if the conversation does not repeat them. A text
            is looked at only where the conversation is an answer alone: whole ones hold it already, as a turn.

    Raises:
        RowFault: if the last message is not an assistant's text, or there is nothing before it.
    """
    found = turns(row.get(column), column)
    if not found or found[-1]["role"] != "assistant":
        raise RowFault(f"the last message of {column} is not the assistant's" if found else f"{column} is empty")
    prompt, answer = found[:-1], found[-1]
    if isinstance(before, str):
        prompt = prompt or ({"role": "user", "content": before},)
    elif before:
        if prompt and prompt != before:
            raise RowFault(f"{column} has {len(found)} messages, expected the prompt's and one answer")
        prompt = before
    if "tool_calls" in answer:
        raise RowFault(f"{column} ends in a tool call, expected a text")
    return prompt, answer["content"]


def with_system(row: Mapping[str, Any], prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt with the row's `system` text before it, unless that is empty or there is one already.

    Raises:
        RowFault: if the prompt has no message.
    """
    if not prompt:
        raise RowFault("there is no message before the answer")
    system = system_of(row)
    own = [turn.get("content") for turn in prompt if turn["role"] == "system"]
    if system is not None and own and system not in own:
        raise RowFault("the row has a system text, and a message of it with another one")
    if system is None or own:
        return prompt
    return ({"role": "system", "content": system}, *prompt)


def tools_of(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The row's `tools`, given as a list of JSON schemas or as its JSON text.

    Raises:
        RowFault: if it is neither.
    """
    tools = row.get("tools") or ()
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowFault(f"tools is no JSON: {error}") from None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowFault(f"tools is {kind(tools)}, expected a list of JSON schemas")
    return tuple(without_none(tool) for tool in tools)


def without_none(value: Any) -> Any:
    """A nested value without the keys that are None only because another row of the column has them."""
    if isinstance(value, Mapping):
        return {name: without_none(entry) for name, entry in value.items() if entry is not None}
    return [without_none(entry) for entry in value] if isinstance(value, list) else value
