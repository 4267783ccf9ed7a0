"""A source with a fault is told of it, by its rows, and how to mend it; one without is told that nothing is to change.

The oracle is the source itself, which is made with the fault in rows that are known.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dpo_lightning.data.advice import advise
from dpo_lightning.data.batching import PlannedBatch
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.inspection import PART, Inspection, Inspector, pieces
from dpo_lightning.data.pairs import TokenizedPairs
from tests.test_datamodule import Row, write
from tests.tokenizers_built import BUILDS, adds_bos, byte_level, no_eos

COUNT = 600  # a fifth of it is enough to validate on

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sound(count: int = COUNT) -> list[Row]:
    """Rows without a fault: the longer answer is the chosen one in every other row."""
    pairs = [(f" Yes, {i}.", f" No, not {i}.") for i in range(count)]
    return [
        {"prompt": f"Is it {i}?", "chosen": pair[i % 2], "rejected": pair[1 - i % 2]} for i, pair in enumerate(pairs)
    ]


def inspected(
    path: Path,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerFast | None = None,
    pairwise: bool = True,
    **options: Any,
) -> tuple[Inspection, str]:
    """What is found, and the advice as one text."""
    tokenizer = tokenizer or byte_level()
    options = options if "val_source" in options else {"val_fraction": 0.2} | options
    data = PreferenceDataModule(write(path / "rows.jsonl", rows), **options)
    data.compile(tokenizer, None, pairwise, inspecting=True)
    found = Inspector(data, tokenizer)()
    return found, "\n".join(advise(found))


def test_a_sound_source_is_told_that_nothing_is_to_change(tmp_path: Path) -> None:
    found, advice = inspected(tmp_path, sound())
    assert advice == ""
    assert found.reasons == [] and found.oddities == [] and all(check.sound for check in found.checks)
    assert (found.train + found.val, found.prompts) == (COUNT, found.train)
    assert found.bias is not None and found.bias.accuracy == pytest.approx(0.5, abs=0.05)


Spoil = Callable[[list[Row]], None]


def change(row: int, **cells: str) -> Spoil:
    return lambda rows: rows[row].update(cells)


def copied(rows: list[Row]) -> None:
    rows[9] = dict(rows[4])


def contradicted(rows: list[Row]) -> None:
    rows[9] = rows[4] | {"chosen": rows[4]["rejected"], "rejected": rows[4]["chosen"]}


def longer_wins(rows: list[Row]) -> None:
    for row in rows:
        row["chosen"], row["rejected"] = sorted((row["chosen"], row["rejected"]), key=len, reverse=True)


def shorter_wins(rows: list[Row]) -> None:
    for row in rows:
        row["chosen"], row["rejected"] = sorted((row["chosen"], row["rejected"]), key=len)


def blank_at_the_end(rows: list[Row]) -> None:
    for row in rows:
        row.update(prompt=f"{row['prompt']} ", chosen="world, yes", rejected="world, no")


def spelled_token(rows: list[Row]) -> None:
    for row in rows:
        row["prompt"] += " <|endoftext|>?"


def too_long(rows: list[Row]) -> None:
    for row in rows[:50]:
        row["prompt"] += "x" * 300


def bad_rows(rows: list[Row]) -> None:
    for row in rows[100:115]:
        row["rejected"] = " "


#: What is done to the rows, the options, and what the advice says of it.
FAULTS: dict[str, tuple[Spoil, dict[str, Any], str]] = {
    "copies": (copied, {}, "1 pairs come again word for word (row 4 and row 9"),
    "contradiction": (contradicted, {}, "2 pairs contradict another one"),
    "longer": (longer_wins, {}, "Always preferring the longer answer is right in 100"),
    "shorter": (shorter_wins, {}, "Always preferring the shorter answer is right in 100"),
    "boundary": (blank_at_the_end, {}, "Move the blank at the prompts' end"),
    "special": (spelled_token, {}, "480 of 480 pairs have a special token written in their text. The model reads it"),
    "NUL": (change(4, chosen=" a\0b"), {}, "NUL and other control characters (row 4 for one)"),
    "replacement": (change(4, prompt="a\ufffd?"), {}, "replacement character"),
    "long": (too_long, {"max_length": 200}, "data.max_length 200 cuts 8.3% of the pairs"),
    "all long": (lambda rows: None, {"max_length": 7}, "shorter than every prompt: `fit` will refuse it"),
    "bad rows": (bad_rows, {}, "15 of 600 rows cannot be used, more than data.bad_rows 0.01: `fit` will refuse"),
    "few": (lambda rows: None, {"val_fraction": 0.04}, "Only 24 pairs validate: an accuracy of them has a standard"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_what_to_do_about_it(fault: str, tmp_path: Path) -> None:
    spoil, options, said = FAULTS[fault]
    rows = sound()
    spoil(rows)
    _, advice = inspected(tmp_path, rows, **options)
    assert said in advice, advice


def test_every_dropped_row_is_named_with_its_reason(tmp_path: Path) -> None:
    rows = sound()
    for row in (3, 50, 51):
        rows[row]["rejected"] = rows[row]["chosen"]
    rows[7]["chosen"] = "\n "
    found, advice = inspected(tmp_path, rows)
    assert [(r.action, r.reason, r.count, r.rows) for r in found.reasons] == [
        ("dropped", "chosen and rejected are identical", 3, ["row 3", "row 50", "row 51"]),
        ("dropped", "chosen is empty", 1, ["row 7"]),
    ]
    [source] = found.sources
    assert (source.rows, source.used, source.dropped, source.bad, source.format) == (COUNT, COUNT - 4, 4, 4, "triples")
    assert advice == ""  # four of 600 are within the share


def test_prompts_on_both_sides_of_the_split_are_told_by_their_rows(tmp_path: Path) -> None:
    rows = sound()
    val = write(tmp_path / "val.jsonl", [rows[8], {"prompt": "New?", "chosen": " a", "rejected": " bc"}, rows[40]])
    found, advice = inspected(tmp_path, rows, val_source=val)
    assert found.both_sides == ["row 8", "row 40"]
    assert "2 pairs to train on have a prompt that also validates" in advice


def test_a_tokenizer_without_an_end_is_told(tmp_path: Path) -> None:
    _, advice = inspected(tmp_path, sound(), no_eos())
    assert "Set eos_token" in advice


def test_a_template_that_plain_rows_do_not_go_through_is_told(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    _, advice = inspected(tmp_path, sound(), tokenizer)
    assert "triples_as_chat" in advice
    found, advice = inspected(tmp_path, sound(), tokenizer, format="triples_as_chat")
    assert advice == "" and any("600 pairs are conversations" in check.text for check in found.checks)


def test_a_template_without_the_bos_that_the_tokenizer_puts_is_told(tmp_path: Path) -> None:
    tokenizer = adds_bos()
    for template, told in ((CHATML, True), ("{{ bos_token }}" + CHATML, False)):
        tokenizer.chat_template = template
        _, advice = inspected(tmp_path, sound(), tokenizer, format="triples_as_chat")
        assert ("write it in the template" in advice) == told


def test_supervised_rows_are_inspected_without_what_pairs_have(tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in sound()]
    found, advice = inspected(tmp_path, rows, pairwise=False)
    assert found.bias is None and advice == ""
    assert list(found.samples[0].tokens) == ["prompt", "chosen"]


@pytest.mark.parametrize("empty", [True, False])
def test_a_sample_shows_the_tokens_and_the_mask_that_training_has(empty: bool, tmp_path: Path) -> None:
    """Behind an empty prompt without BOS nothing predicts an answer's first token."""
    rows = [row | ({"prompt": ""} if empty else {}) for row in sound(60)]
    rows[0]["prompt"] = "Other"  # one prompt alone could not be split
    data = PreferenceDataModule(write(tmp_path / "rows.jsonl", rows), val_fraction=0.5)
    tokenizer = byte_level()
    data.compile(tokenizer, None, inspecting=True)
    inspector = Inspector(data, tokenizer)
    pairs = TokenizedPairs(data.tables["train"], "shared", pairwise=True)
    for number in range(min(3, len(pairs))):
        batch, sample = pairs[PlannedBatch((number,), 1)], inspector.sample(number)
        shown = [token for part in ("chosen", "rejected") for token in sample.tokens[part]]
        scored = [token.text for token in shown if token.in_loss]
        assert scored == [tokenizer.decode(token) for token in batch.target]
        assert "".join(t.text for t in sample.tokens.get("prompt", [])) == rows[pairs.pair_ids[number]]["prompt"]
        assert not any(token.in_loss for token in sample.tokens.get("prompt", []))
        assert all(not hidden for hidden in sample.hidden.values())


