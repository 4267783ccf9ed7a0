"""What each precision keeps of a run in 64 bits; and fp16 with the scaled loss that it needs."""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dpo_lightning.data import world
from dpo_lightning.training.curves import Series, read_metrics
from tests.conftest import RunCli
from tests.e2e import processes

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SCALED = "--trainer.plugins+=tests.e2e.scaled.ScaledHalf"

#: precision -> its options; 16-mixed is Lightning's own plugin with a scaler for the CPU
OPTIONS: dict[str, list[object]] = {
    name: ["--trainer.precision", name] for name in ("64-true", "32-true", "bf16-mixed", "bf16-true")
} | {"16-mixed": [SCALED]}


@dataclass(frozen=True)
class Error:
    """How far a run of 20 optimizer steps is from the same in 64 bits.

    Attributes:
        logps: log-probabilities of the first batch's chosen answers, relatively.
        loss: the largest difference of a training step's loss, in nats.
        margin: of the validation's margins, relatively.
        weights: of the weights at the end, relative to how far they have moved.
    """

    logps: float
    loss: float
    margin: float
    weights: float


#: What each keeps: some three times what was measured, which is in docs/distributed.md.
KEPT = {
    "32-true": Error(logps=3e-7, loss=1e-6, margin=3e-6, weights=4e-5),
    "16-mixed": Error(logps=6e-4, loss=1e-3, margin=4e-3, weights=4e-3),
    "bf16-mixed": Error(logps=3e-3, loss=8e-3, margin=3e-2, weights=3e-2),
    "bf16-true": Error(logps=2e-3, loss=6e-2, margin=0.9, weights=0.9),
}

Fit = Callable[[str], tuple[dict[str, Series], Tensor]]


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """Figures and weights of 20 steps of the built-in recipe; the same run for the same question."""

    @cache
    def fit(precision: str) -> tuple[dict[str, Series], Tensor]:
        root = tmp_path_factory.mktemp("fit")
        options = ["--data.max_train_pairs", 320, "--data.max_val_pairs", 64, "--model.samples", 0]
        options += [
            "--trainer.log_every_n_steps",
            1,
            "--trainer.val_check_interval",
            1.0,
            "--trainer.accelerator",
            "cpu",
        ]
        options += ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", root]
        processes.run("fit", "--config", CONFIG, *OPTIONS[precision], *options)
        run = root / "version_0"
        return read_metrics(run / "metrics.csv"), flat(run / "export" / "model.safetensors")

    return fit


def flat(file: Path) -> Tensor:
    weights = load_file(file)
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


@pytest.mark.e2e
@pytest.mark.parametrize("precision", KEPT)
def test_what_a_precision_keeps_of_twenty_steps(fit: Fit, precision: str) -> None:
    (found, weights), (expected, wanted) = fit(precision), fit("64-true")
    assert found["train/loss"][0] == list(range(1, 21))
    moved = (wanted - flat(world.FOLDER / "model.safetensors")).norm()
    logps, losses, margins = (
        [series[tag][1] for series in (found, expected)]
        for tag in ("train/logps/chosen", "train/loss", "val/rewards/margins")
    )
    error = Error(
        logps=abs(logps[0][0] / logps[1][0] - 1),
        loss=max(abs(a - b) for a, b in zip(*losses, strict=True)),
        margin=abs(margins[0][-1] / margins[1][-1] - 1),
        weights=float((weights - wanted).norm() / moved),
    )
    print(f"{precision}: {error}")
    assert all(own <= most for own, most in zip(astuple(error), astuple(KEPT[precision]), strict=True)), error
    assert error.weights > KEPT[precision].weights / 30  # it was this precision, and no wider one


# fp16


def test_a_step_that_overflows_is_skipped_the_scale_halved_and_the_run_goes_on(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    overflow = ["--trainer.callbacks+=tests.e2e.scaled.Overflow", f"--trainer.callbacks.file={tmp_path}/found"]
    words = [*toy_words, SCALED, "--trainer.plugins.init_scale=1024", *overflow, "--trainer.callbacks.steps=[3,4]"]
    done = run_cli("fit", *words, "--trainer.max_steps", 6)
    assert done.status == 0, done.err
    found = torch.load(tmp_path / "found", weights_only=True)
    assert found["scales"] == [1024.0, 1024.0, 512.0, 256.0, 256.0, 256.0]
    assert found["moved"] == [True, True, False, False, True, True]
    norms = read_metrics(tmp_path / "runs" / "version_0" / "metrics.csv")["train/grad_norm"][1]
    assert [abs(norm) < float("inf") for norm in norms] == found["moved"]  # told of, as it was
    assert flat(tmp_path / "runs" / "version_0" / "export" / "model.safetensors").isfinite().all()


def test_a_gradient_that_no_scale_makes_finite_stops_the_run(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    """Else every step to come would be skipped, and nobody hear of it."""
    overflow = ["--trainer.callbacks+=tests.e2e.scaled.Overflow", f"--trainer.callbacks.file={tmp_path}/found"]
    words = [*toy_words, SCALED, "--trainer.plugins.init_scale=4", *overflow, "--trainer.callbacks.steps=[2,3,4,5,6]"]
    done = run_cli("fit", *words, "--trainer.max_steps", 8)
    assert done.status == 2
    assert "the gradient is not finite at optimizer step 5" in done.err[-1]  # scales 4, 2, 1, and then 1/2


@pytest.mark.parametrize("scale", [1.0, 4096.0])
def test_gradients_are_unscaled_before_they_are_measured_and_clipped(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path, scale: float
) -> None:
    """With plain SGD, which unlike Adam sees the length of a gradient."""
    words = [*toy_words, "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]
    words += ["--trainer.max_steps", "4", "--trainer.gradient_clip_val", "0.5"]
    assert run_cli("fit", *words).status == 0
    assert run_cli("fit", *words, SCALED, f"--trainer.plugins.init_scale={scale}").status == 0
    single, half = (tmp_path / "runs" / f"version_{number}" for number in (0, 1))
    norms = [read_metrics(run / "metrics.csv")["train/grad_norm"][1] for run in (single, half)]
    assert min(norms[0]) > 0.5 and norms[1] == pytest.approx(norms[0], rel=1e-2)
    start, one, other = (flat(path) for path in (model_of(toy_words), weights(single), weights(half)))
    assert (other - one).norm() / (one - start).norm() < 1e-2


def test_the_scale_is_part_of_a_checkpoint(run_cli: RunCli, toy_words: list[str], tmp_path: Path) -> None:
    words = [*toy_words, SCALED, "--trainer.plugins.init_scale=1024", "--model.lr_scheduler", "constant"]
    words += ["--trainer.callbacks+=tests.e2e.scaled.Overflow", f"--trainer.callbacks.file={tmp_path}/found"]
    for steps, hit, resume in ((6, 2, []), (3, 2, []), (6, 99, ["--ckpt_path", "last"])):
        done = run_cli("fit", *words, f"--trainer.callbacks.steps=[{hit}]", "--trainer.max_steps", steps, *resume)
        assert done.status == 0, done.err
    straight, _, resumed = (weights(tmp_path / "runs" / f"version_{number}").read_bytes() for number in range(3))
    assert resumed == straight
    assert torch.load(tmp_path / "found", weights_only=True)["scales"] == [512.0] * 3


def weights(run: Path) -> Path:
    return run / "export" / "model.safetensors"


def model_of(words: list[str]) -> Path:
    return Path(words[words.index("--model.checkpoint") + 1]) / "model.safetensors"
