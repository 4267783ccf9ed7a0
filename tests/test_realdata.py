"""On people's own preferences: every row is accounted for, and the ids are those of its text.

The data and the tokenizers lie beside the checkout, in `../shared`; where they do not, these tests skip.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.formats import dialogues
from dpo_lightning.data.preference import Preference
from tests.conftest import SHARED

DATA = SHARED / "data"
STORIES = SHARED / "models" / "stories260K"

pytestmark = pytest.mark.realdata

#: File -> its rows, as its README counts them, and the length at which it is also compiled below, and kept.
FILES = {
    "rm-static-test.jsonl.gz": (5103, 1024),
    "hh-helpful-512.jsonl.gz": (512, 1024),
    "hh-helpful-base-dialogues.jsonl.gz": (2354, 4096),
    "oasst-zh.jsonl.gz": (775, 256),
}


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")


@pytest.fixture(scope="module")
def stories() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(STORIES)


def rows_of(name: str) -> list[dict[str, str]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def compiled(file: Path, tokenizer: PreTrainedTokenizerBase, max_length: int = 1024) -> PreferenceDataModule:
    data = PreferenceDataModule(str(file), max_length=max_length, bad_rows=0.02)
    data.compile(tokenizer, context=None)
    return data


def row_ids(data: PreferenceDataModule) -> list[int]:
    return sorted(data.tables["train"]["row"][:] + data.tables["val"]["row"][:])


def rows_remarked(data: PreferenceDataModule, action: str, reason: str = "") -> list[int]:
    found = data.ledger.to_pylist()
    return [line["row"] for line in found if line["action"] == action and reason in line["reason"]]


@pytest.mark.parametrize("name", FILES)
def test_each_row_is_used_or_stands_in_the_ledger_and_none_is_longer_than_asked(
    name: str, gpt2: PreTrainedTokenizerBase
) -> None:
    rows, max_length = FILES[name]
    data = compiled(DATA / name, gpt2, max_length)
    assert sorted(row_ids(data) + rows_remarked(data, "dropped")) == list(range(rows))
    for table in data.tables.values():
        prompt, chosen, rejected = (np.array(table[f"{part}_tokens"][:]) for part in ("prompt", "chosen", "rejected"))
        assert min(chosen.min(), rejected.min()) >= 1
        assert (prompt + np.maximum(chosen, rejected)).max() <= max_length


def test_rm_static_drops_its_identical_and_its_empty_answers_and_no_others(gpt2: PreTrainedTokenizerBase) -> None:
    rows = rows_of("rm-static-test.jsonl.gz")
    empty = [i for i, row in enumerate(rows) if not (row["chosen"].strip() and row["rejected"].strip())]
    identical = [i for i, row in enumerate(rows) if i not in empty and row["chosen"] == row["rejected"]]
    assert (len(empty), len(identical)) == (4, 34)
    data = compiled(DATA / "rm-static-test.jsonl.gz", gpt2)
    assert rows_remarked(data, "dropped", "empty") == empty
    assert rows_remarked(data, "dropped", "identical") == identical
    assert rows_remarked(data, "dropped") == sorted(empty + identical)


def test_rm_static_trains_on_no_prompt_that_validates(gpt2: PreTrainedTokenizerBase) -> None:
    rows = rows_of("rm-static-test.jsonl.gz")
    data = compiled(DATA / "rm-static-test.jsonl.gz", gpt2)
    train, val = ({rows[row]["prompt"] for row in data.tables[split]["row"][:]} for split in ("train", "val"))
    assert not train & val
    assert len(val) == round(0.05 * (len(train) + len(val)))


def test_dialogues_are_split_as_by_hand_and_nine_refused(gpt2: PreTrainedTokenizerBase) -> None:
    rows = rows_of("hh-helpful-base-dialogues.jsonl.gz")
    marker = "\n\nAssistant:"
    cuts = [{side: row[side].rindex(marker) + len(marker) for side in ("chosen", "rejected")} for row in rows]
    prompts = [{side: row[side][: cut[side]] for side in cut} for row, cut in zip(rows, cuts, strict=True)]
    different = [i for i, prompt in enumerate(prompts) if prompt["chosen"] != prompt["rejected"]]
    data = compiled(DATA / "hh-helpful-base-dialogues.jsonl.gz", gpt2, max_length=4096)
    assert rows_remarked(data, "dropped", "different prompts") == different and len(different) == 9
    answers = [{side: row[side][cut[side] :] for side in cut} for row, cut in zip(rows, cuts, strict=True)]
    blank = [i for i, answer in enumerate(answers) if not all(text.strip() for text in answer.values())]
    same = [i for i, answer in enumerate(answers) if answer["chosen"] == answer["rejected"]]
    assert len(rows) - len(different) == 2345
    assert row_ids(data) == sorted({*range(2354)} - {*different, *blank, *same})
    for table in data.tables.values():
        for line in table.select(range(0, len(table), 10)):
            prompt, answer = prompts[line["row"]]["chosen"], answers[line["row"]]
            assert dialogues(rows[line["row"]]) == Preference(prompt, answer["chosen"], answer["rejected"])
            assert gpt2.decode(line["prompt"]) == prompt
            for side in ("chosen", "rejected"):
                assert gpt2.decode(line[side]) == answer[side] + gpt2.eos_token


def test_chinese_text_comes_back_from_its_ids_exactly(gpt2: PreTrainedTokenizerBase) -> None:
    rows = rows_of("oasst-zh.jsonl.gz")
    data = compiled(DATA / "oasst-zh.jsonl.gz", gpt2, max_length=16_384)
    assert not rows_remarked(data, "cut")
    for table in data.tables.values():
        for line in table:
            row = rows[line["row"]]
            assert gpt2.decode(line["prompt"]) == row["prompt"]
            for side in ("chosen", "rejected"):
                assert gpt2.decode(line[side]) == row[side] + gpt2.eos_token


def test_chinese_text_is_never_cut_inside_a_character(gpt2: PreTrainedTokenizerBase) -> None:
    rows = rows_of("oasst-zh.jsonl.gz")
    data = compiled(DATA / "oasst-zh.jsonl.gz", gpt2, max_length=256)
    cut = set(rows_remarked(data, "cut"))
    assert len(cut) > 100
    for table in data.tables.values():
        for line in table:
            if line["row"] in cut:
                row = rows[line["row"]]
                assert row["prompt"].endswith(gpt2.decode(line["prompt"]))
                for side in ("chosen", "rejected"):
                    ids = line[side][:-1] if line[side][-1] == gpt2.eos_token_id else line[side]
                    assert row[side].startswith(gpt2.decode(ids))


def test_long_documents_keep_their_end_and_each_that_is_cut_is_said(gpt2: PreTrainedTokenizerBase) -> None:
    rows = rows_of("squality-long.jsonl.gz")
    data = compiled(DATA / "squality-long.jsonl.gz", gpt2, max_length=6000)
    lines = [line for table in data.tables.values() for line in table]
    assert len(lines) == len(rows) == 299
    for line in lines[::7]:
        assert line["prompt_tokens"] + max(line["chosen_tokens"], line["rejected_tokens"]) <= 6000
        assert line["prompt_tokens"] >= min(line["whole_prompt"], 3000)
        assert rows[line["row"]]["prompt"].endswith(gpt2.decode(line["prompt"]))
        assert gpt2.decode(line["chosen"]) == rows[line["row"]]["chosen"] + gpt2.eos_token
    cut = [line["row"] for line in lines if line["prompt_tokens"] < line["whole_prompt"]]
    assert sorted(rows_remarked(data, "cut")) == sorted(cut)
    assert 0 < len(cut) < len(rows)


def test_the_sentencepiece_tokenizer_of_stories_comes_back_exactly_and_begins_once(
    stories: PreTrainedTokenizerBase,
) -> None:
    rows = rows_of("hh-helpful-512.jsonl.gz")
    data = compiled(DATA / "hh-helpful-512.jsonl.gz", stories, max_length=4096)
    assert row_ids(data) == list(range(512)) and not rows_remarked(data, "cut")
    for table in data.tables.values():
        for line in table:
            row = rows[line["row"]]
            assert line["prompt"][0] == stories.bos_token_id
            for side in ("chosen", "rejected"):
                ids = line["prompt"] + line[side]
                assert ids.count(stories.bos_token_id) == ids.count(stories.eos_token_id) == 1
                assert ids[-1] == stories.eos_token_id
                assert stories.decode(line["prompt"][1:] + line[side][:-1]) == row["prompt"] + row[side]
            assert stories.decode(line["prompt"][1:]) == row["prompt"]


def test_with_byte_fallback_a_cut_chinese_answer_loses_no_more_than_it_must(stories: PreTrainedTokenizerBase) -> None:
    """Nearly every character of theirs is three byte tokens here."""
    rows = rows_of("oasst-zh.jsonl.gz")
    data = compiled(DATA / "oasst-zh.jsonl.gz", stories, max_length=256)
    lines = [line for table in data.tables.values() for line in table]
    cut = [line for line in lines if line["chosen"][-1] != stories.eos_token_id]
    assert len(cut) > 100
    for line in cut:
        assert len(line["prompt"]) + len(line["chosen"]) > 256 - 4
        prompt, both = stories.decode(line["prompt"]), stories.decode(line["prompt"] + line["chosen"])
        assert rows[line["row"]]["chosen"].startswith(both.removeprefix(prompt))
