"""From files of conversations to tables of ids, through the chat template of a file or of the tokenizer.

The oracle is the template on each row's own conversation, which the tables' ids must spell. Rows of the hub come from
`hub_rows`.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from dpo_lightning.data.chat import ChatTemplate
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.preference import Conversation
from dpo_lightning.errors import InputError
from tests.chat_families import FAMILIES
from tests.hub_rows import GOOD, HUB
from tests.tokenizers_built import byte_level, spell

Row = dict[str, Any]


def turn(role: str, content: str, **more: object) -> Row:
    return {"role": role, "content": content, **more}


def chat(number: int, answers: int = 1) -> list[Row]:
    """A question, the same in `answers` chats, and its answer."""
    return [turn("user", f"What is {number // answers}?"), turn("assistant", f"It is {number}.")]


def pair(number: int, opening: tuple[Row, ...] = (), answers: int = 1) -> Row:
    question, answer = chat(number, answers)
    return {"chosen": [*opening, question, answer], "rejected": [*opening, question, turn("assistant", "Who knows?")]}


def write(folder: Path, rows: list[Row], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / name)


def template(folder: Path, name: str) -> str:
    """A file with the template of a family."""
    file = folder / f"{name}.jinja"
    file.write_text(FAMILIES[name].text, encoding="utf-8")
    return str(file)


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A family's tokenizer, without the template."""
    tokenizer = FAMILIES[name].tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def compiled(
    source: str, tokenizer: PreTrainedTokenizerFast, pairwise: bool = True, **options: Any
) -> PreferenceDataModule:
    data = PreferenceDataModule(source, **({"val_fraction": 0.25} | options))
    data.compile(tokenizer, None, pairwise)
    return data


def lines(data: PreferenceDataModule) -> list[Row]:
    """The pairs that train and validate, in the rows' order."""
    return sorted((line for split in ("train", "val") for line in data.tables[split]), key=lambda line: line["row"])


def spelled(tokenizer: PreTrainedTokenizerFast, line: Row, answer: str) -> str:
    return spell(tokenizer, line["prompt"] + line[answer]).decode()


@pytest.mark.parametrize("name", ["chatml", "chatml_eos", "zephyr", "llama3", "gemma"])
def test_ids_spell_what_the_template_in_a_file_writes_for_each_row(name: str, tmp_path: Path) -> None:
    rows, tokenizer = [pair(i) for i in range(12)], tokenizer_of(name)
    found = lines(compiled(write(tmp_path, rows), tokenizer, chat_template=template(tmp_path, name)))
    assert [line["row"] for line in found] == list(range(12))
    for line, row in zip(found, rows, strict=True):
        for answer in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(row[answer], tokenize=False).rstrip()
            assert spelled(tokenizer, line, answer) == whole.removesuffix(tokenizer.eos_token) + tokenizer.eos_token
            assert line[answer][-1] == tokenizer.eos_token_id
        asked = tokenizer.apply_chat_template(row["chosen"][:-1], add_generation_prompt=True, return_dict=False)
        assert line["prompt"] == asked


@pytest.mark.parametrize("name", HUB)
def test_a_row_of_the_hub_becomes_ids_of_the_answers_that_are_its_own(name: str, tmp_path: Path) -> None:
    row, format = HUB[name]
    preference = format(row)
    is_pair, is_chat = preference.rejected is not None, isinstance(preference, Conversation)
    tokenizer, source = FAMILIES["chatml_eos"].tokenizer(), write(tmp_path, [row] * 2)
    data = compiled(source, tokenizer, pairwise=is_pair, val_fraction=None, val_source=source)
    for line in data.tables["train"]:
        assert spell(tokenizer, line["chosen"]).decode() == GOOD + "<|im_end|>" * is_chat + "<|endoftext|>"
        assert (line["templated"], line["text"], line["cut"]) == (is_chat, "", "")


def test_all_turns_tools_and_system_prompts_of_a_file_are_in_the_prompt(tmp_path: Path) -> None:
    def row(number: int) -> Row:
        call = {"type": "function", "function": {"name": "look", "arguments": {"at" if number % 2 else "for": number}}}
        before = [turn("user", f"Look {number}!"), turn("assistant", "", tool_calls=[call]), turn("tool", f"{number}.")]
        tools = [{"type": "function", "function": {"name": "look", "parameters": {"properties": {f"p{number}": {}}}}}]
        return pair(number, tuple(before)) | {"tools": json.dumps(tools), "system": "Be kind." * (number % 2)}

    tokenizer, rows = FAMILIES["qwen3"].tokenizer(), [row(i) for i in range(6)]
    for line, given in zip(lines(compiled(write(tmp_path, rows), tokenizer)), rows, strict=True):
        opening = [turn("system", given["system"])] * bool(given["system"])
        asked = tokenizer.apply_chat_template(
            [*opening, *given["chosen"][:-1]],
            tools=json.loads(given["tools"]),
            add_generation_prompt=True,
            tokenize=False,
        )
        assert spell(tokenizer, line["prompt"]).decode() == asked


