"""A row of messages has one prompt and one answer or two, however it is written down, or a fault says what it lacks.

The oracle is the conversation that a row is made of: its turns are drawn first, and then written in each known way.
"""

import json
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.conversations import (
    chat_answers,
    chats,
    instructions,
    messages,
    messages_and_texts,
    sharegpt,
    turns,
)
from dpo_lightning.data.formats import named, recognise
from dpo_lightning.data.preference import Conversation, Format, RowFault, check

Turn = dict[str, Any]

few = settings(max_examples=60, deadline=None)


def turn(role: str, content: object, **more: object) -> Turn:
    return {"role": role, "content": content, **more}


def user(text: object, **more: object) -> Turn:
    return turn("user", text, **more)


def bot(text: object, **more: object) -> Turn:
    return turn("assistant", text, **more)


def system(text: str) -> Turn:
    return turn("system", text)


def call(**arguments: object) -> Turn:
    function = {"name": "clock", "arguments": arguments}
    return bot(None, tool_calls=[{"type": "function", "function": function}])


def pair(before: list[Turn], chosen: object = "b", rejected: object = "c", **more: object) -> dict[str, Any]:
    """A row with the prompt in both conversations."""
    return {"chosen": [*before, bot(chosen)], "rejected": [*before, bot(rejected)], **more}


TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}

texts = st.text(max_size=8)
#: Conversations that end in a user's turn, perhaps with a system's turn first.
prompts = st.builds(
    lambda opening, earlier, last: [*opening, *(t for q, a in earlier for t in (user(q), bot(a))), user(last)],
    st.lists(texts.map(system), max_size=1),
    st.lists(st.tuples(texts, texts), max_size=3),
    texts,
)

# Messages


@pytest.mark.parametrize(
    ("role", "wanted"),
    [("human", "user"), ("prompter", "user"), ("gpt", "assistant"), ("bot", "assistant"), ("model", "assistant")]
    + [(role, role) for role in ("user", "assistant", "system", "tool", "observation")],
)
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_roles_and_keys_go_by_other_names_too(keys: tuple[str, str], role: str, wanted: str) -> None:
    for spelled in (role, role.capitalize(), role.upper()) if role != wanted else (role,):
        assert turns([dict(zip(keys, (spelled, "a"), strict=True))], "rows") == (turn(wanted, "a"),)


@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
def test_the_case_of_a_role_does_not_matter_whatever_its_name(role: str) -> None:
    assert turns([turn(role.capitalize(), "a"), turn(role.upper(), "b")], "rows") == (turn(role, "a"), turn(role, "b"))


def test_what_is_empty_because_other_turns_have_it_is_left_out_and_what_is_there_is_kept() -> None:
    padded = {"from": None, "value": None, "name": None, "tool_calls": [], "tool_call_id": None}
    assert turns([user("a") | padded], "rows") == (user("a"),)
    full = turn("tool", "12:00", name="clock", tool_call_id="7")
    assert turns([full | {"tool_calls": None}], "rows") == (full,)
    assert turns([{"role": None, "content": None, "from": "gpt", "value": "a"}], "rows") == (bot("a"),)


def test_what_arrow_fills_in_for_other_rows_does_not_make_another_conversation() -> None:
    """In a Parquet file all calls of a column have the arguments of each of them."""
    written = [[user("a"), call(city="Paris")], [user("a"), call(at=12)]]
    stored = Dataset.from_list([{"prompt": before} for before in written])
    for before, row in zip(written, stored, strict=True):
        assert turns(row["prompt"], "prompt") == turns(before, "prompt")


def test_a_content_in_parts_is_the_text_of_all_of_them() -> None:
    parts = [{"type": "text", "text": "a ", "image": None}, {"type": "text", "text": "b"}]
    assert turns([user(parts)], "rows") == (user("a b"),)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "rows is missing, expected a list"),
        ("a", "rows is of type str"),
        (user("a"), "rows is of type dict"),
        (["a"], "rows is of type list"),
        ([user("a"), None], "rows is of type list"),
        ([user("a"), {"content": "b"}], "message 1 of rows has no role"),
        ([user("a"), turn("", None)], "content of message 1 of rows is missing"),
        ([{"role": 3, "content": "a"}], "message 0 of rows has no role"),
        ([user(5)], "content of message 0 of rows is of type int, expected a string"),
        ([user(None)], "content of message 0 of rows is missing"),
        ([user([])], "content of message 0 of rows is missing"),
        ([user([{"type": "image", "url": "a"}])], "content of message 0 of rows is not text alone"),
        ([user(["a"])], "content of message 0 of rows is not text alone"),
    ],
)
def test_what_is_no_list_of_messages_is_a_fault_that_names_column_and_message(value: object, said: str) -> None:
    with pytest.raises(RowFault, match=said):
        turns(value, "rows")


# The prompt


