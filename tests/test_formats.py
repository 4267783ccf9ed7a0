"""Columns say the format, rows become the preferences that a person reading them would write down, or a fault says why.

The oracle is `HUB`: rows with the columns of the data sets themselves, of which it is known what they say. Formats of
messages and of several answers have files of their own.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset

from dpo_lightning.data.conversations import chat_answers, chats
from dpo_lightning.data.formats import BY_COLUMNS, BY_NAME, answers, dialogues, named, recognise, triples
from dpo_lightning.data.preference import Conversation, Format, Preference, RowFault, check
from dpo_lightning.data.rankings import all_pairs
from dpo_lightning.errors import InputError
from tests.hub_rows import ASSISTANT, BAD, GOOD, HUB, HUMAN, WHY, Row, chat, turn

SUPERVISED = (answers, chats, chat_answers)


@pytest.fixture(params=HUB)
def hub(request: pytest.FixtureRequest) -> tuple[Row, Format]:
    return HUB[request.param]


def test_every_format_that_columns_choose_has_a_row_here() -> None:
    assert {format for _, format in HUB.values()} == {format for format, _ in BY_COLUMNS}


def test_a_row_of_the_hub_is_recognised_and_its_answers_are_told_apart(hub: tuple[Row, Format]) -> None:
    row, format = hub
    [stored] = Dataset.from_list([row])
    for each in (row, stored):
        assert recognise([each], "rows") is format
        found = format(each)
        assert isinstance(found, Preference | Conversation)
        assert (found.chosen, found.rejected) == (GOOD, None if format in SUPERVISED else BAD)
        assert WHY in (found.prompt if isinstance(found, Preference) else found.prompt[-1]["content"])


def test_a_format_does_not_depend_on_the_order_of_columns_or_on_others(hub: tuple[Row, Format]) -> None:
    row, format = hub
    assert recognise([{"id": 7, "meta": {"a": 1}, "tags": []} | dict(reversed(row.items()))], "rows") is format


def test_what_a_column_holds_is_read_off_the_first_row_that_has_something(hub: tuple[Row, Format]) -> None:
    row, format = hub
    empty = {name: [] if isinstance(value, list) else None for name, value in row.items()}
    assert recognise([dict.fromkeys(row), empty, row, dict.fromkeys(row, 5)], "rows") is format


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_column_without_anything_in_it_may_hold_what_the_format_needs(column: str) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert recognise([row | {column: None}] * 3, "rows") is triples


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        ({"text": "a"}, "text (text)"),
        ({"prompt": "a", "chosen": "b"}, "chosen (text), prompt (text)"),
        ({"chosen": chat("a"), "rejected": "b"}, "chosen (messages), rejected (text)"),
        ({"prompt": "a", "chosen": 1, "rejected": 2.5}, "chosen (number), prompt (text), rejected (number)"),
        ({"prompt": "a", "chosen": ["b"], "rejected": turn("user", "c")}, "chosen (list), .*, rejected (message)"),
        ({"prompt": {"a": 1}, "answer": None}, "answer (unknown), prompt (other)"),
        ({"messages": [{"input": "a", "output": "b"}]}, "messages (list)"),
        ({"instruction": "a", "output": "b"}, "instruction (text), output (text)"),
        ({}, "(none)"),
    ],
)
def test_columns_of_no_format_are_an_error_that_names_the_source_and_what_they_hold(row: Row, kinds: str) -> None:
    pattern = kinds.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(InputError, match=rf"rows\.jsonl: found the columns {pattern}, expected .*data\.format"):
        recognise([row], "rows.jsonl")


# Text


def test_triples_are_taken_as_they_stand() -> None:
    row = {"prompt": " a\r\n", "chosen": " b ", "rejected": "\tc\0"}
    assert triples(row) == Preference(" a\r\n", " b ", "\tc\0")


@pytest.mark.parametrize(("cell", "kind"), [(None, "missing"), (5, "int"), (0.5, "float"), (["a"], "list")])
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_cell_that_is_no_string_is_a_fault_that_names_column_and_kind(column: str, cell: object, kind: str) -> None:
    with pytest.raises(RowFault, match=rf"{column}.*{kind}"):
        triples({"prompt": "a", "chosen": "b", "rejected": "c"} | {column: cell})


@pytest.mark.parametrize("format", [format for format, _ in BY_COLUMNS] + list(BY_NAME), ids=lambda f: f.__name__)
def test_a_row_without_the_columns_of_its_format_is_a_fault(format: Format) -> None:
    for row in ({}, {"prompt": "a", "text": "b"}, {"chosen": None, "rejected": None}, {"conversations": []}):
        with pytest.raises(RowFault):
            format(row)


def test_a_dialogue_splits_at_its_last_marker() -> None:
    opening = f"{HUMAN} hi{ASSISTANT} hello{HUMAN} again{ASSISTANT}"
    row = {"chosen": opening + " sure", "rejected": opening + " no"}
    assert dialogues(row) == Preference(opening, " sure", " no")


def test_a_prompt_is_never_the_common_prefix_of_two_dialogues() -> None:
    opening = f"{HUMAN} is it?{ASSISTANT}"
    assert dialogues({"chosen": opening + " yes", "rejected": opening + " yet"}) == Preference(opening, " yes", " yet")


@pytest.mark.parametrize(
    "rejected",
    [
        f"{HUMAN} other{ASSISTANT} no",
        f"{HUMAN} hi{ASSISTANT} no{HUMAN} why?{ASSISTANT} so",  # a turn more
        f"{HUMAN} hi {ASSISTANT} no",  # one space more
    ],
)
def test_dialogues_with_different_prompts_are_refused(rejected: str) -> None:
    with pytest.raises(RowFault, match="different prompts"):
        dialogues({"chosen": f"{HUMAN} hi{ASSISTANT} yes", "rejected": rejected})


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_a_dialogue_without_a_marker_is_refused_by_the_name_of_its_column(column: str) -> None:
    row = dict.fromkeys(("chosen", "rejected"), f"{HUMAN} hi{ASSISTANT} yes") | {column: "just text"}
    with pytest.raises(RowFault, match=f"{column} has no .*Assistant"):
        dialogues(row)


@pytest.mark.parametrize("column", ["completion", "response", "answer"])
def test_an_answer_alone_has_no_rejected_one(column: str) -> None:
    assert answers({"prompt": "a", column: " b"}) == Preference("a", " b", None)


# Names


@pytest.mark.parametrize("format", [format for format, _ in BY_COLUMNS] + list(BY_NAME), ids=lambda f: f.__name__)
def test_a_format_is_found_by_its_bare_name(format: Callable[..., Preference]) -> None:
    assert named(format.__name__) is format


def test_formats_that_columns_do_not_tell_from_others_go_by_name_alone() -> None:
    assert set(BY_NAME) == {all_pairs}
    assert not set(BY_NAME) & {format for format, _ in BY_COLUMNS}


def test_a_format_is_found_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows_of_mine.py").write_text(
        "from dpo_lightning.data.preference import Preference\n"
        "def questions(row):\n"
        "    return Preference(row['q'], row['good'], row['bad'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert named("rows_of_mine.questions")({"q": "a", "good": "b", "bad": "c"}) == Preference("a", "b", "c")


@pytest.mark.parametrize(
    "name", ["tripels", "no_such_module.rows", "json.no_such", "os.path.no.such", "", ".", "triples."]
)
def test_a_format_that_is_not_there_is_an_error_that_names_it_and_those_that_are(name: str) -> None:
    with pytest.raises(InputError) as error:
        named(name)
    for known in (name, *(format.__name__ for format, _ in BY_COLUMNS), *(format.__name__ for format in BY_NAME)):
        assert known in str(error.value)


@pytest.mark.parametrize("name", ["os.path", "math.pi", "dpo_lightning.data.formats.ASSISTANT"])
def test_a_format_that_is_no_function_is_an_error(name: str) -> None:
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        named(name)


# What can be learned from


@pytest.mark.parametrize("blank", ["", " ", "\n\t\r\n", "\u00a0\u2003\u3000"])
def test_an_answer_of_white_space_is_a_fault(blank: str) -> None:
    with pytest.raises(RowFault, match="chosen is empty"):
        check(Preference("a", blank, "c"), pairwise=True)
    with pytest.raises(RowFault, match="rejected is empty"):
        check(Preference("a", "b", blank), pairwise=True)
    with pytest.raises(RowFault, match="chosen is empty"):
        check(Preference("a", blank, None), pairwise=False)


def test_identical_answers_are_a_fault_and_almost_identical_ones_are_not() -> None:
    with pytest.raises(RowFault, match="identical"):
        check(Preference("a", "b", "b"), pairwise=True)
    for other in ("b ", "B", "bb", "b\0"):
        assert check(Preference("a", "b", other), pairwise=True) == Preference("a", "b", other)


def test_a_pair_without_a_rejected_answer_is_a_fault_that_says_what_to_do() -> None:
    with pytest.raises(RowFault, match=r"rejected.*SFT"):
        check(Preference("a", "b", None), pairwise=True)


@pytest.mark.parametrize("rejected", [None, "", "b", "c"])
def test_supervision_does_not_look_at_the_rejected_answer(rejected: str | None) -> None:
    assert check(Preference("a", "b", rejected), pairwise=False) == Preference("a", "b", None)
    assert check(Preference("a", "b", rejected, True), pairwise=False) == Preference("a", "b", None, True)


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_text_that_no_encoding_can_hold_is_a_fault(column: str) -> None:
    """A lone surrogate: half a character, which no file may hold but a format of one's own can make."""
    with pytest.raises(RowFault, match=column):
        check(Preference(**{"prompt": "a", "chosen": "b", "rejected": "c"} | {column: "d\ud800"}), pairwise=True)


