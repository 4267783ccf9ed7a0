"""One run, three references that are the same model: a frozen copy, a table of what it scored, the policy's base."""

import json
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from xxhash import xxh3_128

from dpo_lightning.data.packing import PreferenceBatch
from dpo_lightning.models import cached
from dpo_lightning.models.cache import HEADER, VALUES
from dpo_lightning.models.cached import CachedLogps
from dpo_lightning.models.policy import Policy
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.training import cli
from dpo_lightning.training.callbacks import versions
from dpo_lightning.training.curves import Series, read_metrics
from dpo_lightning.training.module import DPOModule
from tests.conftest import RunCli
from tests.e2e import processes
from tests.toy import make_model

REFERENCES = ("FrozenModel", "CachedLogps", "AdapterOff")


@pytest.fixture
def words(toy_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A run of six steps with two validations, and a cache of its own."""
    monkeypatch.setattr(cli, "draw_curves", lambda *_: None)
    limits = ("--trainer.max_epochs", 2, "--trainer.max_steps", 6, "--trainer.limit_train_batches", 3)
    return [*toy_words, *limits, "--model.samples", 0, "--trainer.log_every_n_steps", 1]


@pytest.fixture
def cache(tmp_path: Path) -> list[object]:
    return ["--model.reference", "CachedLogps", "--model.reference.directory", tmp_path / "logps"]


def curves(root: Path, number: int = -1) -> dict[str, Series]:
    metrics = read_metrics(versions(root)[number] / "metrics.csv")
    return {tag: series for tag, series in metrics.items() if not tag.endswith("per_second")}


def fit(run_cli: RunCli, *words: object) -> str:
    done = run_cli("fit", *words)
    assert done.status == 0, done.err
    return "\n".join([done.out, *done.err])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pairs that the reference was asked to score for a table, a number for each batch."""
    scored: list[int] = []
    score = CachedLogps._score

    def counted(self: CachedLogps, pairs, batch, *rest: object) -> object:
        scored.append(len(batch.pairs))
        return score(self, pairs, batch, *rest)

    monkeypatch.setattr(CachedLogps, "_score", counted)
    return scored


# The same curve


@pytest.mark.parametrize(("precision", "allowed"), [("64-true", 1e-9), ("32-true", 1e-4)])
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_three_references_give_one_curve(
    precision: str, allowed: float, layout: str, run_cli: RunCli, words: list[object], tmp_path: Path
) -> None:
    """Rewards are beta = 1 times the log-ratios, so the tolerance is in nats an answer."""
    words = [*words, "--trainer.precision", precision, "--data.layout", layout, "--model.loss.beta", 1]
    words += ["--model.lora.r", 4, "--model.optimizer.lr", 0.01]
    found = {}
    for reference in REFERENCES:
        root = tmp_path / reference
        fit(run_cli, *words, "--model.reference", reference, "--trainer.default_root_dir", root)
        found[reference] = curves(root)
    wanted = found["FrozenModel"]
    assert len(wanted["train/loss"][0]) == 6 and len(wanted["val/loss"][0]) == 2
    assert max(map(abs, wanted["train/rewards/margins"][1])) > 30 * allowed  # there is something to differ in
    for reference in REFERENCES[1:]:
        assert found[reference].keys() == wanted.keys()
        for tag, (steps, values) in wanted.items():
            if "accuracies" in tag and allowed > 1e-6:
                continue  # before the first step all margins are 0, and rounding decides what is no tie
            assert found[reference][tag] == (steps, pytest.approx(values, abs=allowed, rel=allowed)), (reference, tag)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_half_precision_the_table_holds_what_the_same_path_computes(
    precision: str, run_cli: RunCli, words: list[object], tmp_path: Path
) -> None:
    """An untrained policy has rewards of 0; in other batches it rounds otherwise, by less than 0.001 nats a token."""
    words = [*words, "--trainer.precision", precision, "--model.loss.beta", 1, "--model.optimizer.lr", 0]
    fit(run_cli, *words, "--model.reference", "CachedLogps")
    found = curves(tmp_path / "runs")
    tokens = 30  # of an answer
    for tag in ("train/rewards/chosen", "train/rewards/rejected", "val/rewards/chosen", "val/rewards/rejected"):
        assert max(map(abs, found[tag][1])) < 0.001 * tokens, tag
    assert found["val/loss"][1] == pytest.approx([math.log(2)] * 2, abs=0.05)


@pytest.mark.e2e
def test_two_ranks_make_and_use_the_table_of_one(words: list[object], tmp_path: Path) -> None:
    words = [*words, "--trainer.precision", "64-true", "--model.reference", "CachedLogps"]
    found = []
    for ranks, size in ((1, 8), (2, 4)):
        place = ["--trainer.default_root_dir", tmp_path / f"{ranks}"]
        place += ["--model.reference.directory", tmp_path / f"t{ranks}"]
        processes.run("fit", *words, *place, "--data.batch_size", size, ranks=ranks)
        found.append(curves(tmp_path / f"{ranks}"))
    names = [sorted(path.name for path in (tmp_path / place).iterdir() if path.is_dir()) for place in ("t1", "t2")]
    assert names[0] == names[1] and len(names[0]) == 2
    for tag, (steps, values) in found[0].items():
        assert found[1][tag] == (steps, pytest.approx(values, rel=1e-9, abs=1e-11)), tag


# The table is found again, or is another one


def test_a_second_run_asks_the_reference_nothing(
    run_cli: RunCli,
    words: list[object],
    cache: list[object],
    passes: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = fit(run_cli, *words, *cache)
    assert sum(passes) == 60 and "log-probabilities of 48 pairs to train on written to" in said
    assert len([path for path in (tmp_path / "logps").iterdir() if path.is_dir()]) == 2
    passes.clear()
    forwards: list[int] = []
    logps = Policy.logps

    def counted(self: Policy, batch: PreferenceBatch, *rest: object) -> PairLogps:
        forwards.append(batch.num_pairs)
        return logps(self, batch, *rest)

    monkeypatch.setattr(Policy, "logps", counted)
    monkeypatch.setattr(cached, "load_policy", lambda *_, **__: pytest.fail("the reference was loaded"))
    said = fit(run_cli, *words, *cache, "--model.loss", "IPO", "--model.optimizer.lr", 1e-4, "--data.batch_size", 6)
    assert "written to /" not in said.split("Written to")[0] and said.count("are in") == 2
    # Of each table a few pairs are scored again by the policy, which still is the reference.
    assert passes == [cached.SPOT_CHECKS, cached.SPOT_CHECKS]
    tried, trained, checked, validated = 6, 6 * 6, 6, 12 * 2
    sanity, layout = 12, 2 + 2  # two batches of validation before the first step, and toy pairs before that
    assert sum(forwards) == tried + trained + checked + validated + sanity + layout + sum(passes)


#: What is changed -> whether training and validation then need new tables.
CHANGES: dict[str, tuple[list[object], bool, bool]] = {
    "loss": (["--model.loss", "Hinge", "--model.loss.beta", 0.3], False, False),
    "layout": (["--data.layout", "padded"], False, False),
    "steps": (["--trainer.max_steps", 2, "--data.batch_size", 3], False, False),
    "an adapter": (["--model.lora.r", 2], False, False),
    "precision": (["--trainer.precision", "bf16-mixed"], True, True),
    "fewer pairs to train on": (["--data.max_train_pairs", 20], True, False),
    "truncation": (["--data.max_length", 50], True, True),
    "split": (["--data.val_fraction", 0.4], True, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_needs_a_new_table_where_it_is_of_model_tokens_or_precision(
    change: str, run_cli: RunCli, words: list[object], cache: list[object], tmp_path: Path
) -> None:
    options, train, val = CHANGES[change]
    fit(run_cli, *words, *cache)
    said = fit(run_cli, *words, *cache, *options)
    made = [f"pairs to {what} on written to" in said for what in ("train", "validate")]
    assert made == [train, val]


def test_one_weight_that_is_another_needs_a_new_table(
    run_cli: RunCli, words: list[object], cache: list[object], toy: Path, tmp_path: Path
) -> None:
    fit(run_cli, *words, *cache)
    model = AutoModelForCausalLM.from_pretrained(toy / "model")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[3] += 1e-3
    other = shutil.copytree(toy / "model", tmp_path / "other")
    model.save_pretrained(other)
    assert fit(run_cli, *words, *cache, "--model.checkpoint", other).count("on written to") == 2


def test_dropped_rows_do_not_shift_what_belongs_to_a_pair(
    run_cli: RunCli, words: list[object], cache: list[object], toy: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (toy / "pairs.jsonl").read_text().splitlines()]
    for row in (0, 7, 30):
        rows[row]["rejected"] = " "
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*words, "--data.source", tmp_path / "rows.jsonl", "--data.bad_rows", 0.1, "--trainer.precision", "64-true"]
    fit(run_cli, *words, "--trainer.default_root_dir", tmp_path / "frozen")
    fit(run_cli, *words, *cache, "--trainer.default_root_dir", tmp_path / "cached")
    wanted, found = curves(tmp_path / "frozen"), curves(tmp_path / "cached")
    for tag, (_, values) in wanted.items():
        assert found[tag][1] == pytest.approx(values, rel=1e-9, abs=1e-9), tag


def test_another_checkpoint_can_be_the_reference_and_is_scored_once(
    run_cli: RunCli, words: list[object], cache: list[object], passes: list[int], tmp_path: Path
) -> None:
    make_model(tmp_path / "other", seed=1)
    words = [*words, "--trainer.precision", "64-true"]
    other = ["--model.reference.checkpoint", tmp_path / "other", "--trainer.default_root_dir"]
    fit(run_cli, *words, "--model.reference", "FrozenModel", *other, tmp_path / "frozen")
    for _ in range(2):
        fit(run_cli, *words, *cache, *other, tmp_path / "cached")
    assert sum(passes) == 60 + 2 * cached.SPOT_CHECKS
    wanted = curves(tmp_path / "frozen")
    for number in (0, 1):
        found = curves(tmp_path / "cached", number)
        for tag, (_, values) in wanted.items():
            assert found[tag][1] == pytest.approx(values, rel=1e-9, abs=1e-9), tag


@pytest.mark.e2e
def test_of_two_runs_that_start_at_once_one_makes_the_tables(words: list[object], tmp_path: Path) -> None:
    words = [*words, "--model.reference", "CachedLogps", "--model.reference.directory", tmp_path / "logps"]

    def start(number: int) -> str:
        return processes.run("fit", *words, "--trainer.default_root_dir", tmp_path / f"{number}").output

    with ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(start, range(3)))
    for split in ("train", "validate"):
        assert sum(f"pairs to {split} on written to" in output for output in outputs) == 1
    found = [curves(tmp_path / f"{number}")["val/loss"] for number in range(3)]
    assert found[0] == found[1] == found[2]
    assert sorted(path.suffix for path in (tmp_path / "logps").iterdir()) == ["", "", ".lock", ".lock"]


def test_adapters_that_differ_in_their_scale_alone_have_tables_of_their_own(
    run_cli: RunCli, words: list[object], cache: list[object], tmp_path: Path
) -> None:
    fit(run_cli, *words, "--model.lora.r", 2, "--model.lora.merge", "false", "--model.optimizer.lr", 0.05)
    first = versions(tmp_path / "runs")[-1] / "export"
    second = shutil.copytree(first, tmp_path / "second")
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 320}))
    for adapter, made in ((first, 2), (second, 2), (first, 0), (second, 0)):
        assert fit(run_cli, *words, *cache, "--model.checkpoint", adapter).count("on written to") == made


