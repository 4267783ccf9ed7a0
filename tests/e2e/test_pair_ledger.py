"""The ledger of validation pairs: what stands in it is what a plain forward says, and wrong labels come up."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from dpo_lightning.data import world
from dpo_lightning.training.curves import read_metrics
from dpo_lightning.training.pair_ledger import flip_probabilities
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


@pytest.mark.e2e
def test_flipped_labels_come_up(run_cli: RunCli, tmp_path: Path) -> None:
    """Of a policy that has hardly begun to learn; by chance both were 0.05."""
    precision, recall = run_with_flips(run_cli, tmp_path, train=3000)
    assert precision > 0.35 and recall > 0.25


@pytest.mark.campaign
def test_most_flipped_labels_come_up_once_the_policy_has_learned(run_cli: RunCli, tmp_path: Path) -> None:
    precision, recall = run_with_flips(run_cli, tmp_path, train=29_000)
    assert precision > 0.7 and recall > 0.7
