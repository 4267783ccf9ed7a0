"""The default recipe, as shipped, keeps its promises: what is learned, by the oracle, on questions held out.

One seed runs always; `make seeds` runs three.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lightning.data.oracle import figures
from dpo_lightning.data.world import SHOWN
from dpo_lightning.training.curves import read_metrics

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SEEDS = (0, pytest.param(1, marks=pytest.mark.campaign), pytest.param(2, marks=pytest.mark.campaign))


@pytest.fixture(scope="module", params=SEEDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of `fit` and `test`, in this order, below one directory, as `make tiny` makes them."""
    root = tmp_path_factory.mktemp("tiny")
    words = ["--config", CONFIG, "--seed_everything", request.param, "--trainer.default_root_dir", root]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    for verb, further in (("fit", []), ("test", ["--ckpt_path", "last"])):
        command = [sys.executable, "-m", "dpo_lightning", verb, *words, *further]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (root / f"{verb}.txt").write_text(done.stdout)
    return root


@pytest.fixture(scope="module")
def found(run: Path) -> dict[str, float]:
    """The last value of every figure."""
    series = read_metrics(run / "version_0" / "metrics.csv") | read_metrics(run / "version_1" / "metrics.csv")
    return {tag: values[-1] for tag, (_, values) in series.items()}


def test_the_accuracy_is_near_the_best_that_the_noise_allows(found: dict[str, float]) -> None:
    best = found["val/rewards/accuracies/best"]
    assert 0.95 * best <= found["val/rewards/accuracies"] <= best + 0.02


def test_true_reward_goes_most_of_the_way_to_the_best_answers(found: dict[str, float]) -> None:
    base = found["test/true_reward/reference"]
    assert (found["test/true_reward"] - base) / (1 - base) >= 0.8


def test_most_answers_are_true_on_the_subject_and_finished(found: dict[str, float]) -> None:
    assert found["test/good"] >= 0.85
    assert found["test/good/reference"] < 0.5


def test_the_policy_wins_and_stays_near(found: dict[str, float]) -> None:
    assert found["test/win_rate"] >= 0.8
    assert 0 < found["test/kl"] < 6


def test_the_electrician_is_answered_well_by_the_exported_policy(run: Path) -> None:
    """Greedy, by transformers alone."""
    folder = run / "version_0" / "export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("What does an electrician do?", return_tensors="pt")
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=64, pad_token_id=tokenizer.eos_token_id)[0]
    assert ids[-1] == tokenizer.eos_token_id
    said = tokenizer.decode(ids[prompt.input_ids.shape[1] :], skip_special_tokens=True)
    judged = figures("What does an electrician do?", said)
    assert judged["true"] == judged["polite"] == judged["finished"] == 1, said


def test_three_questions_are_shown_before_and_after(run: Path) -> None:
    said = (run / "fit.txt").read_text().split("Sampled before and after:")[1]
    lines = [line.strip() for line in said.splitlines()]
    for question in SHOWN:
        before, after = lines[lines.index(question) + 1 :][:2]
        assert before.startswith("before: ") and after.startswith("after: ")
    afters = [line.removeprefix("after: ") for line in lines if line.startswith("after: ")]
    judged = [figures(question, said) for question, said in zip(SHOWN, afters, strict=True)]
    assert sum(answer["good"] for answer in judged) >= 2, afters


def test_nobody_is_warned(run: Path) -> None:
    assert "Warning" not in (run / "fit.txt").read_text() + (run / "test.txt").read_text()