@pytest.mark.parametrize("cell", [5, ["b"]])
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_cell_that_a_format_of_ones_own_passes_on_is_a_fault_where_it_is_no_string(column: str, cell: object) -> None:
    with pytest.raises(RowFault, match=column):
        check(Preference(**{"prompt": "a", "chosen": "b", "rejected": "c"} | {column: cell}), pairwise=True)


@pytest.mark.parametrize("column", ["prompt", "chosen"])
def test_a_missing_cell_that_a_format_of_ones_own_passes_on_is_a_fault(column: str) -> None:
    with pytest.raises(RowFault, match=f"{column} is missing"):
        check(Preference(**{"prompt": "a", "chosen": "b", "rejected": "c"} | {column: None}), pairwise=True)


def test_an_empty_prompt_is_no_fault() -> None:
    assert check(Preference("", "b", "c"), pairwise=True) == Preference("", "b", "c")


@pytest.mark.parametrize("other", [None, "text", ("a", "b", "c"), {"prompt": "a", "chosen": "b", "rejected": "c"}])
def test_what_is_no_preference_is_a_fault_that_names_its_kind(other: object) -> None:
    with pytest.raises(RowFault, match=f"returned a {type(other).__name__}, expected"):
        check(other, pairwise=True)  # type: ignore[arg-type]


