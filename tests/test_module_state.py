"""What changes from step to step beside the policy: a reference that moves, a loss that remembers.

By hand, from what policy and reference said of every pair; the training module runs as it does, without the command
line.

Legend: B pairs
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.packing import PreferenceBatch
from dpo_lightning.models.reference import MovingReference, Reference
from dpo_lightning.objective.losses import BCO, SFT, Sigmoid, Sum
from dpo_lightning.objective.metrics import Scored
from dpo_lightning.objective.preference import PreferenceLoss
from dpo_lightning.training import cli
from dpo_lightning.training.callbacks import LAST
from dpo_lightning.training.curves import read_metrics
from dpo_lightning.training.module import DPOModule
from tests.conftest import RunCli
from tests.e2e import processes

BETA = 0.5


def flat(module: torch.nn.Module) -> Tensor:
    """All parameters in one copy."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


class Watch(Callback):
    """Keeps the weights of policy and reference, and the loss's state, before the first step and after each."""

    def __init__(self) -> None:
        self.policies: list[Tensor] = []
        self.references: list[Tensor] = []
        self.states: list[dict[str, float]] = []

    def look(self, module: DPOModule) -> None:
        self.policies.append(flat(module.policy))
        self.references.append(flat(module.reference))
        self.states.append({name: value.item() for name, value in module.loss_state.items()})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.look(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.look(pl_module)


class Observed(DPOModule):
    """Keeps what both models said of the training pairs of every optimizer step, and the loss that was made of it."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[list[Scored]] = []

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.steps.append([])
        return super().training_step(batch, batch_idx)

    def score(self, batch: PreferenceBatch) -> Scored:
        scored = super().score(batch)
        if self.trainer.training:
            self.steps[-1].append(scored)
        return scored

    def logratios(self, step: int) -> np.ndarray:
        """`[2, B]` of a step's pairs, of all its micro-batches."""
        parts = [scored.both((scored.policy.logps - scored.reference.logps).detach()) for scored in self.steps[step]]
        return np.concatenate([torch.stack(part).numpy() for part in parts], axis=1)

    def losses(self, step: int) -> np.ndarray:
        """`[B]`"""
        return np.concatenate([scored.losses.detach().numpy() for scored in self.steps[step]])


Fit = Callable[..., tuple[Observed, Watch]]


@pytest.fixture
def fit(toy: Path, tmp_path: Path) -> Fit:
    """Trains on the toy in double precision, for some steps."""

    def run(
        loss: PreferenceLoss,
        reference: Reference | None = None,
        steps: int = 5,
        batch_size: int = 8,
        accumulate: int = 1,
        precision: str = "64-true",
    ) -> tuple[Observed, Watch]:
        module = Observed(
            str(toy / "model"),
            loss=loss,
            reference=reference,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
            lr_scheduler="constant",
        )
        watch = Watch()
        trainer = Trainer(
            accelerator="cpu",
            precision=precision,
            max_steps=steps,
            accumulate_grad_batches=accumulate,
            log_every_n_steps=1,
            limit_val_batches=0,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
            default_root_dir=tmp_path,
            callbacks=[watch],
        )
        data = PreferenceDataModule(str(toy / "pairs.jsonl"), val_fraction=0.2, batch_size=batch_size)
        trainer.fit(module, datamodule=data)
        return module, watch

    return run


# A reference that moves


@pytest.mark.parametrize(("alpha", "every", "steps"), [(0.6, 2, 7), (1.0, 3, 7), (0.25, 1, 4)])
def test_the_reference_moves_towards_the_policy_by_alpha_every_so_many_steps(
    fit: Fit, alpha: float, every: int, steps: int
) -> None:
    _, watch = fit(Sigmoid(BETA), MovingReference(alpha, every), steps)
    assert len(watch.policies) == steps + 1
    wanted = watch.policies[0]
    for step, (policy, reference) in enumerate(zip(watch.policies, watch.references, strict=True)):
        if step and step % every == 0:
            wanted = alpha * policy + (1 - alpha) * wanted
        assert torch.allclose(reference, wanted, rtol=0, atol=1e-12), step
        assert step == 0 or (policy - watch.policies[step - 1]).abs().max() > 1e-4  # it had something to follow
    assert alpha < 1 or torch.equal(watch.references[every], watch.policies[every])


def test_what_a_pair_is_compared_with_is_the_reference_as_it_stands(fit: Fit) -> None:
    """After a hard move the policy is the reference again, so the next step's loss is ln 2; in between it is not."""
    module, _ = fit(Sigmoid(BETA), MovingReference(alpha=1.0, every=2), steps=6)
    means = [module.losses(step).mean() for step in range(6)]
    for step, mean in enumerate(means):
        assert (abs(mean - math.log(2)) < 1e-9) == (step % 2 == 0), means


def test_steps_are_counted_not_micro_batches(fit: Fit) -> None:
    _, watch = fit(Sigmoid(BETA), MovingReference(alpha=1.0, every=2), steps=3, batch_size=2, accumulate=4)
    moved = [not torch.equal(now, before) for before, now in zip(watch.references, watch.references[1:], strict=False)]
    assert moved == [False, True, False]


# A loss that remembers


@pytest.mark.parametrize(("accumulate", "decay"), [(1, 0.9), (4, 0.9), (2, 0.0)])
def test_the_shift_is_the_moving_average_of_the_steps_mean_rewards(fit: Fit, accumulate: int, decay: float) -> None:
    """Jung et al. 2024, eq. 12: a step's pairs are judged by the shift of the steps before."""
    module, watch = fit(BCO(BETA, decay=decay), batch_size=8 // accumulate, accumulate=accumulate)
    shift = 0.0
    for step in range(5):
        assert watch.states[step]["shift"] == pytest.approx(shift, abs=1e-12)
        chosen, rejected = BETA * module.logratios(step)
        assert len(chosen) == 8
        wanted = np.log1p(np.exp(shift - chosen)) + np.log1p(np.exp(rejected - shift))
        assert module.losses(step) == pytest.approx(wanted, rel=1e-9)
        shift = decay * shift + (1 - decay) * (chosen.sum() + rejected.sum()) / 16
    assert watch.states[5]["shift"] == pytest.approx(shift, abs=1e-12) and abs(shift) > 1e-3


def test_accumulation_leaves_state_and_weights_as_they_are(fit: Fit) -> None:
    _, whole = fit(BCO(BETA), batch_size=8)
    _, parts = fit(BCO(BETA), batch_size=2, accumulate=4)
    assert len(whole.states) == len(parts.states) == 6
    for step in range(1, 6):
        assert parts.states[step]["shift"] == pytest.approx(whole.states[step]["shift"], rel=1e-9)
        difference = (parts.policies[step] - whole.policies[step]).norm()
        assert difference < 1e-9 * (whole.policies[step] - whole.policies[0]).norm()


def test_a_sum_keeps_each_losss_state_apart(fit: Fit) -> None:
    """Two of different strength, each by its own rewards; the sum's losses are those of both, and an SFT term."""
    loss = Sum((BCO(BETA), SFT(), BCO(2 * BETA, decay=0.5)), (1.0, 0.5, 2.0))
    module, watch = fit(loss, steps=4, batch_size=4, accumulate=2)
    first = second = 0.0
    for step in range(4):
        assert watch.states[step] == pytest.approx({"0_shift": first, "2_shift": second}, abs=1e-12)
        ratios = module.logratios(step)
        likelihoods = np.concatenate([s.policy.means[: s.policy.num_pairs].detach() for s in module.steps[step]])
        wanted = -0.5 * likelihoods
        for weight, beta, shift in ((1.0, BETA, first), (2.0, 2 * BETA, second)):
            chosen, rejected = beta * ratios
            wanted += weight * (np.log1p(np.exp(shift - chosen)) + np.log1p(np.exp(rejected - shift)))
        assert module.losses(step) == pytest.approx(wanted, rel=1e-9)
        first = 0.9 * first + 0.1 * BETA * ratios.mean()
        second = 0.5 * second + 0.5 * 2 * BETA * ratios.mean()


# What a checkpoint knows of them


JOBS: dict[str, list[object]] = {
    "frozen": [],
    "moving": ["--model.reference", "MovingReference", "--model.reference.every", 2, "--model.reference.alpha", 0.5],
    "hard": ["--model.reference", "MovingReference", "--model.reference.every", 2, "--model.reference.alpha", 1],
    "remembers": ["--model.loss", "BCO", "--model.loss.beta", BETA],
}


@pytest.fixture
def words(toy_words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.setattr(cli, "draw_curves", lambda *_: None)
    return [*toy_words, "--trainer.max_steps", 6, "--model.samples", 0]


STOP = ["--trainer.callbacks+=tests.e2e.killer.Stopper", "--trainer.callbacks.steps=3"]


@pytest.mark.parametrize("job", JOBS)
def test_three_steps_and_three_more_are_six(run_cli: RunCli, words: list[object], tmp_path: Path, job: str) -> None:
    """To the bit; half-way is between two moves of the reference, and the shift is not 0."""
    for further in ([], STOP, ["--ckpt_path", "last"]):
        done = run_cli("fit", *words, *JOBS[job], *further)
        assert done.status == 0, done.err
    straight, stopped, resumed = (tmp_path / "runs" / f"version_{n}" for n in range(3))
    exported = [(run / "export" / "model.safetensors").read_bytes() for run in (straight, stopped, resumed)]
    assert exported[2] == exported[0] != exported[1]
    checkpoints = [torch.load(run / LAST, weights_only=True) for run in (straight, stopped, resumed)]
    assert [checkpoint["global_step"] for checkpoint in checkpoints] == [6, 3, 6]
    wanted, half, found = checkpoints
    names = {name for name in wanted["state_dict"] if name.startswith("reference.")}
    assert bool(names) is (job in ("moving", "hard"))
    for name in wanted["state_dict"]:
        assert torch.equal(found["state_dict"][name], wanted["state_dict"][name]), name
    assert found["loss_state"] == wanted["loss_state"]
    assert (half["loss_state"] != wanted["loss_state"]) is (job == "remembers")


def test_a_moved_reference_is_that_of_a_later_validation(run_cli: RunCli, words: list[object], tmp_path: Path) -> None:
    """Else its rewards would be measured against where the run began."""
    assert run_cli("fit", *words, *JOBS["moving"]).status == 0
    for further in (JOBS["moving"], []):
        done = run_cli("validate", *words[: words.index("--trainer.max_steps")], *further, "--ckpt_path", "last")
        assert done.status == 0, done.err
    logged, moved, frozen = (read_metrics(tmp_path / "runs" / f"version_{n}" / "metrics.csv") for n in range(3))
    for tag in ("val/loss", "val/rewards/margins", "val/kl_of_pairs"):
        assert moved[tag][1] == pytest.approx(logged[tag][1], rel=1e-6)
    assert abs(frozen["val/rewards/margins"][1][-1] - logged["val/rewards/margins"][1][-1]) > 1e-3


# A loss of all pairs of a step


CURE = "set trainer.devices 1 and accumulate_grad_batches 1, and raise data.batch_size"


@pytest.mark.parametrize("loss", ["AOT", "AOTUnpaired"])
def test_a_loss_of_all_pairs_of_a_step_is_refused_with_micro_batches(
    run_cli: RunCli, words: list[object], tmp_path: Path, loss: str
) -> None:
    done = run_cli("fit", *words, "--model.loss", loss, "--trainer.accumulate_grad_batches", 2)
    assert done.status == 2
    assert done.err[-1].startswith(f"error: model.loss {loss} sorts all pairs") and CURE in done.err[-1]
    assert not list((tmp_path / "runs").glob("version_*"))


@pytest.mark.e2e
def test_a_loss_of_all_pairs_of_a_step_is_refused_on_several_ranks(words: list[object], tmp_path: Path) -> None:
    done = processes.run("fit", *words, "--model.loss", "AOT", ranks=2, expected=2)
    assert 0 not in done.statuses and CURE in done.output
    assert not list((tmp_path / "runs").glob("version_*"))