def chatty(answer: str = "{}", prompt: str = "{}") -> list[Row]:
    """Sound rows with something about the preferred answer, and about the prompt."""
    return [row | {"prompt": prompt.format(row["prompt"]), "chosen": answer.format(row["chosen"])} for row in sound()]


#: Rows that a chat template writes, what is wrong with them, and what is said.
CHATS: dict[str, tuple[list[Row], str, str]] = {
    "sound": (chatty(), CHATML, ""),
    "EOS inside an answer": (chatty("{} <|endoftext|>!"), CHATML, "In 600 answers EOS stands before their end"),
    "EOS at an answer's end": (chatty("{}<|endoftext|>"), CHATML, ""),
    "a turn's end in an answer": (chatty("{}<|im_end|>"), CHATML, "480 of 480 pairs have a special"),
    "BOS in every turn": (chatty(), "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}", ""),
    "a special token in a prompt": (chatty(prompt="<|endoftext|> {}"), CHATML, "480 of 480 pairs have a special"),
}


@pytest.mark.parametrize("case", CHATS)
def test_tokens_of_conversations_are_checked_too(case: str, tmp_path: Path) -> None:
    rows, template, said = CHATS[case]
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    _, advice = inspected(tmp_path, rows, tokenizer, format="triples_as_chat")
    assert (said in advice) if said else (advice == ""), advice