@few
@given(before=prompts, chosen=texts, rejected=texts)
def test_a_preference_is_the_same_however_it_is_written_down(before: list[Turn], chosen: str, rejected: str) -> None:
    wanted = Conversation(tuple(before), chosen, rejected)
    alone = {"chosen": [bot(chosen)], "rejected": [bot(rejected)]}
    implicit = pair(before, chosen, rejected)
    assert messages(implicit) == wanted
    assert messages(implicit | {"prompt": None, "messages": alone["chosen"]}) == wanted
    assert messages(implicit | {"prompt": "what a turn holds already"}) == wanted
    assert messages(implicit | {"prompt": before}) == wanted
    assert messages(alone | {"prompt": before}) == wanted
    assert sharegpt({"conversations": before, "chosen": bot(chosen), "rejected": bot(rejected)}) == wanted
    assert chats({"messages": [*before, bot(chosen)]}) == Conversation(tuple(before), chosen, None)
    assert chats({"messages": None, "conversations": [*before, bot(chosen)]}).prompt == tuple(before)
    assert chat_answers({"prompt": before, "completion": [bot(chosen)]}) == Conversation(tuple(before), chosen, None)


@few
@given(question=texts, chosen=texts, rejected=texts)
def test_a_question_in_text_is_a_users_turn(question: str, chosen: str, rejected: str) -> None:
    wanted, both = Conversation((user(question),), chosen, rejected), {"chosen": chosen, "rejected": rejected}
    assert messages({"prompt": question, "chosen": [bot(chosen)], "rejected": [bot(rejected)]}) == wanted
    assert named("triples_as_chat")({"prompt": question} | both) == wanted
    for column in ("question", "instruction", "input"):
        assert instructions({column: question} | both) == wanted
    assert chat_answers({"prompt": question, "completion": [bot(chosen)]}) == Conversation(wanted.prompt, chosen, None)


def test_an_instruction_with_an_input_loses_neither() -> None:
    """LLaMA-Factory's alpaca pairs, where the prompt is both, one line after the other."""
    row = {"instruction": "Translate to French.", "input": "Good day", "chosen": "Bonjour", "rejected": "No."}
    assert instructions(row).prompt == (user("Translate to French.\nGood day"),)
    assert instructions(row | {"input": ""}).prompt == (user("Translate to French."),)


@pytest.mark.parametrize(
    ("format", "row", "said"),
    [
        (messages, {"chosen": [user("a"), bot("b")], "rejected": [user("A"), bot("c")]}, "differ before their last"),
        (messages, {"chosen": [user("a"), bot("b")], "rejected": [bot("c")]}, "differ before their last"),
        (
            messages,  # they part earlier: what a user says is in no answer
            {"chosen": [user("a"), bot("b"), user("e"), bot("f")], "rejected": [user("a"), bot("c")]},
            "differ before their last",
        ),
        (messages, pair([user("a")]) | {"prompt": [user("e")]}, "chosen has 2 messages, expected the prompt's and one"),
        (
            messages,  # an answer of several messages
            {"prompt": [user("a")], "chosen": [bot("b"), user("d"), bot("e")], "rejected": [bot("c")]},
            "chosen has 3 messages",
        ),
        (messages, {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [user("c")]}, "last message of rejected"),
        (messages, {"chosen": [user("a"), user("b")], "rejected": [user("a"), bot("c")]}, "last message of chosen is"),
        (messages, {"chosen": [], "rejected": [user("a"), bot("c")]}, "chosen is empty"),
        (messages, {"chosen": [user("a"), bot("b")]}, "rejected is missing"),
        (sharegpt, {"conversations": [user("a")], "chosen": user("b"), "rejected": bot("c")}, "last message of chosen"),
        (sharegpt, {"conversations": [user("a")], "chosen": bot("b"), "rejected": None}, "rejected is"),
        (sharegpt, {"conversations": "a", "chosen": bot("b"), "rejected": bot("c")}, "conversations is of type str"),
        (chats, {"messages": [user("a"), bot("b"), user("c")]}, "last message of messages is not the assistant's"),
        (chats, {"conversations": []}, "conversations is empty"),
        (chat_answers, {"prompt": [user("a")], "completion": [user("b")]}, "last message of completion"),
        (instructions, {"question": None, "chosen": "b", "rejected": "c"}, "question is missing"),
        (named("triples_as_chat"), {"prompt": [user("a")], "chosen": "b", "rejected": "c"}, "prompt is of type list"),
    ],
)
def test_a_row_without_one_prompt_and_its_answers_is_a_fault(format: Format, row: Turn, said: str) -> None:
    with pytest.raises(RowFault, match=said):
        format(row)


@pytest.mark.parametrize(
    ("format", "row"),
    [
        (messages, pair([])),
        (messages, pair([], prompt=[])),
        (sharegpt, {"conversations": [], "chosen": bot("b"), "rejected": bot("c")}),
        (chats, {"messages": [bot("b")]}),
        (chat_answers, {"prompt": [], "completion": [bot("b")]}),
    ],
)
def test_an_answer_to_nothing_is_a_fault(format: Format, row: Turn) -> None:
    with pytest.raises(RowFault):
        check(format(row), pairwise=False)


