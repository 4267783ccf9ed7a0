"""From files to batches: who trains and who validates, what is dropped and said, and whose row a pair is."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from dpo_lightning.data import compiler
from dpo_lightning.data.batching import PlannedBatch
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.formats import triples
from dpo_lightning.data.packing import LAYOUTS, PROMPT, Layout, PreferenceBatch
from dpo_lightning.data.pairs import TokenizedPairs
from dpo_lightning.data.preference import Preference
from dpo_lightning.data.tokenization import PairTokenizer
from dpo_lightning.errors import InputError
from tests.tokenizers_built import adds_bos, adds_both, byte_level, joined, no_eos, sentencepiece, spell

Row = dict[str, Any]


def pairs(count: int, answers: int = 1) -> list[Row]:
    """`count` rows, `answers` of them for each prompt."""
    return [
        {"prompt": f"What is {i // answers}?", "chosen": f" It is {i}.", "rejected": f" No idea, {i}."}
        for i in range(count)
    ]


def write(path: Path, rows: list[Row]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def compiled(
    source: str | list[str],
    tokenizer: PreTrainedTokenizerFast | None = None,
    context: int | None = None,
    pairwise: bool = True,
    **options: Any,
) -> PreferenceDataModule:
    data = PreferenceDataModule(source, **options)
    data.compile(tokenizer or byte_level(), context, pairwise)
    return data


def row_ids(data: PreferenceDataModule, split: str) -> list[int]:
    return data.tables[split]["row"][:]


def prompts(data: PreferenceDataModule, split: str) -> list[str]:
    """The prompts of a split, spelled from the byte-level ids."""
    return [spell(byte_level(), ids).decode() for ids in data.tables[split]["prompt"][:]]


def lines(data: PreferenceDataModule, action: str | None = None) -> list[dict[str, Any]]:
    """The ledger, or its lines of one action."""
    return [line for line in data.ledger.to_pylist() if action in (None, line["action"])]


def dropped(split: str, source: str, row: int, reason: str = "rejected is empty") -> dict[str, Any]:
    return {"split": split, "source": source, "row": row, "pair": 0, "action": "dropped", "reason": reason}


# Who validates


def test_a_fraction_validates_on_exactly_that_share_of_prompts_and_on_no_prompt_that_trains(tmp_path: Path) -> None:
    rows = pairs(120, answers=3)  # 40 prompts
    data = compiled(write(tmp_path / "rows.jsonl", rows), val_fraction=0.25)
    train, val = ({rows[row]["prompt"] for row in row_ids(data, split)} for split in ("train", "val"))
    assert (len(train), len(val), len(train & val)) == (30, 10, 0)
    assert sorted(row_ids(data, "train") + row_ids(data, "val")) == list(range(120))


def test_a_twentieth_of_the_prompts_validates_where_nothing_is_named(tmp_path: Path) -> None:
    data = compiled(write(tmp_path / "rows.jsonl", pairs(60)))
    assert (len(data.tables["train"]), len(data.tables["val"])) == (57, 3)


def test_a_fraction_validates_on_one_prompt_at_least_and_leaves_one_to_train(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", pairs(3))
    assert [len(compiled(source, val_fraction=share).tables["val"]) for share in (0.001, 0.999)] == [1, 2]
    with pytest.raises(InputError, match=r"rows\.jsonl.*only one prompt"):
        compiled(write(tmp_path / "one" / "rows.jsonl", pairs(3, answers=3)))


def test_who_validates_depends_on_the_prompts_text_alone(tmp_path: Path) -> None:
    rows = pairs(40)
    source = write(tmp_path / "rows.jsonl", rows)
    val = [rows[row]["prompt"] for row in row_ids(compiled(source, val_fraction=0.3), "val")]
    assert [rows[row]["prompt"] for row in row_ids(compiled(source, adds_both(), val_fraction=0.3), "val")] == val
    assert prompts(compiled(source, val_fraction=0.3, max_length=64), "val") == val
    backwards = [row | {"chosen": " Something else."} for row in reversed(rows)]
    other = compiled(write(tmp_path / "other.jsonl", backwards), val_fraction=0.3)
    assert prompts(other, "val") == val[::-1]


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_folders_own_validation_split_validates(name: str, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", pairs(9))
    write(tmp_path / f"{name}.jsonl", pairs(4)[2:])
    data = compiled(str(tmp_path))
    assert prompts(data, "val") == ["What is 2?", "What is 3?"]
    assert len(data.tables["train"]) == 9


def test_the_split_that_trains_does_not_validate_but_another_own_one_does(tmp_path: Path) -> None:
    write(tmp_path / "validation.jsonl", pairs(9))
    write(tmp_path / "test.jsonl", pairs(4)[2:])
    data = compiled(str(tmp_path), train_split="validation")
    assert prompts(data, "val") == ["What is 2?", "What is 3?"]
    assert len(data.tables["train"]) == 9


def test_a_named_split_or_source_validates_in_place_of_the_folders_own(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", write(tmp_path / "other.jsonl", pairs(8)[5:])
    write(folder / "train.jsonl", pairs(9))
    write(folder / "validation.jsonl", pairs(1))
    write(folder / "test.jsonl", pairs(4)[2:])
    assert prompts(compiled(str(folder), val_split="test"), "val") == ["What is 2?", "What is 3?"]
    assert prompts(compiled(str(folder), val_source=file), "val") == [f"What is {i}?" for i in (5, 6, 7)]
    assert prompts(compiled(file, val_source=str(folder)), "val") == ["What is 0?"]
    fraction = compiled(str(folder), val_fraction=0.34)
    assert sorted(row_ids(fraction, "train") + row_ids(fraction, "val")) == list(range(9))


def test_a_split_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", pairs(9))
    with pytest.raises(InputError, match=r"rows\.jsonl.*'test'.*train.*data\.val_split"):
        compiled(source, val_split="test")
    with pytest.raises(InputError, match=r"rows\.jsonl.*'fit'.*train.*data\.train_split"):
        compiled(source, train_split="fit")


@pytest.mark.parametrize(
    "named",
    [
        {"val_split": "test", "val_source": "rows.jsonl"},
        {"val_split": "test", "val_fraction": 0.1},
        {"val_source": "rows.jsonl", "val_fraction": 0.1},
    ],
)
def test_two_ways_to_validate_are_an_error_that_names_both(named: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        PreferenceDataModule("rows.jsonl", **named)
    assert all(f"data.{option}" in str(error.value) for option in named)


# Options that cannot be meant


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 0),
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("bad_rows", -0.1),
        ("bad_rows", 1.1),
        ("max_length", 0),
        ("max_length", 1),
        ("max_train_pairs", 0),
        ("max_train_pairs", -1),
        ("max_val_pairs", 0),
    ],
)
def test_a_number_that_cannot_be_meant_is_an_error_that_names_its_option(
    option: str, value: float, tmp_path: Path
) -> None:
    source = write(tmp_path / "rows.jsonl", pairs(9))
    with pytest.raises(InputError) as error:
        compiled(source, **{option: value})
    assert f"data.{option}" in str(error.value) and str(value) in str(error.value)


def test_a_length_above_the_models_context_is_an_error_that_says_both(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", pairs(9))
    with pytest.raises(InputError, match=r"max_length.*65.*64"):
        compiled(source, context=64, max_length=65)
    assert len(compiled(source, context=64, max_length=64).tables["train"]) == 8


@pytest.mark.parametrize(("context", "longest"), [(64, 64), (None, 1024), (4096, 1024)])
def test_the_length_is_the_context_but_at_most_1024(context: int | None, longest: int, tmp_path: Path) -> None:
    long = [row | {"chosen": "b" * 3000, "rejected": "c" * 3000} for row in pairs(4)]
    table = compiled(write(tmp_path / "rows.jsonl", long), context=context).tables["train"]
    assert {len(row["prompt"]) + len(row["chosen"]) for row in table} == {longest}


def test_a_length_shorter_than_every_prompt_is_an_error_that_names_the_shortest(tmp_path: Path) -> None:
    rows = [row | {"prompt": row["prompt"] * (3 if i != 5 else 2)} for i, row in enumerate(pairs(9))]
    with pytest.raises(InputError, match=r"rows\.jsonl.*max_length 12.*row 5, has 20 tokens"):
        compiled(write(tmp_path / "rows.jsonl", rows), max_length=12)


def test_where_one_prompt_fits_the_others_are_cut_and_said(tmp_path: Path) -> None:
    rows = [row | {"prompt": row["prompt"] * (3 if i != 5 else 1)} for i, row in enumerate(pairs(9))]
    data = compiled(write(tmp_path / "rows.jsonl", rows), max_length=40)
    cut = lines(data, "cut")
    assert [line["row"] for line in cut] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert all("prompt cut from 30 to" in line["reason"] for line in cut)
    assert "8 rows cut to 40 tokens" in data.summary(40)


# Rows that cannot be used


def spoil(rows: list[Row], *which: int) -> list[Row]:
    return [row | {"rejected": " "} if i in which else row for i, row in enumerate(rows)]


def test_a_bad_row_within_the_share_is_dropped_and_stands_in_the_ledger(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", spoil(pairs(200), 57))
    data = compiled(source)
    assert sorted(row_ids(data, "train") + row_ids(data, "val")) == [row for row in range(200) if row != 57]
    assert lines(data) == [dropped("all", source, 57)]
    assert "1 rows dropped" in data.summary(1024) and "row 57: rejected is empty" in data.summary(1024)


def test_a_share_is_not_exceeded_by_as_many_rows_as_it_is_and_is_by_one_more(tmp_path: Path) -> None:
    assert len(compiled(write(tmp_path / "two.jsonl", spoil(pairs(200), 3, 9))).ledger) == 2
    with pytest.raises(InputError, match=r"rows\.jsonl: 5 of 200 .*row 3: rejected is empty; row 9: .*11: ") as error:
        compiled(write(tmp_path / "rows.jsonl", spoil(pairs(200), 3, 9, 11, 150, 199)))
    assert "row 150" not in str(error.value) and "data.bad_rows" in str(error.value)


def test_no_bad_row_may_be_dropped_where_the_share_is_0(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", spoil(pairs(200), 199))
    with pytest.raises(InputError, match=r"rows\.jsonl: 1 of 200 .*row 199: rejected is empty"):
        compiled(source, bad_rows=0.0)


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_where_all_rows_are_bad_the_error_says_why(share: float, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", spoil(pairs(9), *range(9)))
    with pytest.raises(InputError, match=r"rows\.jsonl.*rejected is empty"):
        compiled(source, bad_rows=share)


def test_a_bad_row_of_the_validation_set_is_said_to_be_there(tmp_path: Path) -> None:
    train, val = write(tmp_path / "a.jsonl", pairs(9)), write(tmp_path / "b.jsonl", spoil(pairs(9), 4))
    data = compiled(train, val_source=val, bad_rows=0.2)
    assert lines(data) == [dropped("val", val, 4)]
    assert row_ids(data, "val") == [0, 1, 2, 3, 5, 6, 7, 8]


def test_faults_of_all_kinds_are_named_each_by_its_row(tmp_path: Path) -> None:
    rows = pairs(9)
    rows[1] |= {"chosen": None}
    rows[2] |= {"chosen": rows[2]["rejected"]}
    rows[3].pop("prompt")
    rows[4] |= {"chosen": 5}
    rows[5] |= {"chosen": "a" * 90 + "b", "rejected": "a" * 90 + "c"}
    data = compiled(write(tmp_path / "rows.jsonl", rows), bad_rows=0.9, max_length=64)
    faults = {line["row"]: line["reason"] for line in lines(data, "dropped")}
    assert list(faults) == [1, 2, 3, 4, 5]
    for row, reason in zip(
        faults, ("chosen is missing", "are identical", "prompt is missing", "int", "after truncation"), strict=True
    ):
        assert reason in faults[row]


def test_rows_that_are_dropped_for_their_length_on_demand_are_not_bad(tmp_path: Path) -> None:
    rows = [row | {"chosen": " b" * 50} if i in (2, 7) else row for i, row in enumerate(pairs(9))]
    source = write(tmp_path / "rows.jsonl", rows)
    data = compiled(source, truncation="drop", max_length=64, bad_rows=0.0)
    assert [(line["row"], line["action"]) for line in lines(data)] == [(2, "dropped"), (7, "dropped")]
    assert sorted(row_ids(data, "train") + row_ids(data, "val")) == [0, 1, 3, 4, 5, 6, 8]
    with pytest.raises(InputError, match=r"rows\.jsonl.*row 0: too long.*max_length is 8"):
        compiled(source, truncation="drop", max_length=8)


def test_a_file_that_is_not_utf8_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes('{"prompt": "é", "chosen": "b", "rejected": "c"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match=r"rows\.jsonl"):
        compiled(str(tmp_path / "rows.jsonl"))


def test_a_streamed_split_to_validate_on_has_as_many_pairs_as_are_asked_for_though_rows_are_bad(
    tmp_path: Path,
) -> None:
    rows = {"train": pairs(30), "validation": spoil(pairs(90), 0, 3), "test": spoil(pairs(90), 1)}
    for split, some in rows.items():
        write(tmp_path / f"{split}.jsonl", some)
    options = {"streaming": True, "max_val_pairs": 20, "max_test_prompts": 10, "bad_rows": 0.1}
    data = PreferenceDataModule(str(tmp_path), **options)
    data.compile(byte_level(), None, testing=True)
    assert row_ids(data, "val") == [1, 2, *range(4, 22)]
    assert len(data.tables["test"]) >= 10


def test_a_source_that_comes_twice_in_a_stream_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lists the same source twice"):
        PreferenceDataModule(["a.jsonl", "a.jsonl"], streaming=True, val_source="b.jsonl")


def test_the_start_of_a_conversation_may_be_cut_and_its_end_may_not(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    source = write(tmp_path / "rows.jsonl", pairs(9))
    for truncation in ("keep_end", "drop", None):
        data = PreferenceDataModule(source, format="triples_as_chat", truncation=truncation)
        data.compile(tokenizer, None)
    data = PreferenceDataModule(source, format="triples_as_chat", truncation="keep_start")
    with pytest.raises(InputError, match="keep_start would cut off the generation prompt"):
        data.compile(tokenizer, None)


def test_a_template_that_writes_the_date_is_not_found_again_tomorrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, keys = write(tmp_path / "rows.jsonl", pairs(9)), {}
    for template in ("{{ messages[0].content }}", "{{ strftime_now('%d') }} {{ messages[0].content }}"):
        for day in (1, 2):
            tokenizer = byte_level()
            tokenizer.chat_template = template
            monkeypatch.setattr(compiler, "date", SimpleNamespace(today=lambda day=day: day))
            rows = Dataset.from_json(source)
            key = compiler.Compiler(triples, PairTokenizer(tokenizer, 100), True).fingerprint(rows)
            keys.setdefault(template, set()).add(key)
    assert [len(found) for found in keys.values()] == [1, 2]


def test_a_tokenizer_without_an_end_trains_and_it_is_said(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", pairs(9))
    data = PreferenceDataModule(source)
    data.compile(no_eos(), None)
    assert "no EOS token" in data.summary(1024, data.encoder.eos is not None)
    assert "no EOS token" not in compiled(source).summary(1024)
    assert data.tables["train"][0]["chosen_tokens"] + 1 == compiled(source).tables["train"][0]["chosen_tokens"]


# Whose row a pair is


def test_a_pair_keeps_its_id_and_its_place_over_drops_splits_and_sources(tmp_path: Path) -> None:
    first, second = spoil(pairs(20), 0, 7), spoil([row | {"prompt": f"Say {i}."} for i, row in enumerate(pairs(20))], 3)
    sources = [write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)]
    data = compiled(sources, bad_rows=0.2, val_fraction=0.3)
    rows = first + second  # ids of the second source count on from the first one's rows, dropped ones too
    ids = {split: data.tables[split]["id"][:] for split in ("train", "val")}
    for split in ("train", "val"):
        for number, prompt in zip(ids[split], prompts(data, split), strict=True):
            assert prompt == rows[number]["prompt"]
        assert data.places(split, ids[split]) == [(sources[number // 20], number % 20, 0) for number in ids[split]]
        assert row_ids(data, split) == [number % 20 for number in ids[split]]
    assert sorted(ids["train"] + ids["val"]) == sorted({*range(40)} - {0, 7, 23})
    assert {(line["source"], line["row"]) for line in lines(data)} == {
        (sources[0], 0),
        (sources[0], 7),
        (sources[1], 3),
    }


def test_the_first_pairs_are_kept_where_their_number_is_limited(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", spoil(pairs(30), 1))
    data = compiled(source, val_source=source, bad_rows=0.1, max_train_pairs=4, max_val_pairs=2)
    assert (row_ids(data, "train"), row_ids(data, "val")) == ([0, 2, 3, 4], [0, 2])
    assert len(compiled(source, bad_rows=0.1, max_train_pairs=1000).tables["train"]) == 28


# Formats


def test_a_format_of_ones_own_is_used_and_used_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from dpo_lightning.data.formats import Preference\ndef rows(row):\n    return Preference({}, ' a', ' b')\n"
    module = tmp_path / "formats_of_mine.py"
    monkeypatch.syspath_prepend(tmp_path)
    source = write(tmp_path / "rows.jsonl", [{"q": f"Why {i}?"} for i in range(9)])
    for prompt in ("row['q']", "row['q'] + ' Because'"):
        module.write_text(code.format(prompt))
        monkeypatch.delitem(sys.modules, "formats_of_mine", raising=False)
        data = compiled(source, format="formats_of_mine.rows", val_source=source)
        assert prompts(data, "train") == [eval(prompt, {"row": {"q": f"Why {i}?"}}) for i in range(9)]


def test_columns_of_no_format_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl.*question"):
        compiled(write(tmp_path / "rows.jsonl", [{"question": "a", "good": "b"}]))


def test_supervised_rows_have_one_answer_and_need_a_loss_that_wants_one(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": f"Why {i}?", "completion": f" B{i}."} for i in range(9)])
    data = compiled(source, pairwise=False, val_source=source)
    batch = TokenizedPairs(data.tables["train"], "shared", pairwise=False)[PlannedBatch((4, 1), 2)]
    assert batch.num_answers == 2
    assert [spell(byte_level(), ids[:-1]).decode() for _, ids in answers_of(batch)] == [" B4.", " B1."]
    with pytest.raises(InputError, match=r"rows\.jsonl.*row 0: there is no rejected answer.*SFT"):
        compiled(source)


def test_supervision_takes_pairs_too_and_leaves_their_rejected_answers_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", spoil(pairs(9), *range(9)))
    data = compiled(source, pairwise=False, val_source=source)
    assert len(data.tables["train"]) == 9
    assert sum(data.tables["train"]["rejected_tokens"][:]) == 0


# Batches


def answers_of(batch: PreferenceBatch) -> list[tuple[list[int], list[int]]]:
    """`(prompt, answer)` ids of each answer: the prompt is what its tree has before any branch."""
    found = []
    for answer in range(batch.num_answers):
        mine = batch.answer == answer
        tree = batch.tree.flatten()[batch.source[mine][0]]
        prompt = batch.tokens[(batch.tree == tree) & (batch.branch == PROMPT)]
        found.append((prompt.tolist(), batch.target[mine].tolist()))
    return found


@pytest.fixture
def uneven(tmp_path: Path) -> PreferenceDataModule:
    """Pairs of unequal lengths, row 2 dropped, so that pair 2 is row 3."""
    rows = [row | {"prompt": row["prompt"] * (1 + i % 3), "chosen": " b" * (1 + i)} for i, row in enumerate(pairs(9))]
    source = write(tmp_path / "rows.jsonl", spoil(rows, 2))
    return compiled(source, adds_bos(), bad_rows=0.2, val_source=source)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_planned_batch_is_the_batch_of_exactly_its_rows(layout: Layout, uneven: PreferenceDataModule) -> None:
    table = uneven.tables["train"]
    chosen = [5, 2, 0]
    batch = TokenizedPairs(table, layout, pairwise=True)[PlannedBatch(tuple(chosen), 7)]
    assert batch.pair_ids.tolist() == [6, 3, 0]
    assert (batch.num_pairs, batch.num_answers, batch.pairs_in_step) == (3, 6, 7)
    assert batch.weights.tolist() == [1, 1, 1]
    rows = [table[pair] for pair in chosen]
    assert answers_of(batch) == [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
    assert batch.num_tokens == sum(len(row[part]) for row in rows for part in ("prompt", "chosen", "rejected"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ghost_is_laid_out_and_counts_for_nothing(layout: Layout, uneven: PreferenceDataModule) -> None:
    batch = TokenizedPairs(uneven.tables["train"], layout, pairwise=True)[PlannedBatch((4,), 3, ghost=True)]
    assert batch.weights.tolist() == [0] and batch.num_tokens == 0 and batch.pairs_in_step == 3
    assert batch.pair_ids.tolist() == [5] and batch.num_answers == 2


@pytest.mark.parametrize("pairwise", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pairs_cost_is_the_tokens_that_it_is_laid_out_in(
    layout: Layout, pairwise: bool, uneven: PreferenceDataModule, tmp_path: Path
) -> None:
    source = str(tmp_path / "rows.jsonl")
    data = compiled(source, adds_bos(), pairwise=pairwise, bad_rows=0.2, val_source=source)
    dataset = TokenizedPairs(data.tables["train"], layout, pairwise)
    laid_out = [int((dataset[PlannedBatch((pair,), 1)].tree >= 0).sum()) for pair in range(len(dataset))]
    np.testing.assert_array_equal(dataset.costs, laid_out)


# What is kept


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many preferences have been tokenized since the last question."""
    counts = [0]
    encode = PairTokenizer.__call__

    def counting(self: PairTokenizer, preferences: list[Preference]) -> list[Any]:
        counts[0] += len(preferences)
        return encode(self, preferences)

    def since() -> int:
        count, counts[0] = counts[0], 0
        return count

    monkeypatch.setattr(PairTokenizer, "__call__", counting)
    return since


