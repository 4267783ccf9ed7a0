"""A whole run: what it prints, what it writes, and that the numbers written are those of the weights exported."""

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lightning.data.sources import read
from dpo_lightning.training.curves import read_metrics
from tests.conftest import SHARED, RunCli

FIGURES = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/accuracies/longer",
    "rewards/accuracies/shorter",
    "rewards/margins",
    "rewards/saturation",
    "displacement",
    "kl_of_pairs",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
}
SPEED = {"pairs_per_second", "tokens_per_second", "grad_norm", "lr"}


def last_values(run: Path, stage: str) -> dict[str, float]:
    """The last value of each figure of a stage in metrics.csv."""
    series = read_metrics(run / "metrics.csv")
    return {tag.removeprefix(f"{stage}/"): values[-1] for tag, (_, values) in series.items() if tag.startswith(stage)}


def test_a_run_leaves_what_the_contract_names(run_cli: RunCli, toy_words: list[str], tmp_path: Path) -> None:
    done = run_cli("fit", *toy_words, "--trainer.max_epochs", 2)
    assert done.status == 0, done.err
    run = tmp_path / "runs" / "version_0"
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "export", "reward_curves.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    last = run / "checkpoints" / "last.ckpt"
    assert last.is_file() and not last.is_symlink()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last.ckpt"]
    for path in (run, run / "export", run / "reward_curves.png", last):
        assert str(path) in done.out
    assert "python -m dpo_lightning test --config" in done.out
    assert (run / "reward_curves.png").read_bytes().startswith(b"\x89PNG")

    with (run / "metrics.csv").open() as file:
        columns = set(csv.DictReader(file).fieldnames or ())
    tags = {f"{stage}/{name}" for stage in ("train", "val") for name in FIGURES} | {f"train/{name}" for name in SPEED}
    assert columns == tags | {"step"}
    events = EventAccumulator(str(run))
    events.Reload()
    assert tags <= set(events.Tags()["scalars"])

    # 48 pairs to train on in batches of 4: a row for each of 24 steps; a validation at each of 2 epochs' ends, at the
    # number of steps done, and none twice.
    series = read_metrics(run / "metrics.csv")
    assert series["train/loss"][0] == list(range(1, 25))
    assert series["val/loss"][0] == [12, 24]
    assert (run / "metrics.csv").read_text().count("\n") == 1 + 24 + 2


