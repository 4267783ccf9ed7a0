"""A run that reads its source as it trains: the same curve on any ranks, the same bits after a kill, one ledger.

Legend: epochs of 40 usable pairs and 5 steps of 8, in windows of 16, 16 and 8 pairs.
"""

import csv
import json
from pathlib import Path

import pyarrow
import pytest

from dpo_lightning.data.compiler import LEDGER
from dpo_lightning.data.tables import append_ledger, read_ledger
from dpo_lightning.training.callbacks import LEDGER_FILE, versions
from dpo_lightning.training.curves import Series, read_metrics
from tests.conftest import RunCli
from tests.e2e import processes
from tests.toy import make_toy

#: Rows to train on, and those of them that are spoiled: at the start, where a window ends, and at the end.
TRAIN, BAD, VAL = 45, {0: "chosen", 17: "rejected", 18: "chosen", 35: "rejected", 44: "chosen"}, 9

Kill = tuple[int, int]  # epoch, batch

#: Steps between two checkpoints, and where a run is killed: so that it goes on inside a window, from the end of one.
KILLS: dict[str, tuple[int, list[Kill]]] = {
    "inside a window, then at an epoch's end": (3, [(0, 4), (1, 0)]),
    "at a window's end, then in the second epoch": (2, [(0, 3), (1, 2)]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, `train.jsonl` with bad rows, and `val.jsonl`."""
    root = make_toy(tmp_path_factory.mktemp("streaming"), TRAIN + VAL)
    rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
    for row, name in BAD.items():
        rows[row][name] = " "
    for name, part in (("train", rows[:TRAIN]), ("val", rows[TRAIN:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


@pytest.fixture(scope="module")
def words(folder: Path) -> list[object]:
    """A stream in windows of 16, all options but the place and the length of the run."""
    return [
        *("--model.checkpoint", folder / "model", "--model.optimizer.lr", 1e-3, "--model.samples", 0),
        *("--data.source", folder / "train.jsonl", "--data.val_source", folder / "val.jsonl"),
        *("--data.streaming", "true", "--data.shuffle_buffer", 16, "--data.bad_rows", 0.2),
        *("--data.batch_size", 8, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *("--trainer.log_every_n_steps", 1, "--trainer.precision", "64-true"),
    ]


# Options that cannot be meant of a stream

STEPS = ("--trainer.max_steps", 3)

#: case -> options, and what the last line of stderr must name
REFUSED: dict[str, tuple[list[object], tuple[str, ...]]] = {
    "no end": (["--trainer.max_epochs", 2], ("lr_scheduler linear", "trainer.max_steps")),
    "no end, by default": ([], ("lr_scheduler linear", "trainer.max_steps")),
    "fraction": ([*STEPS, "--data.val_source", "null", "--data.val_fraction", 0.2], ("data.val_fraction",)),
    "workers": ([*STEPS, "--data.num_workers", 2], ("data.num_workers", "data.streaming")),
    "share of the batches": ([*STEPS, "--trainer.limit_train_batches", 0.5], ("limit_train_batches is 0.5",)),
    "one batch": ([*STEPS, "--trainer.limit_train_batches", 1], ("limit_train_batches is 1", "max_train_pairs")),
    "some batches": ([*STEPS, "--trainer.limit_train_batches", 2], ("limit_train_batches is 2", "max_train_pairs")),
    "share of an epoch": ([*STEPS, "--trainer.val_check_interval", 0.25], ("val_check_interval is 0.25",)),
    "no validation": ([*STEPS, "--data.val_source", "null"], ("train.jsonl", "data.val_source", "data.val_split")),
    "buffer": ([*STEPS, "--data.shuffle_buffer", 0], ("data.shuffle_buffer", "at least 1")),
    "buffer without a stream": ([*STEPS, "--data.streaming", "false"], ("data.shuffle_buffer", "data.streaming")),
    "bad rows": ([*STEPS, "--data.bad_rows", 0.01], ("train.jsonl", "row 0: chosen is empty", "data.bad_rows")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_stream_cannot_do_is_refused_with_a_sentence(
    case: str, run_cli: RunCli, words: list[object], tmp_path: Path
) -> None:
    options, named = REFUSED[case]
    done = run_cli("fit", *words, *options, "--trainer.default_root_dir", tmp_path / "runs")
    assert done.status == 2, done.err
    assert done.err[-1].startswith("error: ") and "Traceback" not in "\n".join(done.err)
    for text in named:
        assert text in done.err[-1]
    assert not list((tmp_path / "runs").glob("version_*"))


def test_without_an_end_to_fall_towards_epochs_are_counted_as_ever(
    run_cli: RunCli, words: list[object], tmp_path: Path
) -> None:
    options = ["--trainer.max_epochs", 2, "--model.lr_scheduler", "constant", "--trainer.default_root_dir", tmp_path]
    done = run_cli("fit", *words, *options)
    assert done.status == 0, done.err
    assert "a stream of pairs to train on, 9 to validate on" in "\n".join([done.out, *done.err])
    assert figures(tmp_path)["train/loss"][0] == list(range(1, 11))
    assert figures(tmp_path)["val/loss"][0] == [5, 10]


# Curves and bits


def run(words: list[object], root: Path, *options: object, ranks: int = 1, kill: Kill | None = None) -> None:
    """Eight steps, of which the second epoch has three."""
    options = (*options, "--trainer.max_steps", 8, "--trainer.default_root_dir", root)
    if kill is not None:
        options += ("--trainer.callbacks+=tests.e2e.killer.Killer",)
        options += (f"--trainer.callbacks.epoch={kill[0]}", f"--trainer.callbacks.batch={kill[1]}")
    done = processes.run("fit", *words, *options, ranks=ranks, expected=0 if kill is None else -9)
    assert ("this run goes on from a checkpoint" in done.output) == ("--ckpt_path" in options)


def figures(root: Path) -> dict[str, Series]:
    """The newest metrics without those of speed."""
    metrics = read_metrics(versions(root)[-1] / "metrics.csv")
    return {tag: series for tag, series in metrics.items() if not tag.endswith("per_second")}


def weights(root: Path) -> bytes:
    return (versions(root)[-1] / "export" / "model.safetensors").read_bytes()


def ledger(root: Path) -> list[tuple[int, str]]:
    """The rows that the newest ledger says were dropped, in its order."""
    with (versions(root)[-1] / LEDGER_FILE).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {(line["split"], line["action"], line["pair"]) for line in lines} == {("train", "dropped", "0")}
    return [(int(line["row"]), line["reason"]) for line in lines]


#: What a ledger of the whole source holds.
DROPPED = [(row, f"{name} is empty") for row, name in BAD.items()]


@pytest.fixture(scope="module")
def straight(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run on one rank was not killed."""
    root = tmp_path_factory.mktemp("straight")
    run(words, root)
    return root


@pytest.mark.e2e
def test_two_ranks_have_the_curve_of_one(words: list[object], straight: Path, tmp_path: Path) -> None:
    """Over the end of windows and of an epoch; and so do accumulated batches, of which the last step has fewer."""
    run(words, tmp_path, "--data.batch_size", 2, "--trainer.accumulate_grad_batches", 2, ranks=2)
    expected, found = figures(straight), figures(tmp_path)
    assert found.keys() == expected.keys() and expected["train/loss"][0] == list(range(1, 9))
    for tag, (steps, values) in expected.items():
        assert found[tag] == (steps, pytest.approx(values, rel=1e-9, abs=1e-11)), tag
    assert len(set(expected["train/loss"][1])) == 8
    assert ledger(tmp_path) == ledger(straight)


@pytest.mark.e2e
@pytest.mark.parametrize(("every", "kills"), KILLS.values(), ids=KILLS)
def test_a_killed_run_goes_on_to_the_same_bits_and_its_newest_metrics_have_the_whole_history(
    every: int, kills: list[Kill], words: list[object], straight: Path, tmp_path: Path
) -> None:
    options: list[object] = ["--model.save_every", every]
    for kill in kills:
        run(words, tmp_path, *options, kill=kill)
        options = ["--model.save_every", every, "--ckpt_path", "last"]
    run(words, tmp_path, *options)
    assert weights(tmp_path) == weights(straight)
    assert figures(tmp_path) == figures(straight)
    assert ledger(tmp_path) == DROPPED


#: Where a run is stopped by its options and goes on with others: in epochs' midst, and twice or more at their ends; and
#: the micro-batches of a step. An epoch has 10 of them: of 3 the last step has but one.
STOPS: dict[str, tuple[str, list[int], int]] = {
    "at the ends of epochs": ("max_epochs", [1, 2, 3], 2),
    "at an end, then inside": ("max_steps", [5, 7, 10, 13], 2),
    "inside, then at an end": ("max_steps", [3, 10, 11], 2),
    "at the ends of uneven epochs": ("max_epochs", [1, 2, 3], 3),
    "at an uneven end, then inside": ("max_steps", [4, 6, 8, 9], 3),
}


def stopped(words: list[object], root: Path, name: str, numbers: list[int]) -> None:
    options: list[object] = ["--model.lr_scheduler", "constant", "--trainer.default_root_dir", root]
    for number in numbers:
        processes.run("fit", *words, *options, f"--trainer.{name}", number)
        options = [*options[:4], "--ckpt_path", "last"]


@pytest.mark.e2e
@pytest.mark.parametrize(("name", "numbers", "accumulate"), STOPS.values(), ids=STOPS)
def test_a_run_that_is_made_longer_again_and_again_ends_as_a_long_one(
    name: str, numbers: list[int], accumulate: int, words: list[object], tmp_path: Path
) -> None:
    words = [*words, "--data.batch_size", 4, "--trainer.accumulate_grad_batches", accumulate]
    stopped(words, tmp_path / "short", name, numbers)
    stopped(words, tmp_path / "long", name, numbers[-1:])
    assert weights(tmp_path / "short") == weights(tmp_path / "long")
    assert figures(tmp_path / "short")["train/loss"] == figures(tmp_path / "long")["train/loss"]
    assert ledger(tmp_path / "short") == ledger(tmp_path / "long") == DROPPED


def test_a_ledger_is_read_back_whatever_its_reasons_say(tmp_path: Path) -> None:
    """More than what is read at once, with line breaks, quotes and commas."""
    reason = 'not "this",\n' + "but that; " * 20
    lines = pyarrow.Table.from_pylist(
        [dict(zip(LEDGER.names, ("train", "a", row, 0, "dropped", reason), strict=True)) for row in range(20_000)],
        LEDGER,
    )
    append_ledger(lines.slice(0, 7), tmp_path / "ledger.csv")
    append_ledger(lines.slice(7, 0), tmp_path / "ledger.csv")
    append_ledger(lines.slice(7), tmp_path / "ledger.csv")
    assert read_ledger(tmp_path / "ledger.csv").to_pylist() == lines.to_pylist()


@pytest.mark.e2e
def test_what_was_done_to_a_stream_is_counted_and_kept_though_it_was_not_read_to_its_end(
    words: list[object], tmp_path: Path
) -> None:
    """A fit ends by validating, which sets the data up again."""
    done = processes.run("fit", *words, "--trainer.max_steps", 2, "--trainer.default_root_dir", tmp_path)
    assert "Of the stream so far: 5 rows dropped" in done.output
    assert str(versions(tmp_path)[-1] / LEDGER_FILE) in done.output
    assert (versions(tmp_path)[-1] / LEDGER_FILE).read_bytes().count(b"\0") == 0
    assert ledger(tmp_path) == DROPPED


@pytest.mark.e2e
def test_the_ledger_has_each_row_that_was_dropped_once_over_all_epochs(straight: Path) -> None:
    assert ledger(straight) == DROPPED
