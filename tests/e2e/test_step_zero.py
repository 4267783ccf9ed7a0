"""A run whose policy and reference differ stops before its first step and names the cause; no other is stopped."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lightning.data.packing import PreferenceBatch
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import FrozenModel, Reference
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.training import cli
from dpo_lightning.training.module import DPOModule
from tests.conftest import RunCli
from tests.toy import make_model

AGREE = "Step 0: policy and reference agree"

# What is caught, where it happens


class Adapted(nn.Module):
    """A layer with a low-rank term beside it that is not 0: an adapter that nobody has turned off."""

    def __init__(self, base: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        size = base.weight.shape  # of a Conv1D: [in, out]
        draw = torch.Generator().manual_seed(0)
        self.down, self.up = (
            nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((size[0], rank), (rank, size[1]))
        )

    def forward(self, states: Tensor) -> Tensor:
        return self.base(states) + 0.1 * states @ self.down @ self.up


@torch.no_grad()
def change_weights(policy: Policy, size: float = 0.1) -> None:
    weight = policy.model.transformer.h[0].mlp.c_fc.weight
    weight += size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


def leave_dropout_on(policy: Policy) -> None:
    for module in policy.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3


def leave_adapter_on(policy: Policy) -> None:
    layer = policy.model.transformer.h[1].mlp
    layer.c_fc = Adapted(layer.c_fc).requires_grad_(False)


def read_another_layout(reference: FrozenModel, policy: Policy) -> None:
    reference.model = Policy(copy.deepcopy(policy.model), "padded").requires_grad_(False).eval()


#: fault -> what happens to reference and policy once both are loaded, and what the message says of it
FAULTS: dict[str, tuple[Callable[[FrozenModel, Policy], object], tuple[str, ...]]] = {
    "another reference": (
        lambda reference, policy: change_weights(reference.model),
        ("1 of the reference's 28 tensors", "transformer.h.0.mlp.c_fc.weight", "it is another model"),
    ),
    "hardly another reference": (  # what half precision would hide
        lambda reference, policy: change_weights(reference.model, 1e-4),
        ("1 of the reference's 28 tensors", "transformer.h.0.mlp.c_fc.weight", "it is another model"),
    ),
    "another policy": (
        lambda reference, policy: change_weights(policy),
        ("1 of the reference's 28 tensors", "transformer.h.0.mlp.c_fc.weight", "changed since it was loaded"),
    ),
    "another type": (
        lambda reference, policy: reference.bfloat16(),
        ("the reference is in torch.bfloat16, the policy in torch.float32",),
    ),
    "dropout in the policy": (
        lambda reference, policy: leave_dropout_on(policy),
        ("the policy differs from one forward to the next", "dropout"),
    ),
    "dropout in the reference": (
        lambda reference, policy: leave_dropout_on(reference.model),
        ("the reference differs from one forward to the next", "dropout"),
    ),
    "another layout": (read_another_layout, ("the reference reads the layout padded, the policy shared",)),
    "an adapter": (
        lambda reference, policy: leave_adapter_on(reference.model),
        ("tensors that the other has not", "transformer.h.1.mlp.c_fc.base.bias"),
    ),
}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The optimizer steps that any run of this test has begun."""
    begun: list[int] = []
    step = DPOModule.optimizer_step

    def counted(self: DPOModule, *args: object, **kwargs: object) -> None:
        begun.append(self.trainer.global_step)
        step(self, *args, **kwargs)

    monkeypatch.setattr(DPOModule, "optimizer_step", counted)
    return begun


