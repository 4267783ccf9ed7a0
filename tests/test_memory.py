"""The memory plan against arithmetic, the largest batch against all batches, and runs with and without the try.

Legend: V vocabulary  D hidden
"""

import dataclasses
import itertools
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor, nn

from dpo_lightning.data.packing import PreferenceBatch, pack
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.models.cached import CachedLogps
from dpo_lightning.models.checkpoint import load_policy
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import AdapterOff, FrozenModel, Reference
from dpo_lightning.training import cli, footprint
from dpo_lightning.training.curves import read_metrics
from dpo_lightning.training.footprint import (
    KeptForBackward,
    expected_state,
    fixed_plan,
    free_memory,
    held_by,
    is_out_of_memory,
    state_of,
    storages,
    try_batch,
    with_available,
)
from dpo_lightning.training.memory import Means, MemoryPlan
from dpo_lightning.training.memory_check import MemoryCheck
from dpo_lightning.training.module import DPOModule
from tests.conftest import RunCli
from tests.e2e import processes
from tests.oracles import draw_pairs

# What is counted

#: Of the toy's GPT-2: V = 257, D = 64, 128 positions, 2 layers; the head is tied to the embeddings.
LAYER = (3 * 64 * 64 + 3 * 64) + (64 * 64 + 64) + (4 * 64 * 64 + 4 * 64) + (4 * 64 * 64 + 64) + 2 * 2 * 64
ELEMENTS = 257 * 64 + 128 * 64 + 2 * LAYER + 2 * 64
TENSORS = 2 + 2 * 12 + 2
#: A rank-4 update of each layer's four matrices.
LORA = 2 * 4 * ((64 + 192) + (64 + 64) + (64 + 256) + (256 + 64))


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True)


def plan_of(
    policy: Policy, reference: Reference | None = None, make: Callable[..., torch.optim.Optimizer] = adam
) -> MemoryPlan:
    if reference is not None:
        reference.prepare(policy)
    return fixed_plan(policy, reference, [make([p for p in policy.parameters() if p.requires_grad])], make, policy)


def test_a_whole_model_with_a_frozen_copy(toy: Path) -> None:
    plan = plan_of(load_policy(str(toy / "model")), FrozenModel())
    assert plan.weights == plan.gradients == plan.reference == 4 * ELEMENTS
    assert plan.optimizer == plan.coming == 2 * 4 * ELEMENTS + 4 * TENSORS  # and a step count for each
    assert plan.total == plan.fixed == 5 * 4 * ELEMENTS + 4 * TENSORS
    assert plan.buckets == 0 and plan.activations is None and plan.available is None


def test_an_adapter_is_all_that_is_trained_and_its_reference_is_the_policy(toy: Path) -> None:
    plan = plan_of(load_policy(str(toy / "model"), lora=LoRA(r=4)), AdapterOff())
    assert plan.weights == 4 * (ELEMENTS + LORA)
    assert plan.gradients == 4 * LORA
    assert plan.optimizer == 2 * 4 * LORA + 4 * 16
    assert plan.reference == 0


