"""`trainer.strategy fsdp` on two ranks, from the start to the export: what it leaves is what any other strategy leaves.

That its steps are those of one process, and that each rank holds half, is in `test_splits`; that it resumes to the same
bits in `test_resume`.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from safetensors.torch import load_file

from dpo_lightning.training.callbacks import LAST
from dpo_lightning.training.curves import read_metrics
from tests.conftest import RunCli
from tests.e2e import processes

pytestmark = pytest.mark.e2e

DOUBLE = {
    "auto": ["--trainer.precision", "64-true"],
    "fsdp": ["--trainer.plugins+=lightning.pytorch.plugins.DoublePrecision"],
}
CHECKPOINTING = ["--model.gradient_checkpointing", "true"]
MOVING = ["--model.reference", "MovingReference", "--model.reference.every", 2]
CONSTANT = ["--model.lr_scheduler", "constant"]

Fit = Callable[..., Path]


def flat(run: Path) -> torch.Tensor:
    weights = load_file(run / "export" / "model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def distance(run: Path, other: Path) -> float:
    return float((flat(run) - flat(other)).norm() / flat(other).norm())


@pytest.fixture(scope="module")
def words(toy: Path) -> list[object]:
    return [
        *("--model.checkpoint", toy / "model", "--model.optimizer.lr", 1e-3, "--model.max_new_tokens", 6),
        *("--data.source", toy / "pairs.jsonl", "--data.val_fraction", 0.2, "--trainer.accelerator", "cpu"),
        *("--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", 1),
    ]


@pytest.fixture(scope="module")
def fit(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """The run's directory after four steps of eight pairs; the same run for the same question."""

    @cache
    def fit(strategy: str, ranks: int = 2) -> Path:
        root = tmp_path_factory.mktemp("fit")
        options = [*DOUBLE[strategy], *CHECKPOINTING, *MOVING, *CONSTANT, "--trainer.max_steps", 4]
        options += ["--trainer.strategy", strategy, "--data.batch_size", 8 // ranks, "--trainer.default_root_dir", root]
        processes.run("fit", *words, *options, ranks=ranks)
        return root / "version_0"

    return fit


def test_the_export_and_the_checkpoint_are_those_of_one_process(fit: Fit) -> None:
    """Names, shapes, types, tied weights and values; and so are the answers that were sampled before and after."""
    one, two = fit("auto", 1), fit("fsdp")
    assert {path.name for path in (two / "export").iterdir()} == {path.name for path in (one / "export").iterdir()}
    first, second = (load_file(run / "export" / "model.safetensors") for run in (one, two))
    assert {name: (value.shape, value.dtype) for name, value in first.items()} == {
        name: (value.shape, value.dtype) for name, value in second.items()
    }
    assert distance(two, one) < 1e-9
    first, second = (torch.load(run / LAST, weights_only=True) for run in (one, two))
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert any(name.startswith("reference.") for name in first["state_dict"])
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (first, second)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        for name, value in state.items():
            torch.testing.assert_close(states[1][number][name], value, rtol=1e-9, atol=1e-12)
    assert second["callbacks"]["Samples"] == first["callbacks"]["Samples"] != {"before": {}}


@pytest.mark.parametrize("strategies", [("fsdp", "auto"), ("auto", "fsdp")], ids=" then ".join)
def test_a_run_goes_on_under_another_strategy(
    fit: Fit, words: list[object], tmp_path: Path, strategies: tuple[str, str]
) -> None:
    first, second = strategies
    options = [*CHECKPOINTING, *MOVING, *CONSTANT, "--data.batch_size", 4, "--trainer.default_root_dir", tmp_path]
    for strategy, steps, resume in ((first, 2, []), (second, 4, ["--ckpt_path", "last"])):
        chosen = [*DOUBLE[strategy], "--trainer.strategy", strategy, "--trainer.max_steps", steps]
        processes.run("fit", *words, *options, *chosen, *resume, ranks=2)
    assert distance(tmp_path / "version_1", fit("auto", 1)) < 1e-9


def test_one_device_exports_validates_and_tests_what_two_have_left(
    fit: Fit, words: list[object], run_cli: RunCli, tmp_path: Path
) -> None:
    run = fit("fsdp")
    assert run_cli("export", "--ckpt_path", run / LAST, "--output_dir", tmp_path / "again").status == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    expected = load_file(run / "export" / "model.safetensors")
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in expected)
    options = [*words, *MOVING, "--trainer.precision", "64-true", "--ckpt_path", run / LAST]
    assert run_cli("validate", *options, "--trainer.default_root_dir", tmp_path / "validate").status == 0
    found = read_metrics(tmp_path / "validate" / "version_0" / "metrics.csv")["val/loss"][1][-1]
    assert found == pytest.approx(read_metrics(run / "metrics.csv")["val/loss"][1][-1], rel=1e-9)


def test_two_ranks_sample_and_validate_what_one_does(fit: Fit, words: list[object], tmp_path: Path) -> None:
    """Answers end where they end: a rank whose own have ended goes on until the others' have."""
    files, figures = [], []
    for strategy, ranks in (("auto", 1), ("fsdp", 2)):
        root = tmp_path / strategy
        options = [
            *words,
            *MOVING,
            *DOUBLE[strategy],
            "--trainer.strategy",
            strategy,
            "--ckpt_path",
            fit("fsdp") / LAST,
        ]
        options += ["--data.batch_size", 1, "--model.max_new_tokens", 64, "--trainer.default_root_dir", root]
        processes.run("test", *options, ranks=ranks)
        processes.run("validate", *options, ranks=ranks)
        files.append([json.loads(line) for line in (root / "version_0" / "samples.jsonl").read_text().splitlines()])
        figures.append(read_metrics(root / "version_1" / "metrics.csv")["val/loss"][1])
    for one, two in zip(*files, strict=True):
        assert two["logratio"] == pytest.approx(one.pop("logratio"), rel=1e-9) and two.items() >= one.items()
    assert {line["policy"]["ended"] for line in files[0]} == {0.0, 1.0}
    assert figures[1] == pytest.approx(figures[0], rel=1e-9)