@pytest.fixture
def short(toy_words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Options of a run of one step, without validation; and no picture, which would take most of its time."""
    monkeypatch.setattr(cli, "draw_curves", lambda *_: None)
    return [*toy_words, "--trainer.max_steps", 1, "--trainer.limit_val_batches", 0, "--model.samples", 0]


def said(done: SimpleNamespace) -> str:
    return "\n".join([done.out, *done.err])


@pytest.mark.parametrize(
    ("fault", "precision"),
    [
        *((fault, "32-true") for fault in FAULTS),
        *((fault, "bf16-mixed") for fault in ("another reference", "hardly another reference", "another type")),
        ("another policy", "64-true"),
    ],
)
def test_a_fault_is_named_before_the_first_step(
    run_cli: RunCli,
    short: list[object],
    steps: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    precision: str,
) -> None:
    inject, named = FAULTS[fault]
    prepare = FrozenModel.prepare

    def spoiled(self: FrozenModel, policy: Policy) -> None:
        prepare(self, policy)
        inject(self, policy)

    monkeypatch.setattr(FrozenModel, "prepare", spoiled)
    done = run_cli("fit", *short, "--trainer.precision", precision)
    assert done.status == 2 and not steps
    if fault == "another layout":  # it cannot even score a batch of rows that are longer than the model's context
        assert "the reference cannot score a batch (" in done.err[-1]
        assert done.err[-1].startswith("error: before the first step policy and reference differ: the reference reads")
    else:
        assert done.err[-1].startswith("error: before the first step policy and reference differ: the loss is ")
        assert "should be 0.693147" in done.err[-1]
    for text in (*named, "mend the cause"):
        assert text in done.err[-1]
    assert "Traceback" not in said(done) and not list((tmp_path / "runs").glob("version_*"))


class Table(Reference):
    """Log-probabilities from a file, as somebody has computed them once.

    Args:
        file: row -> log-probabilities of the chosen and of the rejected answer's tokens, and what they are of: ids of
            the tokens, and weights.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        self.table = torch.load(file, weights_only=True)
        self.other_tokens = False

    def prepare(self, policy: Policy) -> None:
        """Nothing to do."""

    def differences(self, policy: Policy) -> list[str]:
        weights = policy.model.get_input_embeddings().weight
        found = [] if torch.equal(self.table["weights"], weights) else ["the table is of other weights"]
        return [*found, *(["the table is of other tokens"] if self.other_tokens else [])]

    def logps(self, batch: PreferenceBatch) -> PairLogps:
        places = [(row, side) for side in (0, 1) for row in batch.pair_ids.tolist()]
        tokens, ids = (torch.cat([self.table[name][row][side] for row, side in places]) for name in ("logps", "ids"))
        self.other_tokens = not torch.equal(ids, batch.target)
        return PairLogps(tokens, batch.answer, batch.num_pairs, batch.num_answers)

    def generate(self, *args: object) -> list:
        raise NotImplementedError("a table samples nothing")


def write_table(file: Path, model: Path, pairs: Path, told: Callable[[str], str]) -> None:
    """One plain forward for each answer of `pairs`, as `told`."""
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    logps: dict[int, list[Tensor]] = {}
    ids: dict[int, list[Tensor]] = {}
    for row, pair in enumerate(map(json.loads, pairs.read_text().splitlines())):
        prompt = tokenizer(pair["prompt"]).input_ids
        for side in ("chosen", "rejected"):
            answer = [*tokenizer(told(pair[side])).input_ids, tokenizer.eos_token_id]
            tokens = torch.tensor([*prompt, *answer])
            with torch.no_grad():
                scores = torch.log_softmax(policy(input_ids=tokens[None]).logits[0], -1)[len(prompt) - 1 : -1]
            ids.setdefault(row, []).append(torch.tensor(answer))
            logps.setdefault(row, []).append(scores.gather(-1, torch.tensor(answer)[:, None]).squeeze(-1))
    torch.save({"logps": logps, "ids": ids, "weights": policy.get_input_embeddings().weight.detach()}, file)


@pytest.mark.parametrize(
    ("seed", "told", "named"),
    [
        (0, str, None),
        (1, str, "the table is of other weights"),
        (0, str.upper, "the table is of other tokens"),
    ],
    ids=["fresh", "other weights", "other tokens"],
)
def test_a_table_of_log_probabilities_must_be_of_these_weights_and_tokens(
    run_cli: RunCli,
    toy: Path,
    short: list[object],
    steps: list[int],
    tmp_path: Path,
    seed: int,
    told: Callable[[str], str],
    named: str | None,
) -> None:
    make_model(tmp_path / "model", seed)
    write_table(tmp_path / "table.pt", tmp_path / "model", toy / "pairs.jsonl", told)
    done = run_cli(
        "fit", *short, "--model.reference", f"{__name__}.Table", "--model.reference.file", tmp_path / "table.pt"
    )
    if named is None:
        assert done.status == 0 and steps == [0] and AGREE in said(done), done.err
    else:
        assert done.status == 2 and not steps and named in done.err[-1], done.err


# What is not stopped


MPO = "[{class_path: Sigmoid}, {class_path: BCO}, {class_path: SFT}]"


@pytest.mark.parametrize(
    ("layout", "precision", "loss"),
    [
        ("shared", "32-true", ["--model.loss", "Sum", "--model.loss.losses", MPO]),
        ("packed", "bf16-mixed", ["--model.loss.wpo", "true", "--model.loss.sft_weight", 0.1]),
        ("padded", "64-true", ["--model.loss", "AOT"]),
        ("shared", "bf16-true", ["--model.loss", "IPO"]),
    ],
)
def test_a_healthy_run_says_that_it_starts_from_its_reference_and_goes_on(
    run_cli: RunCli, short: list[object], steps: list[int], layout: str, precision: str, loss: list[object]
) -> None:
    done = run_cli("fit", *short, *loss, "--data.layout", layout, "--trainer.precision", precision)
    assert done.status == 0, done.err
    assert said(done).count(AGREE) == 1 and steps == [0]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--model.loss", "SFT"], "not checked, since SFT has no reference"),
        (["--model.loss", "SimPO"], "not checked, since SimPO has no reference"),
        (["--model.loss.reference_free", "true"], "not checked, since Sigmoid has no reference"),
    ],
)
def test_a_loss_without_a_reference_is_not_checked_and_says_why(
    run_cli: RunCli, short: list[object], steps: list[int], options: list[object], line: str
) -> None:
    done = run_cli("fit", *short, *options)
    assert done.status == 0 and steps == [0], done.err
    assert f"Step 0: {line}" in said(done) and AGREE not in said(done)


