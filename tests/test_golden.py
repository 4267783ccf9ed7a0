"""The first 50 losses of the shipped recipe, as they were when it was last changed on purpose.

The epoch is the recipe's whole one, and with it the order of pairs and the learning rates; only the run is stopped
early. After a change that is meant to change the curve, `python -m tests.test_golden` writes it anew.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from dpo_lightning.objective.losses import Sigmoid
from dpo_lightning.training.curves import read_metrics
from tests.e2e import processes

GOLDEN = Path(__file__).parent / "golden" / "tiny.json"
CONFIG = Path(__file__).parents[1] / "configs" / "tiny.yaml"
STEPS = 50

#: Between one and two threads the losses differ by up to 1.0e-7, between AVX2 and SSE kernels by 1.3e-7, with MKL's
#: most compatible ones by 2.2e-7, between shared and padded layout by 1.1e-7, between 32 and 64 bits by 3.3e-7.
TOLERANCE = 5e-6

#: In its first steps the rate rises from 0, and what is wrong shows later the smaller it is.
FEW = 12

FAULTS: dict[str, list[object]] = {
    "wrong sign": [
        *("--model.loss", "tests.test_golden.WrongSign", "--model.loss.beta", 0.2),
        *("--model.loss.label_smoothing", 0.1, "--model.loss.sft_weight", 0.03),
    ],
    "beta off by 5%": ["--model.loss.beta", 0.21],
    "label smoothing off by a tenth": ["--model.loss.label_smoothing", 0.11],
    "one pair too many": ["--data.batch_size", 17],
}


@dataclass(frozen=True)
class WrongSign(Sigmoid):
    """The shipped loss, were chosen and rejected mixed up."""

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return super().pair_losses(rejected, chosen)


def losses(steps: int, *options: object) -> list[float]:
    """The losses of the recipe's first steps, with other options."""
    with tempfile.TemporaryDirectory() as root:
        words = ["--config", CONFIG, *options, "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", 1]
        words += ["--trainer.limit_val_batches", 0, "--data.max_val_pairs", 16, "--model.samples", 0]
        words += ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", root]
        words += ["--trainer.callbacks+=tests.e2e.killer.Stopper", f"--trainer.callbacks.steps={steps}"]
        processes.run("fit", *words)
        done, values = read_metrics(Path(root) / "version_0" / "metrics.csv")["train/loss"]
    assert done == list(range(1, steps + 1))
    return values


def deviation(found: list[float]) -> float:
    """The largest from the golden curve's start, in nats."""
    golden = json.loads(GOLDEN.read_text())["train/loss"]
    return max(abs(a - b) for a, b in zip(found, golden[: len(found)], strict=True))


@pytest.mark.e2e
def test_the_shipped_recipe_goes_along_the_golden_curve() -> None:
    assert deviation(losses(STEPS)) <= TOLERANCE


@pytest.mark.e2e
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_the_golden_curve(fault: str) -> None:
    assert deviation(losses(FEW, *FAULTS[fault])) > 8 * TOLERANCE


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({"config": f"configs/{CONFIG.name}", "train/loss": losses(STEPS)}, indent=1) + "\n")
    print(f"{STEPS} losses written to {GOLDEN}")
