"""Tables of tokens: the same by any number of processes, kept and found again, and a ledger of all that was done.

The oracle of a table's line is the tokenizer on that row alone; of the ledger, the table read cell by cell.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerFast

from dpo_lightning.data import compiler
from dpo_lightning.data.compiler import ACTIONS, FEATURES, Compiler, column, ledger, remarked
from dpo_lightning.data.formats import all_pairs, triples
from dpo_lightning.data.preference import Conversation, NoPreference, Preference
from dpo_lightning.data.tokenization import Encoded, PairTokenizer, TooLong
from dpo_lightning.errors import InputError
from tests.streamed import Row, plain, ranked, reader
from tests.tokenizers_built import adds_both, byte_level, joined, sentencepiece


def compiled(rows: list[Row], tokenizer: PreTrainedTokenizerFast | None = None, **options: Any) -> Dataset:
    """All lines of a table of `triples`, dropped ones too."""
    encoder = PairTokenizer(tokenizer or byte_level(), **({"max_length": 1000} | options))
    return Compiler(triples, encoder, pairwise=True)(Dataset.from_list(rows), "rows")


def lines(table: Dataset) -> list[dict[str, Any]]:
    return [dict(line) for line in table]


# Processes and what is kept


@pytest.fixture
def read_rows(tmp_path: Path) -> tuple[Callable[[Row], Preference], Callable[[], int]]:
    """A format of one's own, which any process may call, and how many rows it was given since the last question."""
    file = tmp_path / "read"
    file.touch()

    def counted(row: Row) -> Preference:
        with file.open("a") as out:
            out.write(".")
        return triples(row)

    def since() -> int:
        count = len(file.read_text())
        file.write_text("")
        return count

    return counted, since


def test_two_processes_make_the_table_of_one_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "ROWS_A_PROCESS", 5)
    rows = Dataset.from_list(ranked(23))
    tables, ledgers = [], []
    for processes in (2, 0):
        whole = reader(all_pairs, processes=processes)
        monkeypatch.setattr(compiler, "VERSION", f"{processes}")  # else the second would find what the first has made
        tables.append(lines(whole.table([("rows", rows)], "train")))
        ledgers.append(whole.ledger.to_pylist())
    assert tables[0] == tables[1] and len(tables[0]) > 20
    assert ledgers[0] == ledgers[1] and len(ledgers[0]) > 5


