"""A run that was killed and started again with the same words and `--ckpt_path last` goes on to the same bits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from dpo_lightning.training.callbacks import versions
from dpo_lightning.training.curves import Series, read_metrics
from tests.e2e import processes

pytestmark = pytest.mark.e2e

Kill = tuple[int, int]  # epoch, batch

OBJECTIVES: dict[str, list[object]] = {
    "sigmoid": [],
    "bco": [  # a threshold and a reference that move: what a checkpoint must know of them
        *("--model.loss", "BCO", "--model.loss.beta", 0.5),
        *("--model.reference", "MovingReference", "--model.reference.every", 3),
    ],
}


@dataclass(frozen=True)
class Job:
    """What is trained, and how it is computed."""

    objective: str = "sigmoid"
    precision: str = "32-true"
    workers: int = 0
    ranks: int = 1
    epochs: int = 3
    strategy: str = "auto"


HALF = Job(precision="bf16-mixed", epochs=1)


def run(job: Job, words: list[object], root: Path, kill: Kill | None = None, resume: bool = False) -> None:
    """Epochs of 12 batches and 6 optimizer steps (6 and 3 on each of two ranks), and a checkpoint every 4 steps."""
    options = [
        *OBJECTIVES[job.objective],
        *("--trainer.precision", job.precision, "--data.num_workers", job.workers),
        *("--trainer.max_epochs", job.epochs, "--trainer.accumulate_grad_batches", 2, "--model.save_every", 4),
        *("--trainer.strategy", job.strategy, "--model.samples", 0, "--trainer.default_root_dir", root),
    ]
    if kill is not None:
        options += ["--trainer.callbacks+=tests.e2e.killer.Killer"]
        options += [f"--trainer.callbacks.epoch={kill[0]}", f"--trainer.callbacks.batch={kill[1]}"]
    if resume:
        options += ["--ckpt_path", "last"]
    done = processes.run("fit", *words, *options, ranks=job.ranks, expected=0 if kill is None else -9)
    assert ("this run goes on from a checkpoint" in done.output) == resume  # to begin anew would come to the same


def weights(root: Path) -> bytes:
    return (versions(root)[-1] / "export" / "model.safetensors").read_bytes()


def history(root: Path) -> dict[str, Series]:
    """The newest metrics without those of speed."""
    metrics = read_metrics(versions(root)[-1] / "metrics.csv")
    return {tag: series for tag, series in metrics.items() if not tag.endswith("per_second")}


Straight = Callable[[Job, list[object]], Path]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Where a job was run without being killed, whatever its worker processes; the same one for the same question."""

    @cache
    def straight(job: Job, words: tuple[object, ...]) -> Path:
        root = tmp_path_factory.mktemp("straight")
        run(job, list(words), root)
        return root

    return lambda job, words: straight(replace(job, workers=0), tuple(words))


@pytest.fixture
def words(toy_words: list[str]) -> list[str]:
    """Without the directory, which is another for every test."""
    place = toy_words.index("--trainer.default_root_dir")
    return [*toy_words[:place], *toy_words[place + 2 :]]


@pytest.mark.parametrize(
    ("job", "kills"),
    [
        pytest.param(Job(), [(0, 11), (1, 10)], id="inside an accumulation window, then between two checkpoints"),
        pytest.param(Job(workers=2), [(1, 0), (2, 0)], id="twice at an end, with workers"),
        pytest.param(replace(HALF, workers=2), [(0, 9)], id="inside a window, with workers, in half"),
        pytest.param(Job("bco"), [(1, 7)], id="inside a window, of a loss and a reference that remember"),
        pytest.param(Job(ranks=2), [(1, 3)], id="inside a window, on two ranks"),
        pytest.param(Job("bco", ranks=2, strategy="fsdp"), [(1, 3)], id="the same of shards, with all that moves"),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits_and_its_newest_metrics_have_the_whole_history(
    straight: Straight, words: list[str], tmp_path: Path, job: Job, kills: list[Kill]
) -> None:
    for number, kill in enumerate(kills):
        run(job, words, tmp_path, kill, resume=number > 0)
    run(job, words, tmp_path, resume=True)
    expected = straight(job, words)
    assert weights(tmp_path) == weights(expected)
    epoch = 6 // job.ranks
    steps = list(range(1, epoch * job.epochs + 1))
    assert history(expected)["train/loss"][0] == steps and history(expected)["val/loss"][0] == steps[epoch - 1 :: epoch]
    assert history(tmp_path) == history(expected)


#: Where a run is killed: between two checkpoints, inside an accumulation window, right after an epoch's end.
PLACES: dict[str, Kill] = {"mid-epoch": (1, 10), "mid-accumulation": (1, 7), "an epoch's end": (1, 0)}


@pytest.mark.campaign
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("place", PLACES)
def test_wherever_and_however_a_run_is_killed_it_goes_on_to_the_same_bits(
    straight: Straight, words: list[str], tmp_path: Path, place: str, objective: str, precision: str, workers: int
) -> None:
    job = Job(objective, precision, workers, epochs=2)
    run(job, words, tmp_path, PLACES[place])
    run(job, words, tmp_path, resume=True)
    assert weights(tmp_path) == weights(straight(job, words))
    assert history(tmp_path) == history(straight(job, words))


def test_what_a_job_is_shows_from_the_first_step_on(straight: Straight, words: list[str]) -> None:
    """Else the test before would show nothing of a precision or of a loss."""
    plain, half, other = (history(straight(job, words)) for job in (Job(), HALF, Job("bco")))
    assert half["train/logps/chosen"][1][0] != plain["train/logps/chosen"][1][0] == other["train/logps/chosen"][1][0]
    assert other["train/loss"][1][0] != plain["train/loss"][1][0]
