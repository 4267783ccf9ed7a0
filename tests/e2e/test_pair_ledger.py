"""The ledger of validation pairs: what stands in it is what a plain forward says, and wrong labels come up."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lightning.data import world
from dpo_lightning.training.curves import read_metrics
from dpo_lightning.training.pair_ledger import COLUMNS, flip_probabilities
from tests.conftest import RunCli
from tests.e2e.test_test import logp

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"

#: Share of the labels that are flipped.
FLIPPED = 0.05


def flipped_world(folder: Path, train: int, val: int) -> tuple[dict[str, Path], set[int]]:
    """Files of the built-in pairs with flipped labels, and which rows of the validation are flipped."""
    draw, files, wrong = random.Random(0), {}, set()
    for split, count in (("train", train), ("validation", val)):
        rows = [row for row in world.pairs() if row["split"] == split]
        rows = draw.sample(rows, count)
        with (folder / f"{split}.jsonl").open("w") as file:
            for number, row in enumerate(rows):
                chosen, rejected = row["chosen"], row["rejected"]
                if draw.random() < FLIPPED:
                    chosen, rejected = rejected, chosen
                    wrong |= {number} if split == "validation" else set()
                file.write(json.dumps({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}) + "\n")
        files[split] = folder / f"{split}.jsonl"
    return files, wrong


def run_with_flips(run_cli: RunCli, folder: Path, train: int) -> tuple[float, float]:
    """Precision and recall of the list of doubtful pairs, by which labels were flipped."""
    files, wrong = flipped_world(folder, train, val=1000)
    words = ["--config", CONFIG, "--data.source", files["train"], "--data.val_source", files["validation"]]
    words += ["--trainer.default_root_dir", folder / "runs", "--trainer.accelerator", "cpu", "--model.samples", 0]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.val_check_interval", "1.0"]
    done = run_cli("fit", *words, "--model.pair_ledger", "true")
    assert done.status == 0, done.err
    listed = [json.loads(line) for line in (folder / "runs/version_0/doubtful.jsonl").read_text().splitlines()]
    hits = len({entry["row"] for entry in listed} & wrong)
    return hits / len(listed), hits / len(wrong)


def ledgers(run: Path) -> dict[int, dict[str, list[float]]]:
    """Optimizer step -> the columns of its ledger."""
    files = sorted((run / "pairs").glob("step-*.parquet"))
    return {int(file.stem.removeprefix("step-")): parquet.read_table(file).to_pydict() for file in files}


def test_a_ledger_has_each_validation_pair_once_with_what_plain_forwards_say_of_it(
    run_cli: RunCli, toy: Path, toy_words: list[str], tmp_path: Path
) -> None:
    done = run_cli("fit", *toy_words, "--trainer.max_epochs", 2, "--model.pair_ledger", "true")
    assert done.status == 0, done.err
    run = tmp_path / "runs" / "version_0"
    series, found = read_metrics(run / "metrics.csv"), ledgers(run)
    assert list(found) == series["val/loss"][0] and len(found) == 2
    for place, ledger in enumerate(found.values()):
        assert sorted(set(ledger["row"])) == ledger["row"]
        assert np.mean(ledger["margin"]) == pytest.approx(series["val/rewards/margins"][1][place], rel=1e-6)
        assert np.mean(ledger["loss"]) == pytest.approx(series["val/loss"][1][place], rel=1e-6)
    pairs = [json.loads(line) for line in (toy / "pairs.jsonl").read_text().splitlines()]
    policy, base = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (run / "export", toy / "model"))
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    last = found[max(found)]
    for place in (0, 5, len(last["row"]) - 1):
        pair = pairs[last["row"][place]]
        prompt = tokenizer(pair["prompt"]).input_ids
        for side in ("chosen", "rejected"):
            answer = [*tokenizer(pair[side]).input_ids, tokenizer.eos_token_id]
            wanted = logp(policy, prompt, answer) - logp(base, prompt, answer)
            assert last[f"{side}_logratio"][place] == pytest.approx(wanted, abs=1e-4)
            assert last[f"{side}_tokens"][place] == len(answer)
    doubtful = [json.loads(line) for line in (run / "doubtful.jsonl").read_text().splitlines()]
    for entry in doubtful:
        assert pairs[entry["row"]] == {name: entry[name] for name in ("prompt", "chosen", "rejected")}
        assert entry["margin"] < 0


def test_pairs_of_several_sources_are_named_by_their_source_and_their_row_in_it(
    run_cli: RunCli, toy: Path, toy_words: list[str], tmp_path: Path
) -> None:
    """Also where rows were dropped, and where a label looks wrong."""
    rows = [json.loads(line) for line in (toy / "pairs.jsonl").read_text().splitlines()]
    parts = {
        "a": rows[:20],
        "b": [row | {"rejected": row["chosen"]} if i == 3 else row for i, row in enumerate(rows[20:40])],
    }
    for name, part in parts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    sources = [str(tmp_path / f"{name}.jsonl") for name in parts]
    words = ["--data.val_fraction", "null", "--data.val_source", json.dumps(sources), "--data.bad_rows", 0.1]
    done = run_cli("validate", *toy_words, *words, "--model.pair_ledger", "true")
    assert done.status == 0, done.err
    [ledger] = ledgers(tmp_path / "runs" / "version_0").values()
    places = [(sources[0], row, 0) for row in range(20)] + [(sources[1], row, 0) for row in range(20) if row != 3]
    assert list(zip(ledger["source"], ledger["row"], ledger["pair"], strict=True)) == places
    assert ledger["id"] == [number for number in range(40) if number != 23]


@pytest.mark.e2e
def test_two_ranks_keep_the_ledger_of_one(run_cli: RunCli, toy_words: list[str], tmp_path: Path) -> None:
    words = ["validate", *toy_words, "--model.pair_ledger", "true", "--data.batch_size", "3"]
    assert run_cli(*words).status == 0
    command = [sys.executable, "-m", "dpo_lightning", *words, "--trainer.devices=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (ledgers(tmp_path / "runs" / f"version_{number}")[0] for number in (0, 1))
    assert one["row"] == two["row"]
    for name in COLUMNS:
        assert two[name] == pytest.approx(one[name], abs=1e-4)


def test_a_loss_without_margins_has_no_ledger_and_says_so(run_cli: RunCli, toy_words: list[str]) -> None:
    done = run_cli("fit", *toy_words, "--model.pair_ledger", "true", "--model.loss", "SFT")
    assert done.status == 2 and "model.pair_ledger" in done.err[-1] and "SFT" in done.err[-1]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_a_mixture_of_right_and_flipped_labels_is_told_apart(share: float) -> None:
    """Made up: margins of mean 2 and deviation 1, a share of them with the other sign."""
    draw = np.random.default_rng(0)
    flipped = draw.random(5000) < share
    margins = draw.normal(2, 1, 5000) * np.where(flipped, -1, 1)
    found = flip_probabilities(margins)
    assert found.mean() == pytest.approx(share, abs=0.01)
    # The best that can be done: by the densities that they were drawn from.
    exact = share / (share + (1 - share) * np.exp(4 * margins))
    assert np.abs(found - exact).mean() < 0.01


@pytest.mark.parametrize("margins", [np.zeros(5), -np.ones(4), np.array([1.0, 1.0, 1.0])])
def test_of_margins_that_say_nothing_no_label_is_doubted_more_than_another(margins: np.ndarray) -> None:
    assert len(set(flip_probabilities(margins).tolist())) == 1


@pytest.mark.e2e
def test_flipped_labels_come_up(run_cli: RunCli, tmp_path: Path) -> None:
    """Of a policy that has hardly begun to learn; by chance both were 0.05."""
    precision, recall = run_with_flips(run_cli, tmp_path, train=3000)
    assert precision > 0.35 and recall > 0.25


@pytest.mark.campaign
def test_most_flipped_labels_come_up_once_the_policy_has_learned(run_cli: RunCli, tmp_path: Path) -> None:
    precision, recall = run_with_flips(run_cli, tmp_path, train=29_000)
    assert precision > 0.7 and recall > 0.7
