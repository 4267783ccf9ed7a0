"""The `test` verb, end to end: every figure is computed again from the answers it left, by plain forwards and by hand.

Most runs are of the built-in world, whose answers are words: their ids can be read off the text.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lightning.data import oracle, world
from dpo_lightning.training.curves import read_metrics
from tests.conftest import RunCli
from tests.toy import make_model

Row = dict[str, object]

#: As many prompts as fill two batches and three quarters of one.
PROMPTS, BATCH, VALIDATED = 11, 4, 40


def letters(prompt: str, answer: str) -> float:
    """An oracle of one's own: an answer is as good as it is long."""
    return len(answer)


def detailed(prompt: str, answer: str) -> Mapping[str, object]:
    """An oracle with figures of its own, of the types that a reward model in numpy has."""
    return {"true_reward": np.float32(len(answer) / 4), "words": np.int64(len(answer.split())), "any": answer != ""}


def broken(prompt: str, answer: str) -> float:
    """An oracle that does not know every prompt."""
    raise KeyError(prompt)


def words_of(options: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def world_words(runs: Path) -> list[str]:
    """Options of a small run of the built-in world."""
    options = {
        "model.checkpoint": world.BASE,
        "model.optimizer.lr": 1e-3,
        "model.samples": 1,
        "data.source": world.PAIRS,
        "data.max_train_pairs": 200,
        "data.max_val_pairs": VALIDATED,
        "data.max_test_prompts": PROMPTS,
        "data.batch_size": BATCH,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": runs,
    }
    return words_of(options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest.fixture
def tested(run_cli: RunCli, place: Path) -> Path:
    """A folder with `version_0`, three steps of DPO, and `version_1`, its test, with `stdout`; made by the first."""
    words = world_words(place)
    if not (place / "version_1" / "stdout").exists():
        done = run_cli("fit", *words, "--trainer.max_steps", 3)
        assert done.status == 0, done.err
        done = run_cli("test", *words, "--ckpt_path", "last")
        assert done.status == 0, done.err
        (place / "version_1" / "stdout").write_text(done.out)
    return place


@pytest.fixture
def few_pairs(tmp_path: Path) -> Path:
    """A file with a pair for each of 24 questions of the world, which is tokenized in no time."""
    rows = list({row["prompt"]: row for row in world.pairs() if row["split"] == "train"}.values())[:24]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def samples(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def figures(run: Path) -> dict[str, float]:
    """What `test` left in metrics.csv."""
    series = read_metrics(run / "metrics.csv")
    assert all(tag.startswith("test/") and len(values) == 1 for tag, (_, values) in series.items())
    return {tag.removeprefix("test/"): values[0] for tag, (_, values) in series.items()}


def recomputed(rows: list[Row]) -> dict[str, float]:
    """The same from the answers, by numpy."""
    z = NormalDist().inv_cdf(0.975)
    ratios = np.array([row["logratio"] for row in rows])
    half = z * ratios.std(ddof=1) / math.sqrt(len(rows))
    found = {"kl": ratios.mean(), "kl/low": ratios.mean() - half, "kl/high": ratios.mean() + half}
    for whose in ("policy", "reference"):
        for name in ("tokens", "ended"):
            found[f"{name}/{whose}"] = np.mean([row[whose][name] for row in rows])
        for name in rows[0][whose]["figures"]:
            tag = f"{name}/reference" if whose == "reference" else name
            found[tag] = np.mean([row[whose]["figures"][name] for row in rows])
    if "true_reward" in found:
        own, other = ([row[whose]["figures"]["true_reward"] for row in rows] for whose in ("policy", "reference"))
        share = np.mean([(a > b) + (a == b) / 2 for a, b in zip(own, other, strict=True)])
        # Wilson's ends are the roots of (share - p)^2 = z^2 p (1 - p) / n.
        w = z**2 / len(rows)
        low, high = sorted(np.roots([1 + w, -(2 * share + w), share**2]).real)
        found |= {"win_rate": share, "win_rate/low": low, "win_rate/high": high}
    return found


@torch.no_grad()
def logp(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> float:
    """Of an answer, by one plain forward."""
    scores = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return sum(scores[len(prompt) - 1 + place, token].item() for place, token in enumerate(answer))


def assert_logratios(rows: list[Row], policy: Path, reference: Path) -> None:
    """Of the policy's answers, by their ids; but for those spelled otherwise than the tokenizer would."""
    tokenizer = AutoTokenizer.from_pretrained(world.FOLDER)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (policy, reference)]
    known = 0
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        answer = tokenizer(row["policy"]["text"]).input_ids + [tokenizer.eos_token_id] * int(row["policy"]["ended"])
        if len(answer) == row["policy"]["tokens"]:
            own, other = (logp(model, prompt, answer) for model in models)
            assert row["logratio"] == pytest.approx(own - other, abs=1e-4)
            known += 1
    assert known > len(rows) / 2


def only_run(folder: Path, number: int = 0) -> Path:
    return folder / "runs" / f"version_{number}"


# The world


def test_the_figures_are_those_of_the_samples_at_the_step_of_the_checkpoint(tested: Path) -> None:
    run = tested / "version_1"
    found, wanted = figures(run), recomputed(samples(run))
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert {"true_reward", "good", "true_reward/reference", "fluency"} <= found.keys()
    assert read_metrics(run / "metrics.csv")["test/kl"][0] == [3]


def test_each_answers_figures_are_the_oracles(tested: Path) -> None:
    answers = [
        (row["prompt"], row[whose]) for row in samples(tested / "version_1") for whose in ("policy", "reference")
    ]
    for prompt, answer in answers:
        assert answer["figures"] == oracle.figures(prompt, answer["text"])
    assert len({answer["figures"]["true_reward"] for _, answer in answers}) > 3


def test_each_logratio_is_that_of_plain_forwards_of_the_exported_policy_and_the_base(tested: Path) -> None:
    rows = samples(tested / "version_1")
    assert_logratios(rows, tested / "version_0" / "export", world.FOLDER)
    assert max(abs(row["logratio"]) for row in rows) > 0.05  # they are not both the base


def test_the_prompts_are_the_first_of_the_test_split_and_none_else(tested: Path) -> None:
    held_out = [row["prompt"] for row in world.pairs() if row["split"] == "test"]
    rows = samples(tested / "version_1")
    assert [row["prompt"] for row in rows] == list(dict.fromkeys(held_out))[:PROMPTS]
    assert [row["row"] for row in rows] == [held_out.index(row["prompt"]) for row in rows]
    assert {world.questions()[row["prompt"]].split for row in rows} == {"test"}


def test_the_best_accuracy_beside_the_validation_is_the_oracles(tested: Path) -> None:
    """Who knows every reward is right with the larger of the two odds."""
    pairs = [row for row in world.pairs() if row["split"] == "validation"][:VALIDATED]
    odds = []
    for row in pairs:
        rewards = [oracle.true_reward(row["prompt"], row[name]) for name in ("chosen", "rejected")]
        odds.append(1 / (1 + math.exp(-abs(rewards[0] - rewards[1]) / oracle.TEMPERATURE)))
    steps, values = read_metrics(tested / "version_0" / "metrics.csv")["val/rewards/accuracies/best"]
    assert steps == [3] and values == pytest.approx([np.mean(odds)], abs=1e-9)


def test_pairs_of_the_world_that_are_cut_are_trained_on_without_a_best_accuracy(
    run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of a question is none of the world's, and what is left of an answer has another reward."""
    every = list(world.pairs())
    few = [row for split in ("train", "validation", "test") for row in [r for r in every if r["split"] == split][:60]]
    monkeypatch.setattr(world, "pairs", lambda: map(dict, few))
    words = ["--data.max_length", 8, "--data.bad_rows", 1, "--trainer.max_steps", 1]
    done = run_cli("fit", *world_words(tmp_path / "runs"), *words)
    assert done.status == 0, done.err
    tags = read_metrics(only_run(tmp_path) / "metrics.csv").keys()
    assert "val/rewards/accuracies" in tags and "val/rewards/accuracies/best" not in tags


def test_the_terminal_shows_the_figures_and_where_the_samples_are(tested: Path) -> None:
    out, found = (tested / "version_1" / "stdout").read_text(), figures(tested / "version_1")
    for name in ("kl", "win_rate"):
        assert re.search(rf"^  {name} +{found[name]:.4f} ", out, re.MULTILINE)
    line = f"  true_reward +{found['true_reward']:.4f} +{found['true_reward/reference']:.4f}$"
    assert re.search(line, out, re.MULTILINE)
    assert f"{PROMPTS} prompts" in out
    for name in ("samples.jsonl", "metrics.csv", "config.yaml"):
        assert str(tested / "version_1" / name) in out


def test_the_seed_decides_every_answer(run_cli: RunCli, tested: Path, tmp_path: Path) -> None:
    words = [*world_words(tmp_path / "runs"), "--ckpt_path", tested / "version_0/checkpoints/last.ckpt"]
    for seed in (0, 1):
        done = run_cli("test", *words, "--seed_everything", seed)
        assert done.status == 0, done.err
    again, other = (only_run(tmp_path, number) for number in (0, 1))
    first = tested / "version_1"
    assert (again / "samples.jsonl").read_bytes() == (first / "samples.jsonl").read_bytes()
    assert figures(again) == figures(first)
    assert [row["prompt"] for row in samples(other)] == [row["prompt"] for row in samples(first)]
    for whose in ("policy", "reference"):
        same = [a[whose]["text"] == b[whose]["text"] for a, b in zip(samples(other), samples(first), strict=True)]
        assert sum(same) < PROMPTS / 2


@pytest.mark.e2e
def test_two_ranks_leave_the_samples_and_figures_of_one_to_the_last_bit(tested: Path, tmp_path: Path) -> None:
    """11 prompts in batches of 4: the second rank has one batch of its own and answers one of the first's again."""
    words = [*world_words(tmp_path / "runs"), f"--ckpt_path={tested / 'version_0/checkpoints/last.ckpt'}"]
    command = [sys.executable, "-m", "dpo_lightning", "test", *words, "--trainer.devices=2"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: sums are rounded by how they are split
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr
    first, both = tested / "version_1", only_run(tmp_path)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]
    assert (both / "samples.jsonl").read_bytes() == (first / "samples.jsonl").read_bytes()
    assert figures(both) == figures(first)
    assert done.stdout.count(f"{PROMPTS} prompts") == 1


def test_several_samples_of_a_prompt_are_all_asked_judged_and_averaged(
    run_cli: RunCli, tested: Path, tmp_path: Path
) -> None:
    words = [*world_words(tmp_path / "runs"), "--ckpt_path", tested / "version_0/checkpoints/last.ckpt"]
    done = run_cli("test", *words, "--model.samples_per_prompt", 3)
    assert done.status == 0, done.err
    first, rows, found = samples(tested / "version_1"), samples(only_run(tmp_path)), figures(only_run(tmp_path))
    assert f"{PROMPTS} prompts, 3 samples of each model" in done.out
    assert [(row["row"], row["sample"]) for row in rows] == [(row["row"], s) for row in first for s in range(3)]
    for one, other in zip(first, rows[::3], strict=True):  # more samples change none of the first
        assert other.pop("logratio") == pytest.approx(one["logratio"], abs=1e-4)
        assert other == {name: value for name, value in one.items() if name != "logratio"}
    different = [len({row["policy"]["text"] for row in rows[start : start + 3]}) for start in range(0, len(rows), 3)]
    assert sum(count > 1 for count in different) > PROMPTS / 2
    for name in ("true_reward", "good"):
        assert found[name] == pytest.approx(np.mean([row["policy"]["figures"][name] for row in rows]), abs=1e-9)


def test_the_answers_do_not_depend_on_the_batches(run_cli: RunCli, tested: Path, tmp_path: Path) -> None:
    words = [*world_words(tmp_path / "runs"), "--ckpt_path", tested / "version_0/checkpoints/last.ckpt"]
    assert run_cli("test", *words, "--data.batch_size", 7).status == 0
    for one, other in zip(samples(tested / "version_1"), samples(only_run(tmp_path)), strict=True):
        assert other.pop("logratio") == pytest.approx(one.pop("logratio"), abs=1e-4)
        assert other == one


# Other policies, references and losses


def test_a_policy_without_training_has_no_distance_from_its_reference(
    run_cli: RunCli, few_pairs: Path, tmp_path: Path
) -> None:
    """And answers differently nevertheless, by other random numbers."""
    words = [*world_words(tmp_path / "runs"), f"--data.source={few_pairs}", "--data.val_fraction=0.5"]
    done = run_cli("test", *words)
    assert done.status == 0, done.err
    rows, found = samples(only_run(tmp_path)), figures(only_run(tmp_path))
    assert [row["logratio"] for row in rows] == pytest.approx([0] * len(rows), abs=1e-6)
    assert [found[name] for name in ("kl", "kl/low", "kl/high")] == pytest.approx([0, 0, 0], abs=1e-6)
    assert re.search(r"^  kl +-?0\.0000 nats", done.out, re.MULTILINE)
    assert sum(row["policy"]["text"] == row["reference"]["text"] for row in rows) < len(rows) / 2
    assert read_metrics(only_run(tmp_path) / "metrics.csv")["test/kl"][0] == [0]


def test_a_policy_without_training_is_never_said_to_be_over_optimised(
    run_cli: RunCli, few_pairs: Path, tmp_path: Path
) -> None:
    """By chance its few samples are worse than the reference's as often as they are better."""
    words = [*world_words(tmp_path / "runs"), f"--data.source={few_pairs}", "--data.val_fraction=0.5"]
    words += ["--data.oracle=dpo_lightning.data.oracle.true_reward"]
    outs = [run_cli("test", *words, "--seed_everything", seed).out for seed in range(4)]
    for number, out in enumerate(outs):
        assert figures(only_run(tmp_path, number))["kl"] == pytest.approx(0, abs=1e-6)
        assert "over-optimisation" not in out


def test_a_loss_without_a_reference_is_compared_with_where_it_started(
    run_cli: RunCli, few_pairs: Path, tmp_path: Path
) -> None:
    words = [*world_words(tmp_path / "runs"), f"--data.source={few_pairs}", "--data.val_fraction=0.5"]
    words += ["--model.loss=SFT", "--data.oracle=dpo_lightning.data.oracle.true_reward"]
    assert run_cli("fit", *words, "--trainer.max_steps", 3).status == 0
    done = run_cli("test", *words, "--ckpt_path", "last")
    assert done.status == 0, done.err
    assert "reference: FrozenModel" in "\n".join([done.out, *done.err])
    rows, found = samples(only_run(tmp_path, 1)), figures(only_run(tmp_path, 1))
    assert_logratios(rows, only_run(tmp_path) / "export", world.FOLDER)
    assert found == pytest.approx(recomputed(rows), rel=1e-6, abs=1e-9)
    assert found["kl"] > 0.05
    for row in rows:
        for whose in ("policy", "reference"):
            reward = oracle.true_reward(row["prompt"], row[whose]["text"])
            assert row[whose]["figures"] == {"true_reward": reward}


def test_another_reference_is_compared_with_and_gives_its_own_answers(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    """One that ends every answer at once, by the bias of its last norm along the row of EOS."""
    make_model(tmp_path / "other", seed=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        model.transformer.wte.weight[0] *= 20
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[0] * 20)
    model.save_pretrained(tmp_path / "other")
    words = ["--model.reference", "FrozenModel", "--model.reference.checkpoint", tmp_path / "other"]
    done = run_cli("test", *toy_words, *words, "--model.max_new_tokens", 6)
    assert done.status == 0, done.err
    for row in samples(only_run(tmp_path)):
        assert row["reference"] == {"text": "", "tokens": 1, "ended": 1.0, "figures": {}}
        assert row["policy"]["tokens"] > 1 and row["logratio"] > 10


# Data of one's own


def test_data_without_an_oracle_is_reported_without_rewards(
    run_cli: RunCli, toy: Path, toy_words: list[str], tmp_path: Path
) -> None:
    """A fifth of 60 prompts, each with its row in the source, and answers cut off at five tokens."""
    done = run_cli("test", *toy_words, "--model.max_new_tokens", 5)
    assert done.status == 0, done.err
    rows, found = samples(only_run(tmp_path)), figures(only_run(tmp_path))
    assert found.keys() == {
        *("kl", "kl/low", "kl/high"),
        *("tokens/policy", "tokens/reference", "ended/policy", "ended/reference"),
    }
    assert found == pytest.approx(recomputed(rows), rel=1e-6, abs=1e-9)
    assert "reward" not in done.out and "win" not in done.out
    source = [json.loads(line)["prompt"] for line in (toy / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and [row["prompt"] for row in rows] == [source[row["row"]] for row in rows]
    answers = [row[whose] for row in rows for whose in ("policy", "reference")]
    assert all(answer["figures"] == {} for answer in answers)
    assert max(answer["tokens"] for answer in answers) == 5
    assert all(answer["ended"] == 1 for answer in answers if answer["tokens"] < 5)
    assert found["ended/policy"] < 0.5  # one of 257 tokens ends an answer


def test_a_users_own_oracle_says_how_good_answers_are(run_cli: RunCli, toy_words: list[str], tmp_path: Path) -> None:
    words = [*toy_words, "--model.max_new_tokens", 5, "--data.max_test_prompts", 6]
    done = run_cli("test", *words, "--data.oracle", "tests.e2e.test_test.letters")
    assert done.status == 0, done.err
    rows, found = samples(only_run(tmp_path)), figures(only_run(tmp_path))
    assert len(rows) == 6
    for row in rows:
        for whose in ("policy", "reference"):
            assert row[whose]["figures"] == {"true_reward": float(len(row[whose]["text"]))}
    assert found == pytest.approx(recomputed(rows), rel=1e-6, abs=1e-9)
    assert found["true_reward"] > 0 and 0 < found["win_rate"] < 1


def test_a_users_own_oracle_may_have_figures_of_any_type_of_number(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    words = [*toy_words, "--model.max_new_tokens", 5, "--data.max_test_prompts", 6]
    done = run_cli("test", *words, "--data.oracle", "tests.e2e.test_test.detailed")
    assert done.status == 0, done.err
    for row in samples(only_run(tmp_path)):
        text = row["policy"]["text"]
        assert row["policy"]["figures"] == {"true_reward": len(text) / 4, "words": len(text.split()), "any": text != ""}


# What cannot be


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module.score", "No module named 'no_such_module'"),
        ("tests.e2e.test_test.no_such", "no_such"),
        ("tests.e2e.test_test.PROMPTS", "int"),
    ],
)
def test_an_oracle_that_is_not_there_is_refused_by_name(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path, name: str, said: str
) -> None:
    done = run_cli("test", *toy_words, "--data.oracle", name)
    assert done.status == 2
    assert "data.oracle" in done.err[-1] and name in done.err[-1] and said in done.err[-1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["tests.e2e.test_test.broken", "dpo_lightning.data.oracle.true_reward"])
def test_an_oracle_that_fails_at_a_prompt_is_an_error_that_names_the_prompt(
    run_cli: RunCli, toy_words: list[str], name: str
) -> None:
    done = run_cli("test", *toy_words, "--model.max_new_tokens", 2, "--data.oracle", name)
    assert done.status == 2
    assert "data.oracle" in done.err[-1] and re.search(r"\d+\. (What|Tell|Why)", done.err[-1])


def test_answers_for_which_no_prompt_leaves_room_are_refused_with_the_option(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    done = run_cli("test", *toy_words, "--model.max_new_tokens", 127)
    assert done.status == 2
    assert "127 tokens" in done.err[-1] and "model.max_new_tokens" in done.err[-1]
    assert not only_run(tmp_path).exists()


def test_a_test_of_no_batches_is_refused_with_the_option(run_cli: RunCli, toy_words: list[str]) -> None:
    done = run_cli("test", *toy_words, "--trainer.limit_test_batches", 0)
    assert done.status == 2 and "limit_test_batches" in done.err[-1]


def test_a_test_of_a_checkpoint_warns_of_nothing(
    run_cli: RunCli, tested: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Not even of the samples that the fit has shown, whose callback a test has no use for."""
    words = [*world_words(tmp_path / "runs"), "--ckpt_path", tested / "version_0/checkpoints/last.ckpt"]
    recwarn.clear()
    assert run_cli("test", *words, "--data.max_test_prompts", 1).status == 0
    assert [str(warning.message) for warning in recwarn if "callback" in str(warning.message)] == []
