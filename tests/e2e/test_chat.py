"""A template that is given for training goes wherever the model goes: into a fit's export, and into `export`'s."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.conftest import RunCli

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def words(toy: Path, tmp_path: Path) -> list[object]:
    rows = [json.loads(line) for line in (toy / "pairs.jsonl").read_text().splitlines()]
    turns = [
        {
            name: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
            for name in row
        }
        for row in rows
    ]
    chats = [{name: row[name] for name in ("chosen", "rejected")} for row in turns]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    words: list[object] = ["--model.checkpoint", toy / "model", "--data.source", tmp_path / "chats.jsonl"]
    words += ["--data.chat_template", tmp_path / "template.jinja", "--trainer.max_steps", 1, "--model.save_every", 1]
    return [*words, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", tmp_path / "runs"]


def test_the_template_is_exported_with_the_tokenizer(run_cli: RunCli, words: list[object], tmp_path: Path) -> None:
    done = run_cli("fit", *words)
    assert done.status == 0, done.err
    run = tmp_path / "runs/version_0"
    options = ["--ckpt_path", run / "checkpoints/last.ckpt", "--output_dir", tmp_path / "again"]
    assert run_cli("export", *options).status == 0
    for folder in (run / "export", tmp_path / "again"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        said = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
        )
        assert said == "[user]a[assistant]"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_template_that_no_row_goes_through_is_an_error(
    streaming: bool, run_cli: RunCli, words: list[object], toy: Path, tmp_path: Path
) -> None:
    plain = ["--data.source", toy / "pairs.jsonl"]
    if streaming:
        plain += ["--data.streaming", "true", "--data.val_source", toy / "pairs.jsonl"]
    done = run_cli("fit", *words, *plain)
    assert done.status == 2 and "data.chat_template is given, but no row is a conversation" in done.err[-1]


def test_a_stream_of_conversations_trains(run_cli: RunCli, words: list[object], tmp_path: Path) -> None:
    done = run_cli("fit", *words, "--data.streaming", "true", "--data.val_source", tmp_path / "chats.jsonl")
    assert done.status == 0, done.err
    assert run_cli("test", *words[:-6], *words[-4:], "--ckpt_path", "last").status == 0
