"""A loss that is not finite stops a run before weights are spoiled for good; its rows are named and kept."""

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_lightning.data.packing import PreferenceBatch
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.losses import Sigmoid
from dpo_lightning.training import cli
from dpo_lightning.training.callbacks import LAST
from tests.conftest import RunCli
from tests.e2e import processes
from tests.toy import make_pairs, make_tokenizer

#: The row that makes the loss what it is, its chosen answer, and the tokens of that, EOS included.
ROW, ANSWER, TOKENS = 17, " " + 40 * "x", 42
PAIRS = 60
#: The place of the row in the first epoch's order: of which step it is, given how many pairs a step has.
PLACE = np.random.default_rng((0, 0)).permutation(PAIRS).tolist().index(ROW)


@dataclass(frozen=True)
class Odd(Sigmoid):
    """The DPO loss, but for pairs whose chosen answer has so many tokens.

    Args:
        tokens: of the answer.
        value: what the loss is then.
    """

    tokens: int = TOKENS
    value: float = math.nan

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        losses = super().__call__(policy, reference)
        return losses * torch.where(policy.lengths[: policy.num_pairs] == self.tokens, self.value, 1.0)


@pytest.fixture
def words(toy_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Trains on all of the toy's pairs, of which one has another answer."""
    monkeypatch.setattr(cli, "draw_curves", lambda *_: None)
    for name, count in (("train", PAIRS), ("val", 8)):
        make_pairs(tmp_path / f"{name}.jsonl", count)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows[ROW]["chosen"] = ANSWER
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = {
        "--data.source": tmp_path / "train.jsonl",
        "--data.val_fraction": None,
        "--trainer.log_every_n_steps": None,
    }
    kept = [
        word for pair in zip(toy_words[::2], toy_words[1::2], strict=True) if pair[0] not in changed for word in pair
    ]
    sources = ["--data.source", tmp_path / "train.jsonl", "--data.val_source", tmp_path / "val.jsonl"]
    return [*kept, *sources, "--model.samples", 0, "--model.loss", f"{__name__}.Odd"]


def kept_batch(sentence: str) -> tuple[PreferenceBatch, Tensor]:
    """The batch in the file that is named, and its losses."""
    (file,) = re.findall(r"the batch is in (\S+?);", sentence)
    found = torch.load(file, weights_only=True)
    losses = found.pop("losses")
    assert found.keys() == {field.name for field in fields(PreferenceBatch)}
    return PreferenceBatch(**found), losses


def assert_stopped_by_the_row(done: SimpleNamespace, step: int) -> None:
    """With status 2, and a sentence that has the row, the step and the batch, in which the row is as it was read."""
    sentence = done.err[-1]
    assert done.status == 2 and "Traceback" not in "\n".join(done.err), done.err
    assert re.match(rf"error: the loss is not finite for \S+\.jsonl row {ROW}, at optimizer step ", sentence)
    assert sentence.endswith("lower the learning rate, clip gradients or look at these rows")
    last, before = map(int, re.findall(r"step (\d+) or up to (\d+) micro-batches before", sentence)[0])
    assert last - before == step
    batch, losses = kept_batch(sentence)
    (place,) = [place for place, row in enumerate(batch.pair_ids.tolist()) if row == ROW]
    assert losses.isfinite().tolist() == [row != ROW for row in batch.pair_ids.tolist()]
    answer = batch.target[batch.answer == place].tolist()
    assert make_tokenizer().decode(answer) == ANSWER + "<eos>"


@pytest.mark.parametrize("value", [".nan", ".inf"])
@pytest.mark.parametrize("every", [1, 4, 50])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_row(
    run_cli: RunCli, words: list[object], tmp_path: Path, value: str, every: int
) -> None:
    """Where figures are reported next, or at the epoch's end; nothing is left of a run that had no checkpoint."""
    done = run_cli("fit", *words, "--trainer.log_every_n_steps", every, "--model.loss.value", value)
    assert_stopped_by_the_row(done, step=PLACE // 4 + 1)
    assert not list((tmp_path / "runs").glob("version_*"))


def test_a_row_of_the_very_first_batch_is_named_like_any_other(
    run_cli: RunCli, words: list[object], tmp_path: Path
) -> None:
    """Policy and reference agree there; it is the loss that is no number."""
    done = run_cli("fit", *words, "--data.batch_size", PAIRS)
    assert_stopped_by_the_row(done, step=1)


@pytest.mark.parametrize("save", [1, 3])
def test_the_last_checkpoint_is_of_before(run_cli: RunCli, words: list[object], tmp_path: Path, save: int) -> None:
    done = run_cli("fit", *words, "--trainer.log_every_n_steps", 50, "--model.save_every", save)
    step = PLACE // 4 + 1
    assert_stopped_by_the_row(done, step)
    run = tmp_path / "runs" / "version_0"
    checkpoint = torch.load(run / LAST, weights_only=True)
    assert checkpoint["global_step"] == (step - 1) // save * save > 0
    assert all(weights.isfinite().all() for weights in checkpoint["state_dict"].values())
    assert not (run / "export").exists()


def test_a_run_that_is_stopped_before_figures_are_reported_spoils_no_checkpoint(
    run_cli: RunCli, words: list[object], tmp_path: Path
) -> None:
    """As early stopping and time limits do, right after the step in which the row was."""
    step = PLACE // 4 + 1
    stop = ["--trainer.callbacks+=tests.e2e.killer.Stopper", f"--trainer.callbacks.steps={step}"]
    done = run_cli("fit", *words, "--trainer.log_every_n_steps", 50, "--model.save_every", 50, *stop)
    assert_stopped_by_the_row(done, step)
    assert not list((tmp_path / "runs").glob("version_*"))


def test_with_accumulation_the_micro_batch_is_kept(run_cli: RunCli, words: list[object]) -> None:
    """Of the step's two; which of them, the plan decides."""
    done = run_cli("fit", *words, "--trainer.accumulate_grad_batches", 2, "--trainer.log_every_n_steps", 1)
    sentence = done.err[-1]
    assert done.status == 2 and f"row {ROW}, at optimizer step {PLACE // 8 + 1} or up to " in sentence
    batch, losses = kept_batch(sentence)
    assert batch.num_pairs == 4 and batch.pair_ids[~losses.isfinite()].tolist() == [ROW]


@pytest.mark.e2e
def test_both_ranks_stop_and_the_one_that_has_the_row_names_it(words: list[object], tmp_path: Path) -> None:
    done = processes.run("fit", *words, "--trainer.log_every_n_steps", 1, ranks=2, expected=2)
    assert done.statuses == (2, 2)
    assert done.output.count(f".jsonl row {ROW}, at optimizer step ") == 1
    assert done.output.count("error: the loss is not finite on another rank") == 1
    (file,) = (tmp_path / "runs").glob("not_finite_rank*.pt")
    assert ROW in torch.load(file, weights_only=True)["pair_ids"].tolist()


@dataclass(frozen=True)
class Cliff(Sigmoid):
    """The DPO loss with a derivative that is not finite: that of a square root at 0."""

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        return super().__call__(policy, reference) + (policy.token_logps * 0).sum().abs().sqrt()


def test_a_gradient_that_is_not_finite_under_finite_losses_stops_the_run(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    done = run_cli("fit", *toy_words, "--model.loss", f"{__name__}.Cliff", "--trainer.max_steps", 3)
    assert done.status == 2
    assert "the gradient is not finite at optimizer step 1" in done.err[-1]
    assert not list((tmp_path / "runs").glob("version_*/export"))