def test_the_adapter_that_training_began_with_is_kept_for_the_reference(toy: Path, tmp_path: Path) -> None:
    load_policy(str(toy / "model"), lora=LoRA(r=4)).adapter.save(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(toy / "model")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    plan = plan_of(load_policy(str(tmp_path / "adapter")), AdapterOff())
    assert plan.weights == 4 * (ELEMENTS + LORA) and plan.gradients == plan.reference == 4 * LORA


@pytest.mark.parametrize("reference", [None, "table"])
def test_no_reference_and_a_table_take_nothing(toy: Path, tmp_path: Path, reference: str | None) -> None:
    policy = load_policy(str(toy / "model"))
    plan = plan_of(policy, None if reference is None else CachedLogps(directory=str(tmp_path)))
    assert plan.reference == 0 and plan.weights == 4 * ELEMENTS


def test_memory_that_several_tensors_share_counts_once() -> None:
    weight = torch.zeros(10, 10)
    assert sum(storages([weight, nn.Parameter(weight), weight[2:5], weight.T]).values()) == 400
    assert sum(storages([weight, weight.clone()]).values()) == 800


MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": adam,
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_the_state_that_an_optimizer_will_have_is_what_it_has_after_a_step(name: str, dtype: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in ((7, 9), (5,), (3, 2, 4))]
    expected = expected_state(parameters, MAKERS[name])
    optimizer = MAKERS[name](parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert expected == sum(storages(state_of([optimizer])).values())
    assert expected or name == "sgd"


def test_state_that_is_there_is_counted_and_not_expected_again(toy: Path) -> None:
    policy = load_policy(str(toy / "model"))
    optimizer = MAKERS["momentum"](list(policy.parameters()))
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    plan = fixed_plan(policy, None, [optimizer], MAKERS["momentum"], policy)
    assert plan.optimizer == 4 * ELEMENTS and plan.coming == 0


def test_an_optimizer_that_cannot_be_asked_is_said_to_be_unknown(toy: Path) -> None:
    plan = plan_of(load_policy(str(toy / "model")), make=torch.optim.LBFGS)  # whose step wants a closure
    assert plan.optimizer == 0
    assert "optimizer state       0.000  LBFGS, whose state is not known" in "\n".join(plan.rows())


# What there is


def machine(folder: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    return folder


MEMINFO = {"proc/meminfo": "MemTotal:  3000 kB\nMemFree:  100 kB\nMemAvailable:   2000 kB\nHugePages_Total:  0"}
SECOND = MEMINFO | {"proc/self/cgroup": "0::/box/inner"}
FIRST = MEMINFO | {"proc/self/cgroup": "5:devices:/x\n4:cpu,memory:/box\n0::/"}
STAT = {"stat": "anon 5000\ninactive_file 3000\nactive_file 1000\nshmem 9000"}

MACHINES: dict[str, tuple[dict[str, object], int | None]] = {
    "neither says": ({}, None),
    "no container": (MEMINFO, 2000 * 1024),
    "a container without a limit": (SECOND | {"sys/box/memory.max": "max", "sys/box/memory.current": 7}, 2000 * 1024),
    "a larger container": (SECOND | {"sys/box/memory.max": 10**9, "sys/box/memory.current": 7}, 2000 * 1024),
    "its own limit": (SECOND | {"sys/box/inner/memory.max": 9000, "sys/box/inner/memory.current": 8000}, 1000),
    "the limit of one around it": (SECOND | {"sys/box/memory.max": 9000, "sys/box/memory.current": 8000}, 1000),
    "files that were read": (
        SECOND | {"sys/box/memory.max": 9000, "sys/box/memory.current": 8000} | {"sys/box/memory.stat": STAT["stat"]},
        5000,
    ),
    "one without a limit in one with": (
        SECOND
        | {"sys/box/inner/memory.max": "max", "sys/box/inner/memory.current": 7}
        | {"sys/box/memory.max": 9000, "sys/box/memory.current": 8000},
        1000,
    ),
    "more than the limit": (SECOND | {"sys/box/memory.max": 9000, "sys/box/memory.current": 9500}, 0),
    "the first version": (
        FIRST
        | {"sys/memory/box/memory.limit_in_bytes": 9000, "sys/memory/box/memory.usage_in_bytes": 8000}
        | {"sys/memory/box/memory.stat": "inactive_file 1\ntotal_inactive_file 500\ntotal_active_file 0"},
        1500,
    ),
    "the first version without a limit": (
        FIRST | {"sys/memory/box/memory.limit_in_bytes": 2**63 - 4096, "sys/memory/box/memory.usage_in_bytes": 8000},
        2000 * 1024,
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_what_is_free_is_the_least_that_machine_and_containers_leave(tmp_path: Path, name: str) -> None:
    files, expected = MACHINES[name]
    machine(tmp_path, files)
    assert free_memory(tmp_path / "proc", tmp_path / "sys") == expected


CPU = torch.device("cpu")
PLAN = MemoryPlan(weights=100, gradients=100, optimizer=200, reference=50, coming=150)


def test_there_is_what_is_free_and_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "free_memory", lambda: 1000)
    assert with_available(PLAN, CPU, 1).available == 1000 + 100 + 50 + 50
    two = with_available(PLAN, CPU, 2)
    assert two.available == 500 + 100 + 50 + 50 and "each of 2 processes" in two.rows()[-1]
    assert two.room == 500 - 100 - 150  # less the gradients, and what the optimizer will take
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    assert with_available(PLAN, torch.device("cuda:0"), 2).available == 1000


def test_where_nobody_says_what_there_is_nothing_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "free_memory", lambda: None)
    for device in ("cpu", "mps"):
        plan = with_available(PLAN, torch.device(device), 1)
        assert plan.available is None and plan.room is None and not plan.is_lacking
        assert plan.rows()[-1].split() == ["there", "is", "not", "known"] and "not known" in plan.shortage()


# What is measured


def test_each_piece_of_memory_that_is_kept_for_backward_counts_once() -> None:
    weight = nn.Parameter(torch.ones(20, 30))
    states = torch.ones(10, 20)
    kept = KeptForBackward([weight, states], None)
    with kept.counting():
        hidden = (states @ weight).exp()  # keeps itself, and what it is made of
        (hidden.T * hidden.T).sum()  # the same again
        with torch.no_grad():
            (hidden * hidden).exp()
    assert kept.close() == 4 * 10 * 30
    unknown = KeptForBackward([], None)
    with unknown.counting():
        (states @ weight).exp()
    assert unknown.close() == 4 * (10 * 20 + 10 * 30)  # of the weights' gradient only the states are needed


def test_more_than_there_is_is_not_waited_for() -> None:
    weight = nn.Parameter(torch.ones(1000))
    for room, fits in ((4000, True), (3999, False)):
        kept = KeptForBackward([weight], room)
        with kept.counting():
            if fits:
                weight.exp()
                continue
            with pytest.raises(MemoryError, match=r"more than the 0\.000 GB that are left for it"):
                weight.exp()


def activations(policy: Policy, count: int) -> int:
    batch = pack(draw_pairs()[:1] * count, "padded")
    trained = list(policy.parameters())
    known = [*held_by(policy), *(value for value in vars(batch).values() if isinstance(value, Tensor))]
    plan = MemoryPlan(0, 0, 0, 0, coming=1000)
    tried = try_batch(lambda: policy.logps(batch).logps.sum(), trained, known, plan, CPU, False)
    assert tried.fault is None and all(parameter.grad is None for parameter in trained)
    return tried.activations


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(toy: Path) -> None:
    whole, again = (
        load_policy(str(toy / "model"), layout="padded", gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    one, four, eight = (activations(whole, count) for count in (1, 4, 8))
    assert eight - four == pytest.approx(4 * (four - one) / 3, rel=0.01) and four > 3 * one
    assert activations(again, 8) < eight / 3


def test_room_is_kept_for_the_state_that_the_optimizer_will_have(toy: Path) -> None:
    policy = load_policy(str(toy / "model"))
    batch = pack(draw_pairs(), policy.layout)
    for size, fits in ((1000, True), (2**60, False)):
        plan = MemoryPlan(0, 0, optimizer=size, reference=0, coming=size)
        tried = try_batch(lambda: policy.logps(batch).logps.sum(), [*policy.parameters()], [], plan, CPU, False)
        assert (tried.fault is None) == fits


# The largest batch


class Watch(Callback):
    """Writes `file`, with the rank behind its name: the tried batch and all that were trained on, as pairs and size.

    And the plan beside it. With a rank to fail on, that one has no memory.
    """

    def __init__(self, file: str, fail_on: int = -1) -> None:
        self.file = file
        self.fail_on = fail_on
        self.batches: list[tuple[list[int], int]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        forward = pl_module.policy.forward

        def watched(batch: PreferenceBatch, statistics: tuple[str, ...] = ()) -> tuple[Tensor, dict[str, Tensor]]:
            if torch.is_grad_enabled() and trainer.training:
                if trainer.global_rank == self.fail_on:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
                self.batches.append((batch.pair_ids.tolist(), batch.tokens.numel()))
            return forward(batch, statistics)

        pl_module.policy.forward = watched

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del pl_module.policy.forward
        Path(f"{self.file}.{trainer.global_rank}").write_text(json.dumps(self.batches))
        [check] = [callback for callback in trainer.callbacks if isinstance(callback, MemoryCheck)]
        Path(f"{self.file}.{trainer.global_rank}.plan").write_text(json.dumps(dataclasses.asdict(check.plan)))


@pytest.fixture
def words(toy: Path, toy_words: list[str], tmp_path: Path) -> list[object]:
    """A small run without pictures and samples, of pairs of very different lengths."""
    rows = [json.loads(line) for line in (toy / "pairs.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["prompt"] += " Please!" * (number * 7 % 9)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = toy_words.index("--data.source")
    source = ["--data.source", tmp_path / "pairs.jsonl", "--data.truncation", "keep_end", "--model.samples", 0]
    return [*toy_words[:place], *source, *toy_words[place + 2 :]]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cli, "draw_curves", lambda *_: None)
    yield


def watching(file: Path, fail_on: int = -1) -> list[object]:
    words = [f"--trainer.callbacks+={__name__}.Watch", f"--trainer.callbacks.file={file}"]
    return [*words, f"--trainer.callbacks.fail_on={fail_on}"]


SHORT: dict[str, list[object]] = {
    "an epoch": [],
    "accumulated": ["--trainer.accumulate_grad_batches", 2],
    "a part of an epoch": ["--trainer.limit_train_batches", 4],
    "a few steps": ["--trainer.max_steps", 2, "--trainer.accumulate_grad_batches", 2],
    "three epochs": ["--trainer.max_epochs", 3],
    "an epoch and a half": ["--trainer.max_epochs", 3, "--trainer.max_steps", 18],
    "one batch": ["--trainer.fast_dev_run", "true"],
}


#: Micro-batches that are trained on, where these are not 4.
COUNTS = {"an epoch": 12, "accumulated": 12, "three epochs": 36, "an epoch and a half": 18, "one batch": 1}


@pytest.mark.parametrize(
    ("layout", "case"),
    [("shared", case) for case in SHORT] + [("packed", "an epoch"), ("padded", "an epoch")],
)
def test_the_batch_that_is_tried_is_the_largest_that_is_trained_on(
    run_cli: RunCli, words: list[object], tmp_path: Path, layout: str, case: str
) -> None:
    done = run_cli("fit", *words, *SHORT[case], "--data.layout", layout, *watching(tmp_path / "batches"))
    assert done.status == 0, done.err
    (tried, size), *trained = json.loads((tmp_path / "batches.0").read_text())
    assert len(trained) == COUNTS.get(case, 4)
    assert [tried, size] in trained and size == max(size for _, size in trained)
    assert len(tried) == 4 and "largest batch         0.00" in "".join(done.err)
    assert f"4 pairs, {size:,} tokens" in "\n".join(done.err)
    if case == "an epoch":
        assert [tried, size] != trained[0]


@pytest.mark.e2e
def test_each_rank_tries_its_own_and_counts_what_it_holds(words: list[object], tmp_path: Path) -> None:
    whole = {"weights": 4 * ELEMENTS, "gradients": 4 * ELEMENTS, "reference": 4 * ELEMENTS}
    whole |= {"optimizer": 2 * 4 * ELEMENTS + 4 * TENSORS}
    kept = []
    for strategy, share, rounding in (("ddp", 1, 0), ("fsdp", 1 / 2, 0.02)):
        watch = watching(tmp_path / strategy)
        processes.run("fit", *words, "--trainer.strategy", strategy, *watch, ranks=2)
        batches, plans = (
            [json.loads((tmp_path / f"{strategy}.{rank}{end}").read_text()) for rank in (0, 1)] for end in ("", ".plan")
        )
        for (tried, size), *trained in batches:
            assert [tried, size] in trained and size == max(size for _, size in trained)
        assert batches[0][0] != batches[1][0]
        for name, size in whole.items():
            assert [plan[name] for plan in plans] == pytest.approx([share * size] * 2, rel=rounding), name
        assert [plan["buckets"] for plan in plans] == [4 * ELEMENTS if strategy == "ddp" else 0] * 2
        kept.append([plan["activations"] for plan in plans])
    assert kept[0] == kept[1] != [0, 0]  # weights that were gathered for a while are no activations


def test_of_a_stream_the_first_batch_is_tried_and_its_lengths_are_said_to_be_unknown(
    run_cli: RunCli, words: list[object], tmp_path: Path
) -> None:
    place = words.index("--data.val_fraction")
    words = [*words[:place], *words[place + 2 :], "--data.streaming", "true", "--trainer.max_steps", 2]
    done = run_cli("fit", *words, "--data.val_source", tmp_path / "pairs.jsonl", "--data.shuffle_buffer", 8)
    assert done.status == 0, done.err
    assert "tokens: the first, lengths of a stream are not known" in "\n".join(done.err)


def test_a_run_that_goes_on_tries_again_among_what_it_will_train_on(
    run_cli: RunCli, words: list[object], tmp_path: Path
) -> None:
    """Not what it has trained on before, nor what comes after its end, where there are larger ones each."""
    assert run_cli("fit", *words, *watching(tmp_path / "all")).status == 0
    sizes = [size for _, size in json.loads((tmp_path / "all.0").read_text())[1:]]
    stop, end = next(
        (stop, end)
        for stop, end in itertools.combinations(range(1, 12), 2)
        if max(sizes[stop:end]) < min(max(sizes[:stop]), max(sizes[end : stop + end]))
    )
    words = [*words, "--trainer.default_root_dir", tmp_path / "again"]
    assert run_cli("fit", *words, "--trainer.max_steps", stop, *watching(tmp_path / "first")).status == 0
    resume = ["--trainer.max_steps", end, "--ckpt_path", "last"]
    done = run_cli("fit", *words, *resume, *watching(tmp_path / "second"))
    assert done.status == 0, done.err
    tried, *trained = json.loads((tmp_path / "second.0").read_text())
    assert len(trained) == end - stop and tried in trained and tried[1] == max(size for _, size in trained)


# What is left of it


def outcome(root: Path) -> tuple[dict[str, bytes], dict[str, object], object]:
    """The exported weights, and every figure but those of speed; and the optimizer's state."""
    (run,) = root.glob("version_*")
    weights = {name: value.numpy().tobytes() for name, value in load_file(run / "export/model.safetensors").items()}
    figures = {name: series for name, series in read_metrics(run / "metrics.csv").items() if "per_second" not in name}
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    kept = json.dumps([state["random_states"], state["optimizer_states"], state.get("MixedPrecision")], default=as_text)
    return weights, figures, kept


MOVING = ["--model.reference", "MovingReference", "--model.reference.every", 2]


def as_text(value: object) -> str:
    return str(value.flatten().tolist()) if isinstance(value, Tensor) else str(value)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--trainer.accumulate_grad_batches", 2, "--model.gradient_checkpointing", "true"],
        ["--model.lora.r", 4, "--model.lora.dropout", 0.3],  # which draws random numbers
        ["--trainer.precision", "bf16-mixed", "--model.loss", "BCO", *MOVING],
        ["--trainer.plugins+=tests.e2e.scaled.ScaledHalf"],
        ["--trainer.precision", "64-true", "--model.loss", "SimPO"],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_a_run_is_to_the_bit_what_it_is_without_the_try(
    run_cli: RunCli, words: list[object], tmp_path: Path, options: list[object]
) -> None:
    found = []
    for tried in ("true", "false"):
        root = tmp_path / tried
        done = run_cli("fit", *words, *options, "--trainer.default_root_dir", root, "--model.try_longest", tried)
        assert done.status == 0, done.err
        assert ("largest batch" in "".join(done.err)) == (tried == "true")
        found.append(outcome(root))
    assert found[0] == found[1]


@pytest.mark.e2e
@pytest.mark.parametrize(
    "strategy",
    [
        ["--trainer.strategy", "ddp"],
        ["--trainer.strategy", "DDPStrategy", "--trainer.strategy.static_graph", "true"],
        ["--trainer.strategy", "ddp_find_unused_parameters_true", "--trainer.accumulate_grad_batches", 2],
        ["--trainer.strategy", "fsdp", "--trainer.accumulate_grad_batches", 2],
    ],
    ids=lambda strategy: " ".join(map(str, strategy)),
)
def test_two_ranks_are_to_the_bit_what_they_are_without_the_try(
    words: list[object], tmp_path: Path, strategy: list[object]
) -> None:
    found = []
    for tried in ("true", "false"):
        root = tmp_path / tried
        options = [*strategy, "--trainer.default_root_dir", root, "--model.try_longest", tried]
        processes.run("fit", *words, *options, ranks=2)
        found.append(outcome(root))
    assert found[0] == found[1]


# What does not fit


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let every forward with a gradient end so."""
    forward = Policy.forward

    def failing(self: Policy, batch: PreferenceBatch, statistics: tuple[str, ...] = ()) -> object:
        if torch.is_grad_enabled():
            raise error
        return forward(self, batch, statistics)

    monkeypatch.setattr(Policy, "forward", failing)


def assert_refused(done: SimpleNamespace, root: Path) -> str:
    text = "\n".join([done.out, *done.err])
    assert done.status == 2 and done.err[-1].startswith("error: "), text
    assert "Traceback" not in text and not list(root.glob("version_*"))
    return done.err[-1]


ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has " + "very little " * 40),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:40])
def test_a_lack_of_memory_ends_the_run_before_its_first_step_with_advice(
    run_cli: RunCli, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail(monkeypatch, error)
    said = assert_refused(run_cli("fit", *words), tmp_path / "runs")
    assert "the largest batch (4 pairs, " in said and "was tried before the first step and does not fit" in said
    assert (str(error) or "MemoryError")[:60] in said and len(said) < 1200
    assert "weights 0.000 GB, gradients 0.000 GB, optimizer state 0.001 GB, reference 0.000 GB" in said
    assert "lower data.batch_size to 2 and raise trainer.accumulate_grad_batches to 2 for the same steps" in said


def test_another_error_of_the_step_is_none_of_memory(
    run_cli: RunCli, words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, RuntimeError("expected scalar type"))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        run_cli("fit", *words)
    assert not is_out_of_memory(RuntimeError("expected scalar type"))


def test_a_lack_of_memory_later_in_a_run_ends_with_the_same_advice(
    run_cli: RunCli, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = DPOModule.training_step

    def failing(self: DPOModule, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DPOModule, "training_step", failing)
    said = assert_refused(run_cli("fit", *words), tmp_path / "runs")
    assert "out of memory at optimizer step 3: CUDA out of memory; " in said and "largest batch 0.00" in said
    assert "lower data.batch_size to 2" in said


class Limit(Callback):
    """From the fit's start on the process may have `size` bytes more than it has then."""

    def __init__(self, size: int) -> None:
        self.size = size

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + self.size
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


@pytest.mark.e2e
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="not a Linux")
def test_an_allocator_that_has_no_more_ends_the_run_with_advice(words: list[object], tmp_path: Path) -> None:
    lines = (tmp_path / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(lines * 10)
    limit = [f"--trainer.callbacks+={__name__}.Limit", f"--trainer.callbacks.size={100 * 2**20}"]
    words = [*words, "--data.batch_size", 450, *limit]
    done = processes.run("fit", *words, "--trainer.num_sanity_val_steps", 0, expected=2)
    said = done.output.strip().splitlines()[-1]
    # Here or there, as the allocator has it: in the check of policy and reference, or when the largest batch is tried.
    assert said.startswith(("error: the largest batch (4", "error: out of memory at optimizer step 1: ")), done.output
    assert "allocate memory" in said and "lower data.batch_size to" in said, done.output
    assert "Traceback" not in done.output and not list((tmp_path / "runs").glob("version_*"))


@pytest.mark.e2e
def test_a_lack_of_memory_on_one_rank_ends_both(words: list[object], tmp_path: Path) -> None:
    done = processes.run("fit", *words, *watching(tmp_path / "batches", fail_on=1), ranks=2, expected=2)
    assert done.statuses == (2, 2) and "Traceback" not in done.output
    assert done.output.count("error: the largest batch of another rank does not fit; ") == 1
    assert done.output.count("does not fit: CUDA out of memory") == 1
    assert not list((tmp_path / "runs").glob("version_*"))


@pytest.mark.e2e
def test_a_rank_of_shards_without_memory_says_so_and_waits_for_nobody(words: list[object], tmp_path: Path) -> None:
    options = ["--trainer.strategy", "fsdp", *watching(tmp_path / "batches", fail_on=0)]
    done = processes.run("fit", *words, *options, ranks=2, expected=2)
    assert done.statuses[0] == 2 and done.statuses[1] not in (0, None, -9)
    assert done.output.count("does not fit: CUDA out of memory") == 1


def test_on_a_cpu_more_than_there_is_ends_the_run_and_is_warned_of(
    run_cli: RunCli, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system would end the process without a word."""
    monkeypatch.setattr(footprint, "free_memory", lambda: 3 * 4 * ELEMENTS + 4 * TENSORS + 10_000)
    done = run_cli("fit", *words)
    said = assert_refused(done, tmp_path / "runs")
    assert "does not fit: it keeps more than the 0.000 GB that are left for it; at least 0.003 GB are needed" in said
    assert not any("Warning: memory: " in line for line in done.err)
    monkeypatch.setattr(footprint, "free_memory", lambda: 4 * ELEMENTS)
    done = run_cli("fit", *words, "--model.try_longest", "false")
    assert done.status == 0
    (warning,) = (line for line in done.err if "Warning: memory: " in line)
    assert "are needed (" in warning and "there is 0.001 GB; train an adapter, model.lora.r 16 (about " in warning


# What would help

ALL = ("data.batch_size", "data.max_length", "gradient_checkpointing", "CachedLogps", "lora", "bf16-mixed", "fsdp")


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ([], ()),
        (["--model.lora.r", 4], ("CachedLogps", "lora")),
        (["--model.reference", "CachedLogps"], ("CachedLogps",)),
        (MOVING, ("CachedLogps",)),
        (["--model.loss", "SimPO"], ("CachedLogps",)),
        (["--model.gradient_checkpointing", "true"], ("gradient_checkpointing",)),
        (["--trainer.precision", "bf16-mixed"], ("bf16-mixed",)),
        (["--data.batch_size", 1], ("data.batch_size",)),
        (["--model.loss", "AOT"], ("accumulate_grad_batches",)),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_advice_names_what_is_not_in_use_yet(
    run_cli: RunCli, words: list[object], monkeypatch: pytest.MonkeyPatch, options: list[object], missing: tuple[str]
) -> None:
    fail(monkeypatch, MemoryError())
    monkeypatch.setenv("HF_DATASETS_CACHE", "")
    said = run_cli("fit", *words, *options).err[-1]
    advice = said.partition("there is")[2]
    assert advice.startswith(" ") and "does not fit" in said
    expected = {*ALL, "accumulate_grad_batches"} - {"fsdp", *missing}  # devices of one machine share its memory
    if "data.batch_size" in missing:
        expected.remove("accumulate_grad_batches")
    assert {name for name in (*ALL, "accumulate_grad_batches") if name in advice} == expected


FULL = Means(8, 3, pairs=8, longest=812, layers=10, adapter=True, table=True, copy=True, half=True, devices=4)
GIGA = 10**9
BIG = MemoryPlan(weights=10 * GIGA, gradients=10 * GIGA, optimizer=20 * GIGA, reference=10 * GIGA)


def test_advice_has_the_numbers_of_the_plan_and_what_helps_most_first() -> None:
    said = FULL.advice(dataclasses.replace(BIG, activations=100 * GIGA)).split("; or ")
    assert said == [
        "set model.gradient_checkpointing true (about 90.000 GB less)",
        "lower data.batch_size to 4 and raise trainer.accumulate_grad_batches to 6 for the same steps "
        "(about 50.000 GB less)",
        "set trainer.precision bf16-mixed (about 50.000 GB less)",
        "train an adapter, model.lora.r 16 (about 40.000 GB less)",
        "set trainer.strategy fsdp, on 4 devices (about 37.500 GB less)",
        "lower data.max_length below 812, the longest sequence of that batch",
        "set model.reference CachedLogps (about 10.000 GB less)",
    ]
    few = FULL.advice(dataclasses.replace(BIG, activations=GIGA)).split("; or ")
    assert few[0].startswith("train an adapter") and few[2].startswith("set model.reference CachedLogps")


@pytest.mark.parametrize(("batch_size", "pairs"), [*itertools.combinations_with_replacement((6, 7, 9, 12, 16), 2)])
def test_a_smaller_batch_keeps_the_steps_as_they_are(batch_size: int, pairs: int) -> None:
    batch_size, pairs = max(batch_size, pairs), min(batch_size, pairs)
    means = dataclasses.replace(FULL, batch_size=batch_size, pairs=pairs)
    words = means.advice(BIG).partition("data.batch_size to ")[2].split()
    size, micro = int(words[0]), int(words[5])
    assert size < pairs and size * micro == batch_size * 3


def test_where_all_is_in_use_a_larger_device_is_left() -> None:
    none = Means(1, 1, 1, 2, 0, adapter=False, table=False, copy=False, half=False, devices=0)
    assert none.advice(BIG) == "take a smaller model or a larger device"


def test_the_peak_counts_where_it_is_more_than_the_plan() -> None:
    plan = dataclasses.replace(BIG, available=60 * GIGA).after(5 * GIGA, 61 * GIGA, "8 pairs, 900 tokens")
    assert plan.total == 61 * GIGA and plan.is_lacking
    assert [line.split()[:2] for line in plan.last_rows()] == [
        ["largest", "batch"],
        ["peak,", "measured"],
        ["total", "61.000"],
    ]
    assert not dataclasses.replace(plan, peak=54 * GIGA).is_lacking
    assert dataclasses.replace(plan, peak=54 * GIGA).total == 55 * GIGA