def test_tokens_are_made_once_and_again_whenever_they_would_be_others(
    tmp_path: Path, encoded: Callable[[], int]
) -> None:
    source = write(tmp_path / "rows.jsonl", pairs(30))

    def count(tokenizer: PreTrainedTokenizerFast | None = None, pairwise: bool = True, **options: Any) -> int:
        compiled(source, tokenizer, pairwise=pairwise, **{"max_length": 40} | options)
        return encoded()

    assert count() == 30
    assert count() == count(batch_size=3, layout="padded", val_fraction=0.2, max_train_pairs=5) == 0
    assert count(max_length=41) == count(truncation="keep_start") == count(truncation="drop") == 30
    assert count(joined()) == count(sentencepiece()) == count(adds_bos()) == 30
    assert count(pairwise=False) == 30
    assert count() == count(adds_bos()) == count(max_length=41) == 0
    write(tmp_path / "rows.jsonl", pairs(31))
    assert count() == 31


def test_using_a_tokenizer_elsewhere_does_not_make_its_tokens_again(tmp_path: Path, encoded: Callable[[], int]) -> None:
    """Padding and truncation leave marks on a fast tokenizer."""
    source, tokenizer = write(tmp_path / "rows.jsonl", pairs(30)), byte_level(pad="<|endoftext|>")
    compiled(source, tokenizer)
    assert encoded() == 30
    tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=9)
    compiled(source, tokenizer)
    assert encoded() == 0


def test_a_source_folder_is_left_as_it_was(tmp_path: Path) -> None:
    Dataset.from_list(pairs(9)).save_to_disk(tmp_path / "saved")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "saved").rglob("*"))}
    compiled(str(tmp_path / "saved"))
    assert {path: path.read_bytes() for path in sorted((tmp_path / "saved").rglob("*"))} == before
