"""What users do with a run beside running it: other options, other callbacks, going on, looking again."""

import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar
from transformers import AutoModelForCausalLM

from dpo_lightning.training.callbacks import LAST, Progress
from dpo_lightning.training.curves import read_metrics
from tests.conftest import RunCli
from tests.toy import make_model


def run_of(folder: Path, number: int = 0) -> Path:
    return folder / "runs" / f"version_{number}"


def curve(folder: Path, tag: str, number: int = 0) -> list[float]:
    return read_metrics(run_of(folder, number) / "metrics.csv")[tag][1]


def weights(run: Path) -> bytes:
    return (run / "export" / "model.safetensors").read_bytes()


def test_validate_prints_the_figures_and_logs_them_at_the_checkpoints_step(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    assert run_cli("fit", *toy_words, "--trainer.max_steps", 5).status == 0
    done = run_cli("validate", *toy_words, "--ckpt_path", "last")
    assert done.status == 0, done.err
    first, second = (read_metrics(run_of(tmp_path, n) / "metrics.csv") for n in (0, 1))
    assert second["val/loss"][0] == [5]
    assert second["val/loss"][1] == pytest.approx(first["val/loss"][1], rel=1e-6)
    assert f"{second['val/loss'][1][0]:.4f}" in done.out and str(run_of(tmp_path, 1)) in done.out


def test_the_commands_of_the_closing_message_run(run_cli: RunCli, toy_words: list[str], tmp_path: Path) -> None:
    done = run_cli("fit", *toy_words, "--trainer.max_steps", 3)
    commands = re.findall(r"^  python -m dpo_lightning (.+)$", done.out, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["test", "fit", "chat"]
    assert (Path(commands.pop().split()[-1]) / "config.json").exists()  # a page ends with Ctrl-C
    for command in commands:
        again = run_cli(*shlex.split(command))
        assert again.status == 0, (command, again.err)
    assert (
        curve(tmp_path, "train/loss", 2) and read_metrics(run_of(tmp_path, 2) / "metrics.csv")["val/loss"][0][-1] == 6
    )


def test_the_closing_message_names_only_what_there_is(run_cli: RunCli, toy_words: list[str], tmp_path: Path) -> None:
    words = ["--trainer.max_steps", 1, "--trainer.enable_checkpointing", "false", "--trainer.logger", "false"]
    done = run_cli("fit", *toy_words, *words)
    assert done.status == 0, done.err
    assert "last.ckpt" not in done.out and "tensorboard" not in done.out and "No curves are drawn" in done.out
    assert (run_of(tmp_path) / "export" / "model.safetensors").exists()


def test_a_run_that_was_stopped_inside_an_epoch_goes_on_to_the_same_bits(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    words = [*toy_words, "--trainer.max_epochs", 2, "--trainer.num_sanity_val_steps", 0]
    assert run_cli("fit", *words).status == 0
    stop = ["--trainer.callbacks+=tests.e2e.killer.Stopper", "--trainer.callbacks.steps=7"]
    assert run_cli("fit", *words, *stop).status == 0
    assert torch.load(run_of(tmp_path, 1) / LAST, weights_only=True)["global_step"] == 7
    assert run_cli("fit", *words, "--ckpt_path", "last").status == 0
    assert weights(run_of(tmp_path, 2)) == weights(run_of(tmp_path, 0)) != weights(run_of(tmp_path, 1))
    assert curve(tmp_path, "train/lr", 2) == curve(tmp_path, "train/lr", 0)


def factor(name: str, step: int, warmup: int, total: int) -> float:
    """The learning rate of the step after `step`, as a share of its peak."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (total - warmup)
    return {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[name]


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (3, 3), (0.25, 2)])
def test_the_learning_rate_follows_its_closed_form(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path, name: str, warmup: float, steps: int
) -> None:
    words = ["--model.lr_scheduler", name, "--model.warmup_steps", warmup, "--trainer.max_steps", 8]
    assert run_cli("fit", *toy_words, *words, "--trainer.limit_val_batches", 0).status == 0
    expected = [1e-3 * factor(name, step, steps, 8) for step in range(8)]
    assert curve(tmp_path, "train/lr") == pytest.approx(expected, rel=1e-9)


def test_a_run_that_goes_on_further_takes_the_rates_of_the_longer_schedule(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    assert run_cli("fit", *toy_words, "--trainer.max_steps", 4).status == 0
    assert run_cli("fit", *toy_words, "--trainer.max_steps", 10, "--ckpt_path", "last").status == 0
    expected = [1e-3 * (1 - step / 4) for step in range(4)] + [1e-3 * (1 - step / 10) for step in range(4, 10)]
    assert curve(tmp_path, "train/lr", 1) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("model.optimizer.lr", 1e-4, "model.optimizer"),
        ("model.loss", "SFT", "model.loss"),
        ("model.loss.beta", 0.5, "model.loss"),
        ("model.lr_scheduler", "cosine", "model.lr_scheduler"),
        ("data.max_length", 64, "data.max_length"),
    ],
)
def test_an_option_that_a_resumed_run_would_ignore_is_refused(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path, option: str, value: object, named: str
) -> None:
    assert run_cli("fit", *toy_words, "--trainer.max_steps", 2).status == 0
    words = ["--trainer.max_steps", 4, "--ckpt_path", "last", f"--{option}", value]
    done = run_cli("fit", *toy_words, *words)
    assert done.status == 2 and named in done.err[-1] and "resumed" in done.err[-1]
    assert not run_of(tmp_path, 1).exists()


def test_a_checkpoint_of_another_model_and_a_file_that_is_none_are_refused(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    assert run_cli("fit", *toy_words, "--trainer.max_steps", 2).status == 0
    last = run_of(tmp_path) / LAST
    state = torch.load(last, weights_only=True)
    state["state_dict"].pop(next(name for name in state["state_dict"] if name.startswith("policy.")))
    torch.save(state, tmp_path / "other.ckpt")
    done = run_cli("fit", *toy_words, "--ckpt_path", tmp_path / "other.ckpt")
    assert done.status == 2 and "1 tensors differ" in done.err[-1]
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    done = run_cli("fit", *toy_words, "--ckpt_path", tmp_path / "text.ckpt")
    assert done.status == 2 and "text.ckpt: no such checkpoint" in done.err[-1]


def test_a_loss_of_ones_own_needs_neither_reference_nor_rewards(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    words = ["--model.loss", "tests.e2e.losses_of_ones_own.Likelihoods", "--model.loss.margin", 5.0]
    done = run_cli("fit", *toy_words, *words, "--trainer.max_epochs", 2)
    assert done.status == 0, done.err
    tags = {tag.removeprefix("val/") for tag in read_metrics(run_of(tmp_path) / "metrics.csv") if tag.startswith("val")}
    assert tags == {"loss", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"}
    assert curve(tmp_path, "val/loss")[-1] < curve(tmp_path, "val/loss")[0]


def test_a_reference_of_another_vocabulary_is_refused(run_cli: RunCli, toy_words: list[str], tmp_path: Path) -> None:
    make_model(tmp_path / "other")
    larger = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    larger.resize_token_embeddings(260)
    larger.save_pretrained(tmp_path / "other")
    words = ["--model.reference", "FrozenModel", "--model.reference.checkpoint", tmp_path / "other"]
    done = run_cli("fit", *toy_words, *words)
    assert done.status == 2 and "260 tokens" in done.err[-1] and "257" in done.err[-1]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--trainer.use_distributed_sampler", "true"], "use_distributed_sampler"),
        (["--trainer.overfit_batches", "2"], "data.max_train_pairs"),
        (["--trainer.limit_train_batches", "3", "--trainer.accumulate_grad_batches", "2"], "limit_train_batches 3"),
        (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches"),
        (
            [
                "--trainer.callbacks+=lightning.pytorch.callbacks.GradientAccumulationScheduler",
                "--trainer.callbacks.scheduling={0: 1, 1: 4}",
            ],
            "GradientAccumulationScheduler",
        ),
        (["--data.num_workers", "-1"], "num_workers"),
        (["--data.source", "[]"], "empty"),
        (["--data.format", "tests.e2e.losses_of_ones_own.broken"], "broken failed with KeyError: 'question'"),
    ],
)
def test_what_would_break_the_plan_of_batches_is_refused(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path, words: list[str], named: str
) -> None:
    done = run_cli("fit", *toy_words, "--trainer.max_epochs", 2, *words)
    assert done.status == 2 and named in done.err[-1], done.err[-1]
    assert not run_of(tmp_path).exists()


def test_a_folder_that_cannot_be_written_to_is_an_error_with_the_key(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = run_cli("fit", *toy_words, "--trainer.default_root_dir", tmp_path / "file" / "runs")
    assert done.status == 2 and "trainer.default_root_dir" in done.err[-1]


def test_worker_processes_and_gradient_checkpointing_change_no_figure(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    words = [*toy_words, "--trainer.max_steps", 5, "--trainer.precision", "64-true"]
    for options in ([], ["--data.num_workers", 2], ["--model.gradient_checkpointing", "true"]):
        assert run_cli("fit", *words, *options).status == 0
    for number in (1, 2):
        for tag in ("train/loss", "train/grad_norm", "val/rewards/margins"):
            assert curve(tmp_path, tag, number) == pytest.approx(curve(tmp_path, tag), rel=1e-12)


def test_a_prompt_on_both_sides_is_said(run_cli: RunCli, toy: Path, toy_words: list[str]) -> None:
    place = toy_words.index("--data.val_fraction")
    words = [*toy_words[:place], "--data.val_source", str(toy / "pairs.jsonl"), *toy_words[place + 2 :]]
    done = run_cli("fit", *words, "--trainer.max_steps", 1)
    assert done.status == 0 and "60 prompts are both trained on and validated on" in "\n".join(done.err)


def test_the_bar_shows_loss_accuracy_and_margin(run_cli: RunCli, toy_words: list[str]) -> None:
    place = toy_words.index("--trainer.enable_progress_bar")
    done = run_cli("fit", *toy_words[:place], *toy_words[place + 2 :], "--trainer.max_steps", 3)
    bar = done.out + "\n".join(done.err)
    assert re.search(r"loss=\d\.\d+, accuracy=\d\.\d+, margin=-?\d\.\d+", bar)
    assert "weights_only" not in bar
    assert issubclass(Progress, ProgressBar)


def test_another_bar_takes_the_place_of_ours(run_cli: RunCli, toy_words: list[str]) -> None:
    place = toy_words.index("--trainer.enable_progress_bar")
    words = [*toy_words[:place], *toy_words[place + 2 :], "--trainer.max_steps", 1]
    done = run_cli("fit", *words, "--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar")
    assert done.status == 0, done.err