#: Rows of every format that gives plain text.
TEXTS = {name: (row, format) for name, (row, format) in HUB.items() if isinstance(format(row), Preference)} | {
    "all answers": ({"prompt": WHY, "responses": [BAD, GOOD], "scores": [0, 1]}, all_pairs)
}


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_system_text_is_never_left_out_of_plain_text_in_silence(name: str, column: str) -> None:
    row, format = TEXTS[name]
    assert format(row | {column: ""}) == format(row | {column: None}) == format(row)
    with pytest.raises(RowFault, match=r"system text.*_as_chat"):
        format(row | {column: "Be kind."})


@pytest.mark.parametrize("name", [name for name, (_, format) in TEXTS.items() if format is not dialogues])
def test_any_format_of_plain_text_becomes_conversations_by_name(name: str) -> None:
    """With the system text as a message of its own, and tools."""
    row, format = TEXTS[name]
    chat = named(f"{format.__name__}_as_chat")
    assert chat.__name__ == f"{format.__name__}_as_chat" and chat == named(chat.__name__)
    tool = {"type": "function", "function": {"name": "look"}}
    pairs, found = format(row), chat(row | {"system": "Be kind.", "tools": [tool]})
    for pair, conversation in zip(*((x if isinstance(x, list) else [x]) for x in (pairs, found)), strict=True):
        assert [turn["content"] for turn in conversation.prompt] == ["Be kind.", pair.prompt]
        assert (conversation.chosen, conversation.rejected) == (pair.chosen, pair.rejected)
        assert conversation.tools == (tool,)
    [question] = (found if isinstance(found := chat(row), list) else [found])[0].prompt
    assert question["role"] == "user"


@pytest.mark.parametrize(
    "prompt", ["a text", ("a", "b"), ({"content": "no role"},), ({"role": 5, "content": "a"},), None]
)
def test_a_conversation_of_ones_own_without_messages_is_a_fault(prompt: object) -> None:
    with pytest.raises(RowFault, match="no sequence of messages"):
        check(Conversation(prompt, "b", "c"), pairwise=True)  # type: ignore[arg-type]


def test_an_object_without_a_name_is_no_format() -> None:
    with pytest.raises(InputError, match="NAMELESS is of type partial"):
        named("tests.test_formats.NAMELESS")


#: Callable, but errors and the ledger could not name it; `functools.partial` is one.
NAMELESS = partial(triples)


def test_an_answer_that_is_labelled_bad_is_not_imitated() -> None:
    row = {"prompt": "a", "completion": "b"}
    assert answers(row | {"label": True}) == answers(row)
    with pytest.raises(RowFault, match="label"):
        answers(row | {"label": False})