def test_bos_that_both_template_and_text_write_is_told(tmp_path: Path) -> None:
    tokenizer = adds_bos()
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + CHATML
    _, advice = inspected(tmp_path, sound(), tokenizer, format="triples_as_chat")
    assert "In 600 prompts BOS stands twice in a row" in advice


def test_pairs_dropped_for_their_length_count_among_the_lengths(tmp_path: Path) -> None:
    rows = sound()
    for row in rows[:60]:
        row["prompt"] += "x" * 300
    found, advice = inspected(tmp_path, rows, max_length=200, truncation="drop")
    assert len(found.lengths.prompt) == COUNT and found.lengths.prompt.max() > 300
    assert found.train + found.val == COUNT - 60
    assert "data.max_length 200 drops 10.0% of the pairs" in advice and "truncation drop" not in advice
    longest = found.lengths.longest > 200
    total = found.lengths.prompt + found.lengths.chosen + found.lengths.rejected
    [here] = [cut for cut in found.cuts if cut.max_length == 200]
    assert here.tokens == pytest.approx(total[longest].sum() / total.sum())
    assert found.bias is not None and sum(pairs for *_, pairs, _ in found.bias.by_difference) <= COUNT - 60


def test_a_source_whose_prompts_are_all_too_long_is_told_beside_one_whose_are_not(tmp_path: Path) -> None:
    long = write(tmp_path / "long.jsonl", [row | {"prompt": f"{row['prompt']} {'x' * 90}"} for row in sound(300)])
    data = PreferenceDataModule([write(tmp_path / "short.jsonl", sound(300)), long], max_length=60)
    data.compile(byte_level(), None, inspecting=True)
    advice = list(advise(Inspector(data, byte_level())()))
    assert [line.split(":")[0] for line in advice if "shorter than every prompt" in line] == [long]


def test_what_is_looked_at_is_said_where_it_is_not_every_pair_once(tmp_path: Path) -> None:
    source, val = write(tmp_path / "rows.jsonl", sound()), write(tmp_path / "val.jsonl", sound(50))
    data = PreferenceDataModule(source, val_source=val, streaming=True, shuffle_buffer=100)
    data.compile(byte_level(), None, inspecting=True)
    assert Inspector(data, byte_level())().note == "Of a stream only the first rows are read: 100 of rows.jsonl"
    data = PreferenceDataModule([source, val], weights=[1, 3], val_source=val, streaming=True, shuffle_buffer=100)
    data.compile(byte_level(), None, inspecting=True)
    wanted = "Of a stream only the first rows are read: 100 of rows.jsonl, 50 of val.jsonl"
    assert Inspector(data, byte_level())().note == wanted
    data = PreferenceDataModule([source, val], weights=[1, 3], val_fraction=0.1)
    data.compile(byte_level(), None, inspecting=True)
    assert Inspector(data, byte_level())().note.startswith("An epoch has ")
    assert inspected(tmp_path, sound())[0].note == ""


def test_answers_of_equal_length_have_no_longer_one(tmp_path: Path) -> None:
    rows = [row | {"chosen": " Yes!", "rejected": " No!!"} for row in sound()]
    found, advice = inspected(tmp_path, rows)
    assert found.bias is not None and found.bias.by_difference == [] and "longer answer" not in advice


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("text", ["Hello world", "漢字 é 😀!", "  a\n\nb ", ""])
def test_the_pieces_of_tokens_are_the_text(name: str, text: str) -> None:
    tokenizer = BUILDS[name]()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(piece for piece in found if piece != PART) == tokenizer.decode(ids)


def test_several_sources_are_told_apart_by_their_names(tmp_path: Path) -> None:
    first, second = sound(300), [row | {"prompt": f"Say: {row['prompt']}"} for row in sound(300)]
    second[5]["rejected"] = ""
    sources = [write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)]
    data = PreferenceDataModule(sources, weights=[1, 2])
    data.compile(byte_level(), None, inspecting=True)
    found = Inspector(data, byte_level())()
    assert [reason.rows for reason in found.reasons] == [["b.jsonl row 5"]]
    assert {sample.place.split()[0] for sample in found.samples} <= {"a.jsonl", "b.jsonl"}
    assert np.sum([source.used for source in found.sources]) == found.train + found.val == 599