def test_a_figure_over_some_pairs_is_logged_only_where_there_is_one(
    run_cli: RunCli, toy: Path, toy_words: list[str], tmp_path: Path
) -> None:
    """Of pairs whose chosen answer is the longer one, then of all: a step of four may have none that is shorter."""
    rows = [json.loads(line) for line in (toy / "pairs.jsonl").read_text().splitlines()]
    longer = [row for row in rows if len(row["chosen"]) > len(row["rejected"])]
    assert 20 < len(longer) < 50
    (tmp_path / "longer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer))
    for further in (["--data.source", tmp_path / "longer.jsonl"], []):
        assert run_cli("fit", *toy_words, *further).status == 0
    first, second = (tmp_path / "runs" / f"version_{n}" / "metrics.csv" for n in (0, 1))
    assert "nan" not in first.read_text() + second.read_text()
    found = read_metrics(first)
    assert not any(tag.endswith("shorter") for tag in found)
    for stage in ("train", "val"):
        assert found[f"{stage}/rewards/accuracies/longer"] == found[f"{stage}/rewards/accuracies"]
    found = read_metrics(second)
    some, all_steps = (set(found[f"train/{name}"][0]) for name in ("rewards/accuracies/shorter", "loss"))
    assert set() < some < all_steps


def test_the_first_step_starts_from_the_reference_and_training_teaches(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    assert run_cli("fit", *toy_words, "--trainer.max_epochs", 4).status == 0
    series = read_metrics(tmp_path / "runs" / "version_0" / "metrics.csv")
    first = {tag: values[0] for tag, (_, values) in series.items()}
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["train/rewards/accuracies"] == pytest.approx(0.5, abs=0.51)
    assert first["train/rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert series["val/rewards/accuracies"][1][-1] == 1.0
    assert series["val/loss"][1][-1] < series["val/loss"][1][0] < math.log(2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_exported_folder_in_a_new_process_scores_what_was_logged(
    run_cli: RunCli, toy: Path, toy_words: list[str], tmp_path: Path, precision: str
) -> None:
    toy_words = [*toy_words, "--trainer.precision", precision]
    assert run_cli("fit", *toy_words, "--trainer.max_epochs", 2).status == 0
    run = tmp_path / "runs" / "version_0"
    words = [*toy_words, "--model.reference", "FrozenModel", "--model.reference.checkpoint", str(toy / "model")]
    words[words.index("--model.checkpoint") + 1] = str(run / "export")
    words = [word for i, word in enumerate(words) if "optimizer" not in word and "optimizer" not in words[i - 1]]
    command = [sys.executable, "-m", "dpo_lightning", "validate", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logged, found = last_values(run, "val"), last_values(run.with_name("version_1"), "val")
    assert found.keys() == FIGURES
    assert found == pytest.approx(logged, rel=1e-6, abs=1e-7)


def test_the_exported_folder_generates_and_keeps_its_dropout_rates(
    run_cli: RunCli, toy: Path, toy_words: list[str], tmp_path: Path
) -> None:
    assert run_cli("fit", *toy_words, "--trainer.max_steps", 3).status == 0
    export = tmp_path / "runs" / "version_0" / "export"
    model = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    prompt = tokenizer("What does a saw do?", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > prompt.input_ids.shape[1]
    assert json.loads((export / "config.json").read_text())["resid_pdrop"] == 0.1
    card = (export / "README.md").read_text()
    assert "model-index" in card and "val/rewards/accuracies" in card and "Sigmoid(beta=0.1" in card
    assert str(tmp_path) not in card and str(toy) not in card
    before = load_file(toy / "model" / "model.safetensors")
    after = load_file(export / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_whoever_may_read_the_config_may_read_the_weights(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    assert run_cli("fit", *toy_words, "--trainer.max_steps", 1, "--trainer.limit_val_batches", 0).status == 0
    folder = tmp_path / "runs/version_0/export"
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_the_export_verb_writes_the_folder_that_the_run_did(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    assert run_cli("fit", *toy_words, "--trainer.max_steps", 3).status == 0
    run = tmp_path / "runs" / "version_0"
    last = run / "checkpoints" / "last.ckpt"
    done = run_cli("export", "--ckpt_path", last, "--output_dir", tmp_path / "again")
    assert done.status == 0, done.err
    first = {path.name: path.read_bytes() for path in (run / "export").iterdir() if path.name != "README.md"}
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir() if path.name != "README.md"}
    assert again == first
    done = run_cli("export", "--ckpt_path", tmp_path / "none.ckpt", "--output_dir", tmp_path / "again")
    assert done.status == 2 and "none.ckpt: no such checkpoint" in done.err[-1]


def test_max_steps_inside_an_epoch_still_ends_with_a_validation_of_the_final_weights(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    assert run_cli("fit", *toy_words, "--trainer.max_steps", 5).status == 0
    assert read_metrics(tmp_path / "runs" / "version_0" / "metrics.csv")["val/loss"][0] == [5]
    # With max_steps alone epochs are unlimited.
    assert run_cli("fit", *toy_words, "--trainer.max_steps", 14).status == 0
    assert read_metrics(tmp_path / "runs" / "version_1" / "metrics.csv")["train/loss"][0][-1] == 14


def test_one_epoch_is_the_default_and_no_validation_is_run_where_none_is_wanted(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    assert run_cli("fit", *toy_words, "--trainer.limit_val_batches", 0).status == 0
    series = read_metrics(tmp_path / "runs" / "version_0" / "metrics.csv")
    assert series["train/loss"][0][-1] == 12
    assert not any(tag.startswith("val") for tag in series)


def test_a_finished_run_that_is_resumed_validates_and_exports_the_same_weights(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    assert run_cli("fit", *toy_words, "--trainer.max_steps", 5).status == 0
    done = run_cli("fit", *toy_words, "--trainer.max_steps", 5, "--ckpt_path", "last")
    assert done.status == 0, done.err
    first, second = (tmp_path / "runs" / f"version_{n}" for n in (0, 1))
    assert (first / "export/model.safetensors").read_bytes() == (second / "export/model.safetensors").read_bytes()
    assert last_values(second, "val") == pytest.approx(last_values(first, "val"), rel=1e-6)
    assert read_metrics(second / "metrics.csv")["train/loss"] == read_metrics(first / "metrics.csv")["train/loss"]
    assert "checkpoints/last.ckpt" in yaml.safe_load((second / "config.yaml").read_text())["ckpt_path"]


def test_a_run_that_goes_on_remembers_its_validations_and_what_was_said_of_them(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    """last.ckpt is written at the second epoch's end, before that is validated."""
    assert run_cli("fit", *toy_words, "--trainer.max_epochs", 2).status == 0
    first, second = (tmp_path / "runs" / f"version_{n}" for n in (0, 1))
    checkpoint = torch.load(first / "checkpoints" / "last.ckpt", weights_only=True)
    steps, losses = read_metrics(first / "metrics.csv")["val/loss"]
    assert len(steps) == 2 and [figures["loss"] for figures in checkpoint["validations"]] == losses[:1]
    torch.save(checkpoint | {"warnings": {"strange": "look at the margins"}}, first / "checkpoints" / "last.ckpt")
    done = run_cli("fit", *toy_words, "--trainer.max_epochs", 3, "--ckpt_path", "last")
    assert done.status == 0 and "Warning: strange: look at the margins" in done.out
    both = torch.load(second / "checkpoints" / "last.ckpt", weights_only=True)
    assert [
        figures["loss"] for figures in both["validations"]
    ] == losses  # the second, too, which it was not written with
    assert {figures["pairs"] for figures in both["validations"]} == {12}
    assert both["warnings"] == {"strange": "look at the margins"}


@pytest.mark.parametrize("change", [("--data.batch_size", 8), ("--seed_everything", 1)])
def test_a_run_that_is_resumed_with_another_plan_of_batches_is_refused(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path, change: tuple[str, object]
) -> None:
    assert run_cli("fit", *toy_words, "--trainer.max_steps", 5).status == 0
    done = run_cli("fit", *toy_words, "--trainer.max_steps", 9, "--ckpt_path", "last", *change)
    assert done.status == 2 and "which pairs come next" in done.err[-1]
    assert not (tmp_path / "runs" / "version_1").exists()


def test_every_layout_gives_the_same_curve(run_cli: RunCli, toy_words: list[str], tmp_path: Path) -> None:
    curves = []
    for number, layout in enumerate(("shared", "packed", "padded")):
        words = [*toy_words, "--data.layout", layout, "--trainer.precision", "64-true", "--trainer.max_steps", 5]
        done = run_cli("fit", *words)
        assert done.status == 0, done.err
        assert f"Layout: {layout}" in "\n".join([done.out, *done.err])
        curves.append(read_metrics(tmp_path / "runs" / f"version_{number}" / "metrics.csv"))
    for tag in ("train/loss", "train/grad_norm", "train/logits/chosen", "val/rewards/margins", "val/logps/rejected"):
        assert curves[1][tag][1] == pytest.approx(curves[0][tag][1], rel=1e-9)
        assert curves[2][tag][1] == pytest.approx(curves[0][tag][1], rel=1e-9)


@pytest.mark.parametrize("split", [("8", "1"), ("2", "4"), ("4", "2")])
def test_accumulation_leaves_every_figure_as_it_is(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path, split: tuple[str, str]
) -> None:
    """49 pairs in steps of 8: the last step of an epoch is short, and its micro-batches are unequal."""
    common = [*toy_words, "--data.val_fraction", 0.19, "--trainer.precision", "64-true", "--trainer.max_epochs", 2]
    for batch, accumulate in (("8", "1"), split):
        words = ["--data.batch_size", batch, "--trainer.accumulate_grad_batches", accumulate]
        assert run_cli("fit", *common, *words).status == 0
    one, other = (read_metrics(tmp_path / "runs" / f"version_{n}" / "metrics.csv") for n in (0, 1))
    assert one["train/loss"][0] == other["train/loss"][0] == list(range(1, 15))
    for tag in one:
        if not tag.endswith("per_second"):
            assert other[tag][1] == pytest.approx(one[tag][1], rel=1e-9, abs=1e-12), tag


def test_supervised_training_is_the_same_command_with_another_loss(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    done = run_cli("fit", *toy_words, "--model.loss", "SFT", "--trainer.max_epochs", 2)
    assert done.status == 0, done.err
    series = read_metrics(tmp_path / "runs" / "version_0" / "metrics.csv")
    assert {tag for tag in series if tag.startswith("val")} == {"val/loss", "val/logps/chosen", "val/logits/chosen"}
    assert series["val/loss"][1][-1] < series["val/loss"][1][0]
    assert "reference: none" in "\n".join([done.out, *done.err])


def test_bf16_mixed_keeps_fp32_weights_and_starts_from_the_reference(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    assert run_cli("fit", *toy_words, "--trainer.precision", "bf16-mixed", "--trainer.max_steps", 2).status == 0
    run = tmp_path / "runs" / "version_0"
    assert {tensor.dtype for tensor in load_file(run / "export" / "model.safetensors").values()} == {torch.float32}
    assert read_metrics(run / "metrics.csv")["train/loss"][1][0] == pytest.approx(math.log(2), abs=1e-2)


def test_the_folder_of_a_run_is_named_after_its_first_config(
    run_cli: RunCli, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        f"model: {{checkpoint: {toy}/model}}\ndata: {{source: {toy}/pairs.jsonl}}\n"
        "trainer: {max_steps: 1, accelerator: cpu, enable_progress_bar: false}\n"
    )
    (tmp_path / "overlay.yaml").write_text("data: {batch_size: 3}\n")
    assert run_cli("fit", "--config", "mine.yaml", "--config", "overlay.yaml").status == 0
    config = yaml.safe_load((tmp_path / "runs/mine/version_0/config.yaml").read_text())
    assert config["data"]["batch_size"] == 3
    # The written config is a config: the closing message says how to use it.
    done = run_cli("validate", "--config", "runs/mine/version_0/config.yaml")
    assert done.status == 0, done.err
    assert (tmp_path / "runs/mine/version_1/metrics.csv").exists()


def test_rows_that_were_dropped_or_cut_stand_in_a_ledger(
    run_cli: RunCli, toy_words: list[str], toy: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (toy / "pairs.jsonl").read_text().splitlines()]
    rows[7]["rejected"] = rows[7]["chosen"]
    rows[9]["prompt"] = "x" * 200
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data.source", file, "--data.bad_rows", 0.05, "--trainer.max_steps", 1]
    assert run_cli("fit", *toy_words, *words).status == 0
    with (tmp_path / "runs/version_0/ledger.csv").open() as lines:
        found = [(int(line["row"]), line["action"], line["reason"]) for line in csv.DictReader(lines)]
    assert found[0] == (7, "dropped", "chosen and rejected are identical")
    assert found[1][:2] == (9, "cut") and re.match(r"prompt cut from 200 to \d+ tokens", found[1][2])


@pytest.mark.realdata
def test_the_main_job_on_real_preferences_with_a_real_model(run_cli: RunCli, tmp_path: Path) -> None:
    source = SHARED / "data/hh-helpful-512.jsonl.gz"
    words = ["--model.checkpoint", SHARED / "models/stories260K", "--data.source", source, "--data.val_fraction", 0.1]
    words += [
        "--trainer.max_steps",
        50,
        "--trainer.accelerator",
        "cpu",
        "--trainer.precision",
        "32-true",  # twice as fast as bf16 where the processor has none of its own
        "--trainer.default_root_dir",
        tmp_path / "runs",
    ]
    done = run_cli("fit", "--config", "configs/gpt2.yaml", *words)
    assert done.status == 0, done.err[-5:]
    run = tmp_path / "runs" / "version_0"
    series = read_metrics(run / "metrics.csv")
    assert series["train/loss"][0] == [10, 20, 30, 40, 50] and series["val/loss"][0] == [50]
    assert series["train/rewards/margins"][1][-1] > 0
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    story = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(story[0], skip_special_tokens=True).startswith("Once upon a time, there was")
    assert len(read(str(source))["train"]) == 512