def test_a_reference_declared_to_be_another_model_is_not_checked_and_says_why(
    run_cli: RunCli, short: list[object], steps: list[int], tmp_path: Path
) -> None:
    make_model(tmp_path / "other", seed=1)
    words = ["--model.reference", "FrozenModel", "--model.reference.checkpoint", tmp_path / "other"]
    done = run_cli("fit", *short, *words)
    assert done.status == 0 and steps == [0], done.err
    assert "Step 0: not checked, since the reference is declared to be another model" in said(done)


def test_a_run_that_goes_on_has_left_its_reference_and_says_why_it_is_not_checked(
    run_cli: RunCli, short: list[object], steps: list[int]
) -> None:
    first = run_cli("fit", *short)
    assert first.status == 0 and AGREE in said(first)
    done = run_cli("fit", *short, "--trainer.max_steps", 2, "--ckpt_path", "last")
    assert done.status == 0 and steps == [0, 1], done.err
    assert "Step 0: not checked, since this run goes on from a checkpoint" in said(done) and AGREE not in said(done)


def test_a_reference_that_is_named_as_the_policys_own_checkpoint_is_checked(
    run_cli: RunCli, toy: Path, short: list[object]
) -> None:
    words = ["--model.reference", "FrozenModel", "--model.reference.checkpoint", toy / "model"]
    done = run_cli("fit", *short, *words)
    assert done.status == 0 and AGREE in said(done), done.err


def test_a_reference_that_would_never_move_is_refused(run_cli: RunCli, short: list[object], steps: list[int]) -> None:
    done = run_cli("fit", *short, "--model.reference", "MovingReference", "--model.reference.every", 2)
    assert done.status == 2 and not steps
    assert "MovingReference.every is 2, but the run has 1 optimizer steps" in done.err[-1]


def test_a_checkpoint_without_what_a_loss_or_a_reference_remembers_is_refused(
    run_cli: RunCli, short: list[object], toy_words: list[str]
) -> None:
    assert run_cli("fit", *short).status == 0
    for words, named in (
        (["--model.loss", "BCO"], "remembers no shift"),
        (["--model.reference", "MovingReference"], "reference.model"),
    ):
        done = run_cli("validate", *toy_words, *words, "--ckpt_path", "last")
        assert done.status == 2 and named in done.err[-1], done.err


def test_a_field_of_a_divergence_that_is_replaced_later_is_not_dropped_in_silence(
    run_cli: RunCli, short: list[object], tmp_path: Path
) -> None:
    loss = "{class_path: Sigmoid, init_args: {divergence: {class_path: AlphaDivergence, init_args: {alpha: 0.3}}}}"
    (tmp_path / "alpha.yaml").write_text(f"model:\n  loss: {loss}\n")
    config = ["--config", tmp_path / "alpha.yaml"]
    assert run_cli("fit", *config, *short).status == 0
    done = run_cli("fit", *config, *short, "--model.loss.divergence", "ForwardKL")
    assert done.status == 2 and "model.loss.divergence.alpha is given" in done.err[-1], done.err


def test_a_ledger_of_no_validation_is_refused(run_cli: RunCli, short: list[object]) -> None:
    done = run_cli("fit", *short, "--model.pair_ledger", "true")
    assert done.status == 2 and "limit_val_batches is 0" in done.err[-1]