#: What is trained against what, where no second model is in memory.
LEAN: dict[str, list[object]] = {
    "an adapter": ["--model.lora.r", 4],
    "an adapter, exported alone": ["--model.lora.r", 4, "--model.lora.merge", "false"],
    "a table": ["--model.reference", "CachedLogps"],
    "an adapter and a table": ["--model.lora.r", 4, "--model.reference", "CachedLogps"],
}


@pytest.mark.parametrize("case", LEAN)
def test_adapters_and_tables_are_those_of_one_process(case: str, words: list[object], tmp_path: Path) -> None:
    """Stopped in between, and gone on with."""
    runs = []
    for strategy, ranks in (("auto", 1), ("fsdp", 2)):
        root = tmp_path / f"{ranks}"
        options = [*words, *LEAN[case], *DOUBLE[strategy], *CHECKPOINTING, *CONSTANT, "--trainer.strategy", strategy]
        if "CachedLogps" in options:
            options += ["--model.reference.directory", root / "logps"]
        options += ["--model.optimizer.lr", 0.01, "--data.batch_size", 8 // ranks, "--trainer.default_root_dir", root]
        processes.run("fit", *options, "--trainer.max_steps", 2, ranks=ranks)
        processes.run("fit", *options, "--trainer.max_steps", 4, "--ckpt_path", "last", ranks=ranks)
        runs.append(root / "version_1")
    files = [next((run / "export").glob("*model.safetensors")) for run in runs]
    assert files[0].name == files[1].name
    first, second = (load_file(file) for file in files)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-8, atol=1e-10)
    one, two = (read_metrics(run / "metrics.csv") for run in runs)
    assert one["train/loss"][0] == two["train/loss"][0] == [1, 2, 3, 4]
    for tag, (_, values) in one.items():
        if not tag.endswith("per_second"):
            assert two[tag][1] == pytest.approx(values, rel=1e-8, abs=1e-10), tag


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_is_what_it_is_under_ddp(words: list[object], tmp_path: Path, precision: str) -> None:
    """The same figures but for the rounding of sums, which bf16-true does in gradients too."""
    found = []
    for strategy in ("ddp", "fsdp"):
        options = [*words, "--trainer.precision", precision, "--trainer.max_steps", 4, "--model.samples", 0]
        options += ["--data.batch_size", 4, "--trainer.strategy", strategy]
        processes.run("fit", *options, "--trainer.default_root_dir", tmp_path / strategy, ranks=2)
        metrics = read_metrics(tmp_path / strategy / "version_0" / "metrics.csv")
        found.append([metrics[tag][1] for tag in ("train/loss", "train/grad_norm", "val/rewards/margins")])
    for ddp, fsdp in zip(*found, strict=True):
        assert fsdp == pytest.approx(ddp, rel=0.03)
    types = {value.dtype for value in load_file(tmp_path / "fsdp/version_0/export/model.safetensors").values()}
    assert types == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


class Spoiler(Callback):
    """Changes one weight of the reference before the first step, on whatever rank has it."""

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.reference.model.model.transformer.h[0].mlp.c_fc.weight.to_local()[0] += 1e-3


def test_a_reference_of_which_a_shard_has_changed_is_found_before_the_first_step(
    words: list[object], tmp_path: Path
) -> None:
    spoil = [f"--trainer.callbacks+={__name__}.Spoiler", "--trainer.strategy", "fsdp"]
    done = processes.run("fit", *words, *spoil, "--trainer.default_root_dir", tmp_path, ranks=2, expected=2)
    assert done.statuses == (2, 2)
    assert "transformer.h.0.mlp.c_fc.weight for one: it is another model" in done.output
    assert not list(tmp_path.glob("version_*"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--trainer.strategy", "fsdp_cpu_offload"], "fsdp_cpu_offload"),
        (["--trainer.strategy", "lightning.pytorch.strategies.FSDPStrategy"], "FSDPStrategy"),
        (["--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"], "ModelParallelStrategy"),
        (["--trainer.strategy.class_path", "lightning.pytorch.strategies.FSDPStrategy"], "FSDPStrategy spreads"),
        (["--trainer.strategy", "deepspeed_stage_2"], "deepspeed_stage_2"),
        (["--trainer.strategy", "fsdp", "--trainer.precision", "16-mixed"], "bf16-mixed"),
        (["--trainer.strategy", "nonsense"], "nonsense"),
        (["--trainer.accelerator", "gpu"], "trainer: "),
    ],
    ids=lambda value: "" if isinstance(value, list) else value,
)
def test_what_cannot_be_run_is_refused_in_a_sentence(
    run_cli: RunCli, words: list[object], tmp_path: Path, options: list[str], named: str
) -> None:
    if options[-1] == "gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run_cli("fit", *words, *options, "--trainer.default_root_dir", tmp_path / "runs")
    assert done.status == 2
    assert done.err[-1].startswith("error: ") and named in done.err[-1]
    assert not (tmp_path / "runs").exists()