@pytest.mark.parametrize(("first", "then"), [(0, 2), (2, 0), (2, 2), (2, 3)])
def test_what_some_processes_have_made_any_number_finds_again(
    first: int,
    then: int,
    read_rows: tuple[Callable[[Row], Preference], Callable[[], int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiler, "ROWS_A_PROCESS", 5)
    format, since = read_rows
    rows = Dataset.from_list(plain(20, bad=(3,)))
    made = reader(format, processes=first).table([("rows", rows)], "train")
    assert since() == 20
    found = reader(format, processes=then).table([("rows", rows)], "train")
    assert since() == 0
    assert lines(made) == lines(found)


def test_few_rows_are_not_worth_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = Dataset.map

    def watched(self: Dataset, *args: Any, **options: Any) -> Dataset:
        asked.append(options.pop("num_proc"))
        return original(self, *args, **options)

    monkeypatch.setattr(Dataset, "map", watched)
    monkeypatch.setattr(compiler, "ROWS_A_PROCESS", 5)
    for count in (5, 9, 10, 14, 15, 100):
        reader(processes=3).table([("rows", Dataset.from_list(plain(count, f"{count} of")))], "train")
    assert asked == [None, None, 2, 2, 3, 3]


# A line


@pytest.mark.parametrize("build", [byte_level, joined, sentencepiece, adds_both])
def test_a_line_is_what_the_tokenizer_makes_of_its_row_alone(build: Callable[[], PreTrainedTokenizerFast]) -> None:
    rows = [*plain(6), {"prompt": "Hello ", "chosen": "world " * 9, "rejected": "a"}, *plain(3, "long " * 20)]
    encoder = PairTokenizer(build(), 40)
    for number, (row, line) in enumerate(zip(rows, compiled(rows, build(), max_length=40), strict=True)):
        [expected] = encoder([triples(row)])
        assert isinstance(expected, Encoded)
        parts = ("prompt", "chosen", "rejected")
        assert [line[part] for part in parts] == [getattr(expected, part) for part in parts]
        assert [line[f"{part}_tokens"] for part in parts] == [len(line[part]) for part in parts]
        assert tuple(line[f"whole_{part}"] for part in parts) == expected.whole
        assert (line["cut"], line["boundary"], line["text"]) == (expected.cut, expected.boundary, expected.text)
        assert (line["row"], line["pair"], line["fault"]) == (number, 0, "")
        assert not line["bad"] and not line["templated"]


def test_hashes_are_of_the_texts_alone() -> None:
    rows = [*plain(8), plain(8)[3] | {"chosen": " Other."}]
    names = ["prompt_hash", "chosen_hash", "rejected_hash"]
    first = compiled(rows).select_columns(names).to_list()
    for other in (compiled(rows, adds_both()), compiled(rows, max_length=12), compiled(rows, truncation="keep_start")):
        assert other.select_columns(names).to_list() == first
    texts = {(name, row[name]) for row in rows for name in ("prompt", "chosen", "rejected")}
    hashes = {(name, line[f"{name}_hash"]) for line in first for name in ("prompt", "chosen", "rejected")}
    assert len(hashes) == len(texts)


@pytest.mark.parametrize(
    ("result", "bad", "named"),
    [
        (KeyError("x"), True, "mine failed with KeyError: 'x'"),
        (TypeError("no"), True, "mine failed with TypeError: no"),
        (ZeroDivisionError("by 0"), True, "mine failed with ZeroDivisionError: by 0"),
        (Conversation(("a",), " b", " c"), True, "the format returned a Conversation whose prompt is no"),
        (NoPreference("a tie"), False, "a tie"),
        ([], False, "the row has no pair"),
        (None, True, "the format returned a NoneType, expected a Preference"),
        ("text", True, "the format returned a str, expected a Preference"),
        ([Preference("a", " b", " c"), 5], True, "the format returned a int"),
    ],
)
def test_whatever_a_format_of_ones_own_does_to_a_row_is_a_line_of_its_own(
    result: object, bad: bool, named: str
) -> None:
    def mine(row: Row) -> object:
        if row["prompt"] != "row 1?":
            return triples(row)
        if isinstance(result, Exception):
            raise result
        return result

    table = Compiler(mine, PairTokenizer(byte_level(), 1000), pairwise=True)(Dataset.from_list(plain(3)), "rows")
    last = [line for line in table if line["row"] == 1][-1]
    assert last["fault"].startswith(named) and last["bad"] == bad
    assert (last["prompt"], last["chosen_tokens"]) == ([], 0)
    assert [line["row"] for line in table if not line["fault"] and line["row"] != 1] == [0, 2]


def test_a_row_that_a_cut_drops_is_not_bad() -> None:
    rows = [*plain(3), *plain(1, "long " * 90)]
    table = compiled(rows, max_length=60, truncation="drop")
    assert [line["bad"] for line in table] == [False] * 4
    assert table[3]["fault"] == str(PairTokenizer(byte_level(), 60, "drop")([triples(rows[3])])[0])
    assert isinstance(PairTokenizer(byte_level(), 60, "drop")([triples(rows[3])])[0], TooLong)


# The first rows


@pytest.mark.parametrize(
    ("rows", "format", "named"),
    [
        (
            plain(150, bad=range(150)),
            triples,
            r"none of the first 100 .* triples; row 0: chosen is empty; row 1: .*2: ",
        ),
        (plain(7), all_pairs, r"none of the first 7 rows .* all_pairs; row 0: completions is missing"),
        ([{"question": "a"}], None, r"found the columns question \(text\)"),
    ],
)
@pytest.mark.parametrize("processes", [0, 2])
def test_a_wrong_format_dies_before_anything_is_tokenized(
    rows: list[Row], format: Any, named: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compiler, "__call__", lambda *_: pytest.fail("tokenized"))
    with pytest.raises(InputError, match=f"source: {named}") as error:
        reader(format, bad_rows=0.99, processes=processes).table([("source", Dataset.from_list(rows))], "train")
    assert "data.format" in str(error.value)


def test_one_row_that_can_be_used_or_one_tie_among_the_first_is_enough_to_go_on() -> None:
    for first in ({"scores": [1, 2]}, {"scores": [1, 1]}):
        rows = [{"prompt": "a?", "responses": [" b", " c"], "scores": [2, 1]} | first]
        rows += [{"prompt": f"{i}?", "responses": [" b", None], "scores": [2, 1]} for i in range(8)]
        rows += [{"prompt": "z?", "responses": [" b", " c"], "scores": [2, 1]}]
        table = reader(all_pairs, bad_rows=0.8).table([("source", Dataset.from_list(rows))], "train")
        assert table["row"][:][-1] == 9
        with pytest.raises(InputError, match="8 of 10 rows cannot be used"):
            reader(all_pairs, bad_rows=0.7).table([("source", Dataset.from_list(rows))], "train")


# The ledger


@pytest.fixture(scope="module")
def table() -> Dataset:
    """Lines with each kind of remark, some with two, and some with none."""
    rows = [
        *plain(2, bad=(1,)),
        {"prompt": "Hello ", "chosen": "world", "rejected": "a"},
        {"prompt": "a▁b", "chosen": " c", "rejected": " d"},
        {"prompt": "x" * 90, "chosen": " c", "rejected": " d"},
        {"prompt": "▁" * 90 + "Hello ", "chosen": "world", "rejected": "a"},
        *plain(1),
    ]
    return compiled(rows, sentencepiece(), max_length=40)


def expected_ledger(table: Dataset) -> list[tuple[int, str, str]]:
    """`(row, action, reason)`, read cell by cell."""
    return [(line["row"], action, line[name]) for line in table for name, action in ACTIONS.items() if line[name]]


def test_the_ledger_has_a_line_for_each_remark_in_the_rows_order(table: Dataset) -> None:
    found = ledger(table, "val", "here").to_pylist()
    assert [(line["row"], line["action"]) for line in found] == [
        (1, "dropped"),
        (2, "boundary"),
        (3, "text"),
        (4, "cut"),
        (5, "cut"),
        (5, "boundary"),
        (5, "text"),
    ]
    assert [(line["row"], line["action"], line["reason"]) for line in found] == expected_ledger(table)
    assert {(line["split"], line["source"], line["pair"]) for line in found} == {("val", "here", 0)}


@pytest.mark.parametrize("rows", [[], [0, 6], [6, 5, 1], [3, 3]])
def test_remarks_and_columns_of_a_part_of_a_table_are_those_of_its_lines(rows: list[int], table: Dataset) -> None:
    """Also of parts put together, and of parts of these."""
    for part in (table.select(rows), concatenate_datasets([table.select(rows), table]).select(range(len(rows)))):
        for name in ACTIONS:
            assert remarked(part, name).tolist() == [n for n, line in enumerate(part) if line[name]]
        for name in ("row", "bad", "prompt_hash", "whole_prompt"):
            found = column(part, name)
            assert isinstance(found, np.ndarray) and found.tolist() == [line[name] for line in part]
        assert len(ledger(part, "train", "here")) == len(expected_ledger(part))


def test_an_untouched_table_has_an_empty_ledger() -> None:
    assert ledger(compiled(plain(3)), "train", "here").num_rows == 0
    assert set(compiled(plain(3)).column_names) == set(FEATURES)