# System prompts, tools and calls


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"system": ["Be brief."]}, "system is of type list, expected text"),
        ({"system_prompt": {"role": "system"}}, "system_prompt is of type dict, expected text"),
        (
            {"system": "Be brief.", "system_prompt": "Be kind."},
            "system and system_prompt are two different",
        ),
    ],
)
def test_a_system_text_that_cannot_be_meant_is_a_fault(row: Turn, said: str) -> None:
    for whole in (pair([user("a")]) | row, {"question": "a", "chosen": "b", "rejected": "c"} | row):
        with pytest.raises(RowFault, match=said):
            recognise([whole], "rows")(whole)


def test_two_system_texts_are_a_fault_and_the_same_twice_is_none() -> None:
    row = pair([system("Be brief."), user("a")])
    assert messages(row | {"system": "Be brief."}) == messages(row)
    turns = {"messages": [system("Be brief."), user("a"), bot("b")]}
    assert chats(turns | {"system": "Be brief."}) == chats(turns)
    for format, other in ((messages, row), (chats, turns)):
        with pytest.raises(RowFault, match="a message of it with another one"):
            format(other | {"system": "Be kind."})


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    ("format", "row"),
    [
        (messages, pair([user("a")])),
        (messages, {"prompt": "a", "chosen": [bot("b")], "rejected": [bot("c")]}),
        (sharegpt, {"conversations": [user("a")], "chosen": bot("b"), "rejected": bot("c")}),
        (instructions, {"question": "a", "chosen": "b", "rejected": "c"}),
        (messages_and_texts, {"prompt": [user("a")], "chosen": "b", "rejected": "c"}),
        (named("triples_as_chat"), {"prompt": "a", "chosen": "b", "rejected": "c"}),
        (chats, {"messages": [user("a"), bot("b")]}),
        (chat_answers, {"prompt": [user("a")], "completion": [bot("b")]}),
    ],
)
def test_a_system_text_stands_first_where_it_says_something(format: Format, row: Turn, column: str) -> None:
    assert format(row | {column: "Be brief."}).prompt == (system("Be brief."), user("a"))
    for nothing in (None, "", " \n"):
        assert format(row | {column: nothing}).prompt == (user("a"),)


def test_tools_may_be_a_list_or_its_json_text_and_lose_what_other_rows_have() -> None:
    padded = {**TOOL, "strict": None, "function": {**TOOL["function"], "description": None}}
    for written in ([TOOL], (TOOL,), [padded], json.dumps([TOOL])):
        assert messages(pair([user("a")], tools=written)).tools == (TOOL,)
    for none in (None, "", [], "[]"):
        assert messages(pair([user("a")], tools=none)).tools == ()


@pytest.mark.parametrize("tools", ["[{", "clock", '"clock"', '{"a": 1}', "[1]", {"a": 1}, ["clock"], 5])
def test_tools_that_are_no_list_of_schemas_are_a_fault(tools: object) -> None:
    with pytest.raises(RowFault, match="tools is"):
        messages(pair([user("a")], tools=tools))


def test_a_prompt_may_call_a_tool_and_an_answer_may_not() -> None:
    before = [user("a"), call(city="Paris"), turn("tool", "12:00", name="clock")]
    assert messages(pair(before)).prompt == (before[0], before[1] | {"content": ""}, before[2])
    for ending in (call(), call() | {"content": "One moment."}):
        with pytest.raises(RowFault, match="rejected ends in a tool call"):
            messages({"chosen": [user("a"), bot("b")], "rejected": [user("a"), ending]})


# What can be learned from


@pytest.mark.parametrize(
    ("conversation", "said"),
    [
        (Conversation((user("a"),), " \n", "c"), "chosen is empty"),
        (Conversation((user("a"),), "b", ""), "rejected is empty"),
        (Conversation((user("a"),), "b", None), "no rejected answer.*SFT"),
        (Conversation((user("a"),), "b", "b"), "identical"),
        (Conversation((system("a"), user("d\ud800")), "b", "c"), "message 1 has a lone surrogate at character 1"),
        (Conversation((user("a"),), "b", "d\udc00"), "rejected has a lone surrogate"),
    ],
)
def test_a_conversation_of_which_nothing_can_be_learned_is_a_fault(conversation: Conversation, said: str) -> None:
    with pytest.raises(RowFault, match=said):
        check(conversation, pairwise=True)


def test_a_supervised_conversation_keeps_all_but_its_rejected_answer() -> None:
    whole = Conversation((system("s"), user("a")), "b", "", (TOOL,))
    assert check(whole, pairwise=False) == Conversation((system("s"), user("a")), "b", None, (TOOL,))
