"""A run that was killed goes on to the same bits."""

import subprocess
import sys
from pathlib import Path

import pytest

from dpo_lightning.training.callbacks import versions
from dpo_lightning.training.curves import read_metrics

Kill = tuple[int, int]  # epoch, batch


def fit(words: list[str], kill: Kill | None = None, resume: bool = False) -> int:
    """One process; 12 batches and 6 optimizer steps an epoch, 3 epochs, a checkpoint every 4 steps."""
    command = [sys.executable, "-m", "dpo_lightning", "fit", *words]
    command += ["--trainer.max_epochs=3", "--trainer.accumulate_grad_batches=2", "--model.save_every=4"]
    if kill is not None:
        epoch, batch = kill
        command += ["--trainer.callbacks+=tests.e2e.killer.Killer"]
        command += [f"--trainer.callbacks.epoch={epoch}", f"--trainer.callbacks.batch={batch}"]
    if resume:
        command += ["--ckpt_path", "last"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


def weights(root: Path) -> bytes:
    return (versions(root)[-1] / "export" / "model.safetensors").read_bytes()


@pytest.mark.e2e
def test_a_killed_run_resumes_to_the_same_bits_and_its_newest_metrics_have_the_whole_history(
    toy_words: list[str], tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    words = [word for word in toy_words if word != str(root)]
    place = words.index("--trainer.default_root_dir") + 1

    def at(name: str) -> list[str]:
        return [*words[:place], str(tmp_path / name), *words[place:]]

    assert fit(at("straight")) == 0
    straight = read_metrics(versions(tmp_path / "straight")[-1] / "metrics.csv")
    assert straight["train/loss"][0] == list(range(1, 19)) and straight["val/loss"][0] == [6, 12, 18]

    campaigns: dict[str, list[Kill]] = {
        "inside-an-accumulation-window": [(0, 11)],
        "twice-at-an-epochs-end": [(1, 0), (2, 0)],
        "at-an-end-then-inside": [(1, 0), (1, 10)],
    }
    for name, kills in campaigns.items():
        for number, kill in enumerate(kills):
            assert fit(at(name), kill, resume=number > 0) == -9
        assert fit(at(name), resume=True) == 0
        assert weights(tmp_path / name) == weights(tmp_path / "straight"), name
        resumed = read_metrics(versions(tmp_path / name)[-1] / "metrics.csv")
        assert resumed.keys() == straight.keys(), name
        for tag in straight:
            if not tag.endswith("per_second"):
                assert resumed[tag] == straight[tag], (name, tag)


@pytest.mark.e2e
def test_two_ranks_that_were_killed_resume_to_the_same_bits(toy_words: list[str], tmp_path: Path) -> None:
    """Six batches and three steps an epoch on each rank; both are killed inside the second epoch's first window."""
    place = toy_words.index("--trainer.default_root_dir") + 1
    for name, kill in (("straight", None), ("killed", (1, 1))):
        words = [*toy_words[:place], str(tmp_path / name), *toy_words[place + 1 :], "--trainer.devices=2"]
        assert fit(words, kill) == (0 if kill is None else -9)
        if kill is not None:
            assert fit(words, resume=True) == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")
    straight, killed = (read_metrics(versions(tmp_path / n)[-1] / "metrics.csv") for n in ("straight", "killed"))
    for tag in straight:
        if not tag.endswith("per_second"):
            assert killed[tag] == straight[tag], tag
