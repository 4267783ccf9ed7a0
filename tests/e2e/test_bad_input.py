"""Bad input: exit status not 0, the last line of stderr names what, where and the cure, and nothing is half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import RunCli

ROW = {"prompt": "Why?", "chosen": " Because.", "rejected": " No."}


def write(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pairs(change: dict[str, object] | None = None, at: int = 3) -> Callable[[Path, Path], list[object]]:
    """Options for ten rows, of which row `at` is changed."""

    def options(folder: Path, toy: Path) -> list[object]:
        rows = [ROW | {"prompt": f"{number}?"} for number in range(10)]
        rows[at] |= change or {}
        return ["--data.source", write(folder / "rows.jsonl", rows)]

    return options


def copy_of_model(folder: Path, toy: Path) -> Path:
    return Path(shutil.copytree(toy / "model", folder / "copy"))


def without_weights(folder: Path, toy: Path) -> list[object]:
    model = copy_of_model(folder, toy)
    (model / "model.safetensors").unlink()
    return ["--model.checkpoint", model]


def without_tokenizer(folder: Path, toy: Path) -> list[object]:
    model = copy_of_model(folder, toy)
    for file in model.glob("token*"):
        file.unlink()
    return ["--model.checkpoint", model]


def damaged_weights(folder: Path, toy: Path) -> list[object]:
    model = copy_of_model(folder, toy)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return ["--model.checkpoint", model]


def yaml_file(text: str) -> Callable[[Path, Path], list[object]]:
    def options(folder: Path, toy: Path) -> list[object]:
        (folder / "mine.yaml").write_text(text)
        return ["--config", folder / "mine.yaml"]

    return options


def columns(folder: Path, toy: Path) -> list[object]:
    return ["--data.source", write(folder / "rows.jsonl", [{"question": "a", "good": "b"}])]


def empty(folder: Path, toy: Path) -> list[object]:
    return ["--data.source", write(folder / "rows.jsonl", [])]


def malformed(folder: Path, toy: Path) -> list[object]:
    file = write(folder / "rows.jsonl", [ROW] * 3)
    file.write_text(file.read_text() + "{not json\n")
    return ["--data.source", file]


def words(*options: object) -> Callable[[Path, Path], list[object]]:
    return lambda folder, toy: list(options)


#: case -> options, and what the last line of stderr must name
CASES: dict[str, tuple[Callable[[Path, Path], list[object]], tuple[str, ...]]] = {
    "missing file": (words("--data.source", "none.jsonl"), ("none.jsonl", "no such file", "hub id")),
    "wrong columns": (columns, ("rows.jsonl", "good (text)", "prompt, chosen, rejected", "data.format")),
    "empty data set": (empty, ("rows.jsonl", "empty")),
    "malformed line": (malformed, ("rows.jsonl", "row 3", "mend")),
    "number": (pairs({"chosen": 5}), ("rows.jsonl", "row 3: chosen is of type int", "data.bad_rows")),
    "null": (pairs({"rejected": None}), ("rows.jsonl", "row 3: rejected is missing")),
    "list": (pairs({"prompt": ["x"]}), ("rows.jsonl", "row 3: prompt is of type list")),
    "all rows": (pairs({"rejected": " "}, 0), ("rows.jsonl", "row 0: rejected is empty")),
    "identical answers": (pairs({"rejected": " Because."}), ("row 3: chosen and rejected are identical",)),
    "one prompt": (
        lambda folder, toy: ["--data.source", write(folder / "rows.jsonl", [ROW] * 4)],
        ("rows.jsonl", "only one prompt", "data.val_source"),
    ),
    "no tokenizer": (without_tokenizer, ("copy", "no tokenizer", "model.tokenizer")),
    "no weights": (without_weights, ("copy", "no weights", "model.safetensors")),
    "damaged weights": (damaged_weights, ("copy", "cannot be read", "again")),
    "no checkpoint": (words("--model.checkpoint", "./nowhere"), ("./nowhere", "no such folder")),
    "hub model": (words("--model.checkpoint", "nobody/nothing"), ("nobody/nothing", "the network")),
    "hub data": (words("--data.source", "nobody/nothing"), ("nobody/nothing", "the network")),
    "short max_length": (words("--data.max_length", 3), ("pairs.jsonl", "shorter than every prompt", "row")),
    "long max_length": (words("--data.max_length", 3000), ("3000", "128")),
    "unknown key": (yaml_file("data: {batchsize: 3}\n"), ("mine.yaml", "data.batchsize", "data.batch_size?")),
    "unknown key as a word": (words("--model.checkpont", "x"), ("model.checkpont", "model.checkpoint?")),
    "no YAML": (yaml_file("data: {batch_size: 3"), ("mine.yaml", "is not YAML")),
    "no config": (words("--config", "none.yaml"), ("none.yaml", "no such config file")),
    "wrong type": (words("--data.batch_size", "many"), ("data.batch_size", "many")),
    "dropped field": (
        yaml_file("model: {loss: {class_path: SFT, init_args: {beta: 0.3}}}\n"),
        ("mine.yaml", "model.loss.beta", "SFT"),
    ),
    "unknown loss": (words("--model.loss", "Nope"), ("Nope", "Sigmoid")),
    "beta": (words("--model.loss.beta", 0), ("Sigmoid.beta", "above 0")),
    "two validations": (words("--data.val_split", "test"), ("data.val_split and data.val_fraction",)),
    "no split": (words("--data.train_split", "nope"), ("pairs.jsonl", "'nope'", "train")),
    "reference": (words("--model.loss", "SFT", "--model.reference", "FrozenModel"), ("FrozenModel", "SFT")),
    "nothing to resume": (words("--ckpt_path", "last"), ("runs", "last.ckpt")),
    "no such checkpoint": (words("--ckpt_path", "gone.ckpt"), ("gone.ckpt", "no such checkpoint")),
    "no format": (words("--data.format", "no.such.format"), ("no.such.format", "triples")),
    "no end": (words("--trainer.max_epochs", -1), ("lr_scheduler", "trainer.max_steps")),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_with_a_sentence_and_writes_nothing(
    case: str, run_cli: RunCli, toy: Path, toy_words: list[str], tmp_path: Path
) -> None:
    options, named = CASES[case]
    done = run_cli("fit", *toy_words, *options(tmp_path, toy))
    assert done.status not in (0, None)
    assert done.err[-1].startswith("error: ")
    for text in named:
        assert text in done.err[-1]
    assert "Traceback" not in "\n".join(done.err)
    assert not list((tmp_path / "runs").glob("version_*"))


def test_an_unknown_verb_is_named_with_those_that_there_are(run_cli: RunCli) -> None:
    done = run_cli("fitt")
    assert done.status == 2
    assert "'fitt'" in done.err[-1] and "fit, validate, test" in done.err[-1]


def test_a_tokenizer_that_the_model_does_not_know_is_refused(
    run_cli: RunCli, toy: Path, toy_words: list[str], tmp_path: Path
) -> None:
    model = copy_of_model(tmp_path, toy)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    extra = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append({"id": 257, "content": "<new>", **extra})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = run_cli("fit", *toy_words, "--model.tokenizer", model)
    assert done.status == 2
    assert "258 tokens" in done.err[-1] and "257" in done.err[-1]
