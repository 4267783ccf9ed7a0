"""Rows become the preferences that a person reading them would write down, or a fault that says why not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_lightning.data.formats import (
    Format,
    Preference,
    RowFault,
    answers,
    check,
    dialogues,
    named,
    recognise,
    triples,
)
from dpo_lightning.errors import InputError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def test_triples_are_taken_as_they_stand() -> None:
    row = {"prompt": " a\r\n", "chosen": " b ", "rejected": "\tc\0"}
    assert triples(row) == Preference(" a\r\n", " b ", "\tc\0")


@pytest.mark.parametrize(("cell", "said"), [(None, "missing"), (5, "int"), (0.5, "float"), (["a"], "list")])
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_cell_that_is_no_string_is_a_fault_that_names_column_and_kind(column: str, cell: object, said: str) -> None:
    with pytest.raises(RowFault, match=rf"{column}.*{said}"):
        triples({"prompt": "a", "chosen": "b", "rejected": "c"} | {column: cell})


@pytest.mark.parametrize("format", [triples, dialogues, answers])
def test_a_row_without_the_columns_of_its_format_is_a_fault(format: Format) -> None:
    with pytest.raises(RowFault):
        format({"prompt": "a", "text": "b"})


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


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        (["prompt", "chosen", "rejected"], triples),
        (["prompt", "response", "chosen", "rejected"], triples),  # rm-static
        (["rejected", "id", "chosen", "score"], dialogues),
        (["prompt", "completion"], answers),
        (["prompt", "response", "source"], answers),
        (["answer", "prompt"], answers),
    ],
)
def test_columns_say_the_format_whatever_else_there_is(columns: list[str], format: Format) -> None:
    assert recognise(columns, "rows.jsonl") is format


@pytest.mark.parametrize("columns", [["text"], ["prompt", "chosen"], ["id", "rejected"], ["question", "answer"], []])
def test_columns_of_no_format_are_an_error_that_names_source_and_columns(columns: list[str]) -> None:
    with pytest.raises(InputError) as error:
        recognise(columns, "rows.jsonl")
    assert "rows.jsonl" in str(error.value)
    for column in columns or ["(none)"]:
        assert column in str(error.value).split("expected")[0]


@pytest.mark.parametrize("format", [triples, dialogues, answers])
def test_a_format_is_found_by_its_bare_name(format: Callable[..., Preference]) -> None:
    assert named(format.__name__) is format


def test_a_format_is_found_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows_of_mine.py").write_text(
        "from dpo_lightning.data.formats import Preference\n"
        "def questions(row):\n"
        "    return Preference(row['q'], row['good'], row['bad'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert named("rows_of_mine.questions")({"q": "a", "good": "b", "bad": "c"}) == Preference("a", "b", "c")


@pytest.mark.parametrize(
    "name", ["tripels", "no_such_module.rows", "json.no_such", "os.path.no.such", "", ".", "triples."]
)
def test_a_format_that_is_not_there_is_an_error_that_names_it_and_those_that_are(name: str) -> None:
    with pytest.raises(InputError, match="triples, dialogues, answers") as error:
        named(name)
    assert repr(name) in str(error.value)


def test_a_format_that_is_no_function_is_an_error() -> None:
    with pytest.raises(InputError, match=r"os\.path"):
        named("os.path")


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


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_text_that_no_encoding_can_hold_is_a_fault(column: str) -> None:
    """A lone surrogate: half a character, which no file may hold but a format of one's own can make."""
    with pytest.raises(RowFault, match=column):
        check(Preference(**{"prompt": "a", "chosen": "b", "rejected": "c"} | {column: "d\ud800"}), pairwise=True)


def test_an_empty_prompt_is_no_fault() -> None:
    assert check(Preference("", "b", "c"), pairwise=True) == Preference("", "b", "c")