@pytest.mark.parametrize("same", [True, False])
def test_a_second_model_is_not_kept_and_the_same_checkpoint_is_the_start(
    same: bool,
    run_cli: RunCli,
    words: list[object],
    cache: list[object],
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_model(tmp_path / "other", seed=1)
    other = ["--model.reference.checkpoint", toy / "model" if same else tmp_path / "other"]
    kept: list[int] = []
    step = DPOModule.training_step

    def watched(self: DPOModule, *args: object) -> object:
        kept.append(len(self.reference._loaded))
        return step(self, *args)

    monkeypatch.setattr(DPOModule, "training_step", watched)
    for _ in range(2):
        said = fit(run_cli, *words, *cache, *other)
        assert ("policy and reference agree" in said) == same
    assert kept == [0] * 12


def test_a_table_that_may_only_be_read_is_used(
    run_cli: RunCli, words: list[object], cache: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(run_cli, *words, *cache)

    def refused(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cached, "FileLock", refused)
    fit(run_cli, *words, *cache)
    done = run_cli("fit", *words, *cache, "--data.max_train_pairs", 20)
    assert done.status == 2 and "cannot be written there (Permission denied)" in done.err[-1]


def test_what_a_killed_run_has_left_of_a_table_is_removed(
    run_cli: RunCli, words: list[object], cache: list[object], tmp_path: Path
) -> None:
    fit(run_cli, *words, *cache)
    for table in (path for path in (tmp_path / "logps").iterdir() if path.is_dir()):
        table.rename(table.with_name(f".{table.name}-abc"))
    fit(run_cli, *words, *cache)
    assert len([path for path in (tmp_path / "logps").iterdir() if path.is_dir()]) == 2


# Runs that go on, and other verbs


@pytest.mark.parametrize("gone", [False, True])
def test_a_run_that_goes_on_has_the_reference_it_began_with(
    gone: bool, run_cli: RunCli, words: list[object], cache: list[object], tmp_path: Path
) -> None:
    """Even where the table is no longer there: then the checkpoint that training began with is loaded again."""
    words = [*words, *cache, "--trainer.precision", "64-true", "--model.lr_scheduler", "constant"]
    fit(run_cli, *words, "--trainer.default_root_dir", tmp_path / "straight")
    fit(run_cli, *words, "--trainer.max_steps", 3, "--trainer.default_root_dir", tmp_path / "parts")
    if gone:
        shutil.rmtree(tmp_path / "logps")
    fit(run_cli, *words, "--ckpt_path", "last", "--trainer.default_root_dir", tmp_path / "parts")
    wanted, found = curves(tmp_path / "straight"), curves(tmp_path / "parts")
    assert found["train/rewards/margins"] == wanted["train/rewards/margins"]
    done = run_cli("validate", *words, "--ckpt_path", "last", "--trainer.default_root_dir", tmp_path / "parts")
    assert done.status == 0, done.err
    assert curves(tmp_path / "parts")["val/loss"][1][-1] == pytest.approx(wanted["val/loss"][1][-1], rel=1e-12)


def test_test_samples_from_the_model_that_the_table_is_of(
    run_cli: RunCli, words: list[object], cache: list[object], tmp_path: Path
) -> None:
    few = ["--data.max_test_prompts", 5, "--model.max_new_tokens", 6]
    found = []
    for options in (cache, []):
        root = tmp_path / f"{len(options)}"
        fit(run_cli, *words, *options, "--trainer.default_root_dir", root)
        done = run_cli("test", *words, *options, *few, "--ckpt_path", "last", "--trainer.default_root_dir", root)
        assert done.status == 0, done.err
        found.append(curves(root)["test/kl"][1])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_precompute_makes_what_fit_finds(
    run_cli: RunCli, words: list[object], cache: list[object], passes: list[int], tmp_path: Path
) -> None:
    done = run_cli("precompute", *words, *cache)
    assert done.status == 0, done.err
    assert sum(passes) == 60 and not (tmp_path / "runs").exists()
    assert str(tmp_path / "logps") in done.out
    passes.clear()
    assert "written to /" not in fit(run_cli, *words, *cache).split("Written to")[0]
    assert sum(passes) == 2 * cached.SPOT_CHECKS


@pytest.mark.parametrize("options", [["--trainer.devices", 0], ["--trainer.accelerator", "gpu"]])
def test_precompute_refuses_what_fit_refuses(options: list[object], run_cli: RunCli, words: list[object]) -> None:
    done = run_cli("precompute", *words, *options)
    assert done.status == 2 and done.err[-1].startswith("error: trainer: ")


def test_precompute_compares_what_was_started_with_its_options(
    run_cli: RunCli, words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = {
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "GROUP_WORLD_SIZE": 1,
        "RANK": 0,
        "LOCAL_RANK": 0,
        "GROUP_RANK": 0,
    }
    started |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in started.items():
        monkeypatch.setenv(name, str(value))
    done = run_cli("precompute", *words, "--trainer.devices", 1)
    assert done.status == 2 and "trainer.devices" in done.err[-1]


@pytest.mark.e2e
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_precompute_on_two_ranks_makes_what_fit_on_one_finds(
    strategy: str, run_cli: RunCli, words: list[object], cache: list[object], passes: list[int], tmp_path: Path
) -> None:
    processes.run("precompute", *words, *cache, "--trainer.strategy", strategy, "--data.batch_size", 4, ranks=2)
    fit(run_cli, *words, *cache)
    assert sum(passes) == 2 * cached.SPOT_CHECKS


# An adapter's run


#: What a checkpoint of `model.lora.r 2` cannot be read with.
OTHERS: dict[str, list[object]] = {
    "another scale": ["--model.lora.r", 2, "--model.lora.alpha", 500],
    "another model": ["--model.lora.r", 2, "--model.checkpoint", "OTHER"],
    "no adapter": [],
}


@pytest.mark.parametrize("case", OTHERS)
def test_an_adapters_checkpoint_is_not_read_with_another_model_or_kind(
    case: str, run_cli: RunCli, words: list[object], tmp_path: Path
) -> None:
    fit(run_cli, *words, "--model.lora.r", 2)
    make_model(tmp_path / "other", seed=1)
    options = [tmp_path / "other" if word == "OTHER" else word for word in OTHERS[case]]
    done = run_cli("validate", *words, *options, "--ckpt_path", "last")
    assert done.status == 2 and "give model.checkpoint and model.lora what the run had" in done.err[-1]
    for precision in ("32-true", "bf16-true"):
        options = ["--model.lora.r", 2, "--trainer.precision", precision]
        done = run_cli("validate", *words, *options, "--ckpt_path", "last")
        assert done.status == 0, done.err


def test_an_adapter_is_not_exported_into_a_model_that_has_changed(
    run_cli: RunCli, words: list[object], toy: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(toy / "model", tmp_path / "model")
    fit(run_cli, *words, "--model.checkpoint", model, "--model.lora.r", 2)
    make_model(model, seed=1)
    last = versions(tmp_path / "runs")[-1] / "checkpoints" / "last.ckpt"
    done = run_cli("export", "--ckpt_path", last, "--output_dir", tmp_path / "export")
    assert done.status == 2 and "its adapter is of another model" in done.err[-1]
    assert not (tmp_path / "export").exists()


def test_a_moving_reference_saves_of_an_adapters_run_what_moves(
    run_cli: RunCli, words: list[object], tmp_path: Path
) -> None:
    moving = ["--model.lora.r", 2, "--model.reference", "MovingReference", "--model.reference.every", 2]
    words = [*words, *moving, "--model.lr_scheduler", "constant", "--trainer.precision", "64-true"]
    fit(run_cli, *words, "--trainer.default_root_dir", tmp_path / "straight")
    fit(run_cli, *words, "--trainer.max_steps", 3, "--trainer.default_root_dir", tmp_path / "parts")
    fit(run_cli, *words, "--ckpt_path", "last", "--trainer.default_root_dir", tmp_path / "parts")
    assert curves(tmp_path / "parts") == curves(tmp_path / "straight")
    state = torch.load(versions(tmp_path / "parts")[-1] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name for name in state) and any(name.startswith("reference.") for name in state)


def test_an_adapters_checkpoint_is_small_and_goes_on_to_the_same_bits(
    run_cli: RunCli, words: list[object], tmp_path: Path
) -> None:
    words = [*words, "--model.lora.r", 2, "--model.lr_scheduler", "constant", "--trainer.precision", "64-true"]
    fit(run_cli, *words, "--trainer.default_root_dir", tmp_path / "straight")
    fit(run_cli, *words, "--trainer.max_steps", 3, "--trainer.default_root_dir", tmp_path / "parts")
    fit(run_cli, *words, "--ckpt_path", "last", "--trainer.default_root_dir", tmp_path / "parts")
    [straight, parts] = [versions(tmp_path / name)[-1] for name in ("straight", "parts")]
    weights = [(run / "export" / "model.safetensors").read_bytes() for run in (straight, parts)]
    assert weights[0] == weights[1]
    state = torch.load(straight / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state and all("lora_" in name for name in state)
    last = straight / "checkpoints" / "last.ckpt"
    assert run_cli("export", "--ckpt_path", last, "--output_dir", tmp_path / "again").status == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights[0]


@pytest.mark.parametrize("how", ["fit", "export"])
def test_the_adapter_alone_is_exported_where_that_is_asked_for_and_trained_further(
    how: str, run_cli: RunCli, words: list[object], toy: Path, tmp_path: Path
) -> None:
    words = [*words, "--model.lora.r", 2, "--model.optimizer.lr", 0.05]
    fit(run_cli, *words, *(["--model.lora.merge", "false"] if how == "fit" else []))
    run = versions(tmp_path / "runs")[-1]
    alone = run / "export"
    if how == "export":
        alone = tmp_path / "alone"
        options = ("--ckpt_path", run / "checkpoints" / "last.ckpt", "--output_dir", alone, "--adapter_only", "true")
        assert run_cli("export", *options).status == 0
    names = {path.name for path in alone.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "model.safetensors" not in names
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy / "model"), alone)
    figures = curves(tmp_path / "runs")
    words = words[: words.index("--model.lora.r")]
    done = run_cli("fit", *words, "--model.checkpoint", alone, "--trainer.default_root_dir", tmp_path / "further")
    assert done.status == 0, done.err
    further = curves(tmp_path / "further")
    assert "reference: AdapterOff" in "\n".join(done.err)
    # It begins where the first run has ended, with rewards of 0 again.
    assert further["train/rewards/margins"][1][0] == pytest.approx(0, abs=1e-4)
    assert abs(figures["train/rewards/margins"][1][-1]) > 1e-2


# What cannot be


def cut(table: Path) -> None:
    (table / VALUES).write_bytes((table / VALUES).read_bytes()[:-8])


def call_it_another(table: Path) -> None:
    (table / HEADER).write_text((table / HEADER).read_text().replace("32-true", "16-true"))


def move(table: Path) -> None:
    """Other values, with all else as it should be."""
    values = np.load(table / VALUES) - np.float32(0.01)
    np.save(table / VALUES, values)
    header = json.loads((table / HEADER).read_text())
    (table / HEADER).write_text(json.dumps(header | {"checksum": xxh3_128(values.data).hexdigest()}))


#: What happened to the tables -> what the last line says.
SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "no table"),
    "foreign": (call_it_another, "precision '16-true"),
    "of another model, behind the right name": (move, "other log-probabilities for pair 0"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_table_that_does_not_fit_stops_the_run_before_its_first_step(
    case: str, run_cli: RunCli, words: list[object], cache: list[object], tmp_path: Path
) -> None:
    fit(run_cli, *words, *cache)
    change, said = SPOILED[case]
    for table in (path for path in (tmp_path / "logps").iterdir() if path.is_dir()):
        change(table)
    done = run_cli("fit", *words, *cache)
    assert done.status == 2 and said in done.err[-1] and "delete this folder" in done.err[-1]
    assert "Traceback" not in "\n".join(done.err)


STREAM = ("--data.streaming", "true", "--data.val_source", "PAIRS", "--data.val_fraction", "null")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.reference", "AdapterOff"], "model.reference is AdapterOff, but no adapter is trained"),
        (["--model.reference", "CachedLogps", "--model.reference.directory", "FILE/logps"], "cannot be written there"),
        (["--model.reference", "CachedLogps", "--model.reference.checkpoint", "gone/gone/gone"], "no such folder"),
        (["--model.lora.r", 0], "model.lora.r must be at least 1, got 0"),
        (["--model.lora.rank", 4], "model.lora.rank is given, but model.lora is LoRA, whose fields are alpha"),
        (["--model.lora.target_modules", "nothing"], "target_modules nothing"),
        ([*STREAM, "--model.reference", "CachedLogps"], "stream's are not known"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(
    options: list[object], said: str, run_cli: RunCli, words: list[object], toy: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    places = {"FILE": str(tmp_path / "file"), "PAIRS": str(toy / "pairs.jsonl")}
    options = [str(option).replace("FILE", places["FILE"]).replace("PAIRS", places["PAIRS"]) for option in options]
    done = run_cli("fit", *words, *options)
    assert done.status == 2 and said in done.err[-1], done.err
    assert done.err[-1].startswith("error: ") and "Traceback" not in "\n".join(done.err)
