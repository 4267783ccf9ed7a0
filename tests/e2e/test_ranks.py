"""Two ranks that the command line starts itself compute what one does, an idle rank included."""

import subprocess
import sys
from pathlib import Path

import pytest

from dpo_lightning.training.curves import read_metrics
from tests.e2e import processes


@pytest.mark.e2e
def test_two_ranks_log_export_and_count_what_one_does(toy_words: list[str], tmp_path: Path) -> None:
    """49 pairs in steps of 8 leave a last step of one pair, and 11 to validate: a rank without pairs in both."""
    words = [*toy_words, "--data.val_fraction=0.19", "--trainer.precision=64-true", "--trainer.max_epochs=2"]
    processes.run("fit", *words, "--data.batch_size=8")
    command = [sys.executable, "-m", "dpo_lightning", "fit", *words, "--data.batch_size=4", "--trainer.devices=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert runs == ["version_0", "version_1"]  # one directory a run, whatever the ranks
    one, two = (read_metrics(tmp_path / "runs" / name / "metrics.csv") for name in runs)
    assert one.keys() == two.keys()
    assert one["train/loss"][0] == two["train/loss"][0] == list(range(1, 15))
    for tag in one:
        if not tag.endswith("per_second"):
            assert two[tag][1] == pytest.approx(one[tag][1], rel=1e-9, abs=1e-12), tag
    folders = [{path.name for path in (tmp_path / "runs" / name / "export").iterdir()} for name in runs]
    folders[1].remove("reward_curves.png")  # processes.run draws none
    assert folders[0] == folders[1] > {"model.safetensors", "tokenizer.json"}
