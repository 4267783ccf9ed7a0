"""How the work is split leaves no trace: ranks, micro-batches, accumulation, layouts, the batches of a validation."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpo_lightning.training.callbacks import LAST
from dpo_lightning.training.curves import Series, read_metrics
from tests.e2e import processes
from tests.toy import make_toy

pytestmark = pytest.mark.e2e

#: Steps of 8 of 43 pairs: the last of six has three, which neither ranks nor micro-batches share equally.
TRAIN, VAL, STEPS = 43, 13, 6

OBJECTIVES: dict[str, list[object]] = {
    "sigmoid": ["--model.loss", "Sigmoid"],
    "bco": [  # a threshold that all pairs of a step move, and a reference that moves after every second step
        *("--model.loss", "BCO", "--model.loss.beta", 0.5, "--model.loss.sft_weight", 0.1),
        *("--model.reference", "MovingReference", "--model.reference.every", 2),
    ],
}

#: precision -> how far apart two runs may be, relative to their norm; and their figures, relatively or absolutely.
TOLERANCES = {"64-true": (1e-9, 1e-9, 1e-11), "32-true": (1e-5, 1e-5, 1e-4)}


@dataclass(frozen=True)
class Split:
    """Who computes what of a step."""

    batch: int = 8
    ranks: int = 1
    accumulate: int = 1
    layout: str = "shared"
    strategy: str = "auto"

    def __str__(self) -> str:
        return f"{self.ranks}x{self.batch}x{self.accumulate}-{self.layout}-{self.strategy}"

    def words(self, precision: str) -> list[object]:
        words: list[object] = ["--trainer.precision", precision]
        if (precision, self.strategy) == ("64-true", "fsdp"):  # refused by Lightning, which takes the plugin
            words = ["--trainer.plugins+=lightning.pytorch.plugins.DoublePrecision"]
        return [*words, "--trainer.strategy", self.strategy]


@dataclass(frozen=True)
class Run:
    """What a run left behind: its checkpoint, its figures, and what `Recorder` kept on each rank."""

    checkpoint: Path
    figures: dict[str, Series]
    ranks: list[dict[str, Tensor]]


Fit = Callable[[str, str, Split], Run]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Options of model and pairs: the toy's, 43 to train on and 13 others to validate on, some with answers swapped."""
    root = make_toy(tmp_path_factory.mktemp("pairs"), TRAIN + VAL)
    rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows[TRAIN::3]):  # which become less likely: displaced and misjudged
        row["chosen"], row["rejected"] = row["rejected"] * (number + 1), row["chosen"]
    for name, part in (("train", rows[:TRAIN]), ("val", rows[TRAIN:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return [
        *("--model.checkpoint", root / "model", "--model.optimizer.lr", 1e-3, "--model.samples", 0),
        *("--data.source", root / "train.jsonl", "--data.val_source", root / "val.jsonl"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", 1),
    ]


@pytest.fixture(scope="module")
def fit(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """One epoch; the same run for the same question."""

    @cache
    def fit(objective: str, precision: str, split: Split) -> Run:
        root = tmp_path_factory.mktemp("fit")
        options = [
            *("--data.batch_size", split.batch, "--trainer.accumulate_grad_batches", split.accumulate),
            *("--data.layout", split.layout, *split.words(precision), "--trainer.default_root_dir", root),
            *("--trainer.callbacks+=tests.e2e.recorder.Recorder", f"--trainer.callbacks.file={root}/found"),
        ]
        processes.run("fit", *words, *OBJECTIVES[objective], *options, ranks=split.ranks)
        found = [torch.load(f"{root}/found.{rank}", weights_only=True) for rank in range(split.ranks)]
        return Run(root / "version_0" / LAST, read_metrics(root / "version_0" / "metrics.csv"), found)

    return fit


def distance(found: Tensor, expected: Tensor) -> float:
    """Of two vectors, relative to the norm of the second."""
    return float((found - expected).norm() / expected.norm())


def assert_same_figures(found: dict[str, Series], expected: dict[str, Series], rel: float, abs: float) -> None:
    """All but the speed."""
    assert found.keys() == expected.keys()
    for tag, (steps, values) in expected.items():
        if not tag.endswith("per_second"):
            assert found[tag][0] == steps, tag
            assert found[tag][1] == pytest.approx(values, rel=rel, abs=abs), tag


@pytest.mark.parametrize(
    ("objective", "precision", "split"),
    [
        ("sigmoid", "64-true", Split(4, ranks=2)),
        ("sigmoid", "64-true", Split(2, accumulate=4, layout="packed")),
        ("sigmoid", "64-true", Split(2, ranks=2, accumulate=2, layout="padded")),
        ("bco", "64-true", Split(4, ranks=2, layout="packed")),
        ("bco", "64-true", Split(2, accumulate=4, layout="padded")),
        ("bco", "64-true", Split(2, ranks=2, accumulate=2)),
        ("sigmoid", "32-true", Split(4, ranks=2, layout="padded")),
        ("bco", "32-true", Split(2, ranks=2, accumulate=2, layout="packed")),
        ("sigmoid", "64-true", Split(4, ranks=2, strategy="fsdp")),
        ("bco", "64-true", Split(2, ranks=2, accumulate=2, layout="padded", strategy="fsdp")),
        ("sigmoid", "32-true", Split(4, ranks=2, layout="packed", strategy="fsdp")),
    ],
    ids=str,
)
def test_a_step_is_the_same_however_it_is_split_and_laid_out(
    fit: Fit, objective: str, precision: str, split: Split
) -> None:
    """Only the order of sums may differ: gradients, weights, what the loss remembers, and every figure."""
    apart, rel, abs = TOLERANCES[precision]
    whole, parts = fit(objective, precision, Split()), fit(objective, precision, split)
    assert whole.figures["train/loss"][0] == list(range(1, STEPS + 1)) and whole.figures["val/loss"][0] == [STEPS]
    expected = whole.ranks[0]
    for found in parts.ranks:
        assert found.keys() == expected.keys()
        distances = {name: distance(found[name], expected[name]) for name in expected if not name.endswith("held")}
        assert max(distances.values()) <= apart, distances
    assert_same_figures(parts.figures, whole.figures, rel, abs)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_of_two_ranks_under_fsdp_each_holds_half_of_policy_and_reference(fit: Fit, objective: str) -> None:
    """And under DDP all of both. A tensor of an odd number of rows is not halved exactly."""
    batch, accumulate, layout = (4, 1, "shared") if objective == "sigmoid" else (2, 2, "padded")
    split = Split(batch, ranks=2, accumulate=accumulate, layout=layout, strategy="fsdp")
    halves = fit(objective, "64-true", split).ranks
    copies = fit(objective, "64-true", Split(4, ranks=2, layout="shared" if objective == "sigmoid" else "packed")).ranks
    for name in ("policy", "reference"):
        whole = halves[0][name].numel()
        assert [int(copy[f"{name} held"]) for copy in copies] == [whole, whole]
        assert [int(half[f"{name} held"]) / whole for half in halves] == pytest.approx([0.5, 0.5], abs=0.01)


def test_what_moves_from_step_to_step_has_moved(fit: Fit) -> None:
    """Else the test before would show nothing of it."""
    plain, moving = (fit(name, "64-true", Split()).ranks[0] for name in OBJECTIVES)
    assert (
        plain.keys()
        == moving.keys() - {"shift"}
        == {f"gradient {n}" for n in range(1, STEPS + 1)} | {"policy", "reference", "policy held", "reference held"}
    )
    assert moving["shift"].abs() > 1e-3
    assert distance(moving["reference"], plain["reference"]) > 1e-4
    assert distance(plain["policy"], plain["reference"]) > 1e-4
    assert distance(plain["gradient 6"], plain["gradient 1"]) > 0.1


@pytest.fixture(scope="module")
def validate(fit: Fit, words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """The figures of `validate` for a policy that has learned a little; the same ones for the same question."""

    @cache
    def validate(loss: str, batch: int, ranks: int = 1) -> dict[str, Series]:
        root = tmp_path_factory.mktemp("validate")
        options = [
            *("--model.loss", loss, "--data.batch_size", batch, "--data.layout", "shared"),
            *("--trainer.precision", "64-true", "--trainer.default_root_dir", root),
            *("--ckpt_path", fit("sigmoid", "64-true", Split()).checkpoint),
        ]
        processes.run("validate", *words, *options, ranks=ranks)
        return read_metrics(root / "version_0" / "metrics.csv")

    return validate


@pytest.mark.parametrize(
    ("loss", "batch", "ranks"),
    [
        *(("Sigmoid", batch, ranks) for ranks in (1, 2) for batch in (1, 3, 5, 8)),
        *(("AOT", batch, ranks) for batch, ranks in ((1, 1), (5, 1), (3, 2))),
    ],
)
def test_a_validation_counts_every_pair_once_however_they_are_batched(
    validate: Callable[..., dict[str, Series]], loss: str, batch: int, ranks: int
) -> None:
    """13 pairs, with ranks that are left without one; against all of them in one batch."""
    expected = validate(loss, VAL)
    shares = ("rewards/accuracies", "rewards/accuracies/longer", "rewards/accuracies/shorter", "displacement")
    assert all(0 < expected[f"val/{name}"][1][0] < 1 for name in shares)  # and none the same whatever is counted
    assert_same_figures(validate(loss, batch, ranks), expected, 1e-9, 1e-12)


def test_a_loss_of_all_pairs_together_is_another_than_that_of_each(validate: Callable[..., dict[str, Series]]) -> None:
    """Else the test before would not show that its validation looks at all pairs at once."""
    each, together = (validate(loss, VAL)["val/loss"][1][0] for loss in ("Sigmoid", "AOT"))
    assert abs(each - together) > 1e-4
