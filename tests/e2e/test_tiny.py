"""The default recipe, as shipped, keeps its promises: what is learned, by the oracle, on questions held out.

`make seeds` runs the whole recipe with three seeds. Always run is a short part of it, which must win already.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lightning.data.oracle import figures
from dpo_lightning.data.world import SHOWN
from dpo_lightning.training.curves import read_metrics

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def fit_and_test(root: Path, *options: object, config: Path = CONFIG, threads: int | None = 1) -> Path:
    """The runs of `fit` and `test`, in this order, below one directory, as `make tiny` makes them.

    On one thread, unless said otherwise: beside another busy process two are several times slower.
    """
    env = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    root.mkdir(exist_ok=True)
    words = ["--config", config, *options, "--trainer.default_root_dir", root]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    for verb, further in (("fit", []), ("test", ["--ckpt_path", "last"])):
        command = [sys.executable, "-m", "dpo_lightning", verb, *words, *further]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr
        (root / f"{verb}.txt").write_text(done.stdout + done.stderr)
    return root


def figures_of(root: Path) -> dict[str, float]:
    """The last value of every figure."""
    series = read_metrics(root / "version_0" / "metrics.csv") | read_metrics(root / "version_1" / "metrics.csv")
    return {tag: values[-1] for tag, (_, values) in series.items()}


def before_and_after(root: Path) -> dict[str, tuple[str, str]]:
    """Question -> answers, as `fit` shows them at its end."""
    said = (root / "fit.txt").read_text().split("Sampled before and after:\n")[1]
    lines = iter(line.strip() for line in said.split("\n\n")[0].splitlines())
    return {
        question: (before.removeprefix("before: "), after.removeprefix("after:").strip())
        for question, before, after in zip(lines, lines, lines, strict=True)
    }


@pytest.mark.e2e
def test_a_short_run_wins_already_and_is_told_nothing_bad(tmp_path: Path) -> None:
    found = figures_of(fit_and_test(tmp_path, "--trainer.max_steps", 200, "--data.max_val_pairs", 200))
    assert found["test/win_rate/low"] > 0.5
    assert found["test/true_reward"] > found["test/true_reward/reference"] + 0.1
    assert found["test/kl/low"] > 0
    assert "Warning: over-optimisation" not in (tmp_path / "fit.txt").read_text() + (tmp_path / "test.txt").read_text()
    assert list(before_and_after(tmp_path)) == list(SHOWN)


@pytest.mark.e2e
def test_a_run_that_goes_wrong_says_so_in_words(tmp_path: Path) -> None:
    """Too small a beta and too high a rate: the answers end up worse than the base's."""
    options = ["--model.loss.beta", 0.02, "--model.loss.sft_weight", 0, "--model.loss.label_smoothing", 0]
    options += ["--model.optimizer.lr", 1e-2, "--trainer.max_steps", 200, "--trainer.val_check_interval", 50]
    found = figures_of(fit_and_test(tmp_path, *options, "--data.max_val_pairs", 200))
    assert found["test/true_reward"] < found["test/true_reward/reference"]
    assert found["val/rewards/accuracies"] > 0.65  # which says nothing of it
    fit, test = ((tmp_path / name).read_text() for name in ("fit.txt", "test.txt"))
    assert fit.count("Warning: over-optimisation: the log-probability of the chosen answers") == 2  # then, at the end
    assert "Warning: over-optimisation: the policy's answers have a lower true reward" in test


@pytest.fixture(scope="module", params=(0, 1, 2))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_and_test(tmp_path_factory.mktemp("tiny"), "--seed_everything", request.param, threads=None)


@pytest.fixture(scope="module")
def found(run: Path) -> dict[str, float]:
    return figures_of(run)


@pytest.mark.campaign
def test_the_accuracy_is_near_the_best_that_the_noise_allows(found: dict[str, float]) -> None:
    best = found["val/rewards/accuracies/best"]
    assert 0.95 * best <= found["val/rewards/accuracies"] <= best + 0.02


@pytest.mark.campaign
def test_true_reward_goes_most_of_the_way_to_the_best_answers(found: dict[str, float]) -> None:
    base = found["test/true_reward/reference"]
    assert (found["test/true_reward"] - base) / (1 - base) >= 0.8


@pytest.mark.campaign
def test_most_answers_are_true_on_the_subject_and_finished(found: dict[str, float]) -> None:
    assert found["test/good"] >= 0.85
    assert found["test/good/reference"] < 0.5


@pytest.mark.campaign
def test_the_policy_wins_and_stays_near(found: dict[str, float]) -> None:
    assert found["test/win_rate"] >= 0.8
    assert 0 < found["test/kl"] < 6


@pytest.mark.campaign
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


@pytest.mark.campaign
def test_three_questions_are_shown_before_and_after(run: Path) -> None:
    shown = before_and_after(run)
    assert list(shown) == list(SHOWN)
    judged = [figures(question, after) for question, (_, after) in shown.items()]
    assert sum(answer["good"] for answer in judged) >= 2, shown


@pytest.mark.campaign
def test_nobody_is_warned(run: Path) -> None:
    assert "over-optimisation" not in (run / "fit.txt").read_text() + (run / "test.txt").read_text()


@pytest.mark.campaign
def test_dpo_is_better_than_supervised_training_on_the_chosen_answers_at_a_smaller_distance(tmp_path: Path) -> None:
    """With a beta that keeps it nearer to the base than supervised training does; Adam's eps grows with beta."""
    loss = {"class_path": "Sigmoid", "init_args": {"beta": 5.0}}
    config = yaml.safe_load(CONFIG.read_text())
    found = {}
    for name, changed in (("dpo", loss), ("sft", {"class_path": "SFT"})):
        config["model"]["loss"] = changed
        config["model"]["optimizer"]["init_args"]["eps"] = 0.05 if name == "dpo" else 3e-3
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        found[name] = figures_of(fit_and_test(tmp_path / name, config=tmp_path / f"{name}.yaml"))
    assert found["dpo"]["test/kl"] < found["sft"]["test/kl"]
    assert found["dpo"]["test/true_reward"] > found["sft"]["test/true_reward"]
    assert found["sft"]["test/true_reward"] > found["sft"]["test/true_reward/reference"]