def test_who_validates_does_not_depend_on_the_template(tmp_path: Path) -> None:
    source = write(tmp_path, [pair(i, answers=2) for i in range(40)])
    tables = {}
    for name in ("chatml", "llama3", "gemma", "strips"):
        data = compiled(source, tokenizer_of(name), chat_template=template(tmp_path, name))
        tables[name] = data.tables["val"].with_format(None)
        assert len(tables[name]) == 10 and data.on_both_sides() == 0
    ids = {name: [tuple(line["prompt"]) for line in table] for name, table in tables.items()}
    assert len({ids[name][0] for name in ids}) == len(ids)
    for column in ("row", "prompt_hash", "chosen_hash", "rejected_hash"):
        assert len({tuple(table[column][:]) for table in tables.values()}) == 1


def test_another_template_or_token_gives_other_ids_and_the_first_one_the_same_again(tmp_path: Path) -> None:
    """What was kept of an earlier run is taken for this one's only where it is that."""
    source = write(tmp_path, [pair(i) for i in range(8)])

    def ids(name: str, bos: str = "<s>") -> list[list[int]]:
        tokenizer = tokenizer_of("chatml_eos")
        tokenizer.bos_token = bos  # its text is written by the template of Llama-2
        return [line["prompt"] for line in lines(compiled(source, tokenizer, chat_template=template(tmp_path, name)))]

    first, other, moved = ids("chatml"), ids("llama2"), ids("llama2", bos="<|im_start|>")
    assert first != other != moved and {row[0] for row in other} != {row[0] for row in moved}
    assert (ids("chatml"), ids("llama2")) == (first, other)


def test_a_template_without_a_conversation_is_an_error_that_says_how_to_make_some(tmp_path: Path) -> None:
    rows = [{"prompt": f"Who is {i}?", "chosen": f"It is {i}.", "rejected": "Who knows?"} for i in range(12)]
    source, file, tokenizer = write(tmp_path, rows), template(tmp_path, "chatml"), tokenizer_of("chatml")
    with pytest.raises(InputError, match=r"data\.chat_template is given, but no row is.*triples_as_chat"):
        compiled(source, tokenizer, chat_template=file)
    found = lines(compiled(source, tokenizer, chat_template=file, format="triples_as_chat"))
    assert [spell(tokenizer, line["prompt"]).decode() for line in found] == [
        f"<|im_start|>user\nWho is {i}?<|im_end|>\n<|im_start|>assistant\n" for i in range(12)
    ]


def test_conversations_without_a_template_are_an_error_that_names_the_cure(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.name_or_path = "some/model"
    with pytest.raises(InputError, match=r"some/model has no chat template; set data\.chat_template"):
        compiled(write(tmp_path, [pair(i) for i in range(4)]), tokenizer)


def test_a_row_that_the_template_refuses_is_dropped_and_in_the_ledger_and_all_are_an_error(tmp_path: Path) -> None:
    kind = (turn("system", "Be kind."),)
    tokenizer = FAMILIES["gemma"].tokenizer()
    data = compiled(write(tmp_path, [pair(i, kind if i == 5 else ()) for i in range(200)]), tokenizer)
    [line] = data.ledger.to_pylist()
    assert (line["row"], line["action"]) == (5, "dropped") and "System role not supported" in line["reason"]
    assert [line["row"] for line in lines(data)] == [i for i in range(200) if i != 5]
    with pytest.raises(InputError, match=r"none of the first 9 rows .*messages; row 0: .*System role not supported"):
        compiled(write(tmp_path, [pair(i, kind) for i in range(9)], "kind.jsonl"), tokenizer)


def test_an_answer_to_nothing_is_dropped_and_the_other_rows_are_not(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(200)]
    rows[3] = {name: turns[-1:] for name, turns in rows[3].items()}
    data = compiled(write(tmp_path, rows), FAMILIES["chatml"].tokenizer())
    assert [line["row"] for line in lines(data)] == [i for i in range(200) if i != 3]


def test_what_a_turn_holds_besides_its_text_may_be_anything(tmp_path: Path) -> None:
    """Times of day, as in logs of chats, which JSON has not."""
    at = {"timestamp": datetime(2024, 5, 17, 12, 30)}
    rows = [{name: [t | at for t in turns] for name, turns in pair(i).items()} for i in range(8)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    data = compiled(str(tmp_path / "rows.parquet"), FAMILIES["chatml"].tokenizer())
    plain = compiled(write(tmp_path, [pair(i) for i in range(8)]), FAMILIES["chatml"].tokenizer())
    assert [line["prompt"] for line in lines(data)] == [line["prompt"] for line in lines(plain)]


def test_an_empty_cell_that_a_format_of_ones_own_passes_on_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cells_of_mine.py").write_text(
        "from dpo_lightning.data.preference import Preference\n"
        "def rows(row):\n"
        "    return Preference(row['q'], row['good'], row['bad'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"q": f"q {i}", "good": None if i == 7 else "b", "bad": "c"} for i in range(200)]
    data = compiled(write(tmp_path, rows), byte_level(), format="cells_of_mine.rows")
    assert [line["row"] for line in lines(data)] == [i for i in range(200) if i != 7]


def test_an_answer_that_ends_in_eos_already_gets_no_second_from_the_template() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    eos = tokenizer.eos_token
    prompt = ({"role": "user", "content": "a"},)
    once, twice = (ChatTemplate(tokenizer)(Conversation(prompt, f"b{end}", "c")) for end in ("", eos))
    assert once == twice and once.chosen == f"b{eos}"
