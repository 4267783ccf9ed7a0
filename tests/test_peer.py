"""Agreement with the peer: TRL's DPOTrainer and this project take the same ten steps.

Both start from the same random GPT-2, read the same tokens in the same order, and step with the same AdamW, schedule
and clipping, in fp32 on the CPU without dropout. At each step every figure that both log is compared, and at the end
all weights. The peer pads, one row an answer; here the layout is the default, a row for both answers of a prompt.

What differs, and is shown to:
- A tie is half an accuracy here; the peer counts it as wrong, so that its first accuracy is 0.
- `logits/*` are means over answers of means over tokens here, over all tokens there: the same for answers of one
  length. SFT likewise.
- The peer's rewards are always beta times the plain log-ratio; here they are what the loss compares, with its
  divergence or a token. The peer's `logps/*` have the weights of `ld_alpha`, here they are log-probabilities.
- The peer's sigmoid does not read `label_smoothing`. Its BCO has no shift. Its IPO is per token, the paper's is not.
- The peer refuses a divergence with losses that are not of a difference of scores.

Legend: B pairs
"""

import gc
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.packing import PROMPT, PreferenceBatch
from dpo_lightning.errors import InputError
from dpo_lightning.models.reference import MovingReference, Reference
from dpo_lightning.objective.divergences import AlphaDivergence, ForwardKL, JensenShannon, ReverseKL
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.losses import (
    AOT,
    BCO,
    EXO,
    IPO,
    NCA,
    SFT,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    Hinge,
    Robust,
    Sigmoid,
    Sum,
)
from dpo_lightning.objective.metrics import Scored
from dpo_lightning.objective.preference import PreferenceLoss, RatioLoss, State, call
from dpo_lightning.training.curves import read_metrics
from dpo_lightning.training.module import DPOModule
from tests.toy import make_model, make_pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # the peer's own
    pytest.mark.filterwarnings(r"ignore:.*module\(s\) in eval mode at the start of training"),  # our reference
]

STEPS = 10
PAIRS = 4  # a step

#: At the default of 1e-8 a weight whose gradient is rounding alone, such as every bias of attention's keys, would move
#: as far as any other.
ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6}

#: The peer's name of a figure -> ours.
NAMES = {"learning_rate": "lr"}

#: Every figure that both log, under our names.
FIGURES = {"loss", "grad_norm", "lr"} | {
    *(f"{what}/{answer}" for what in ("rewards", "logps", "logits") for answer in ("chosen", "rejected")),
    *("rewards/accuracies", "rewards/margins"),
}
ACCURACY = "rewards/accuracies"
LOGITS = frozenset({"logits/chosen", "logits/rejected"})
REWARDS = frozenset({"rewards/chosen", "rewards/rejected", "rewards/margins", ACCURACY})

#: Largest difference of a figure, as a share of it. Rewards are beta times differences of log-probabilities of 100
#: nats, of which fp32 leaves 1e-5 nats; the mean logit is a small difference of large ones.
RELATIVE = 1e-4
FLOORS = dict.fromkeys(REWARDS, 5e-6) | dict.fromkeys(LOGITS, 1e-6)

#: Largest distance of the final weights, as a share of the way they have come; ten times what was found. They have come
#: a twentieth of their own norm, so that this is 2.5e-6 of that.
WEIGHTS = 5e-5

#: Prompt and answer of each answer of a step.
Sequences = list[tuple[list[int], list[int]]]

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Run:
    """What a run leaves: a value a step of each figure, each step's tokens, the last weights; of ours also the pairs.

    Attributes:
        rows: the source's rows in the order in which they were read.
        scored: what the figures were made of, step by step.
    """

    figures: Mapping[str, list[float]]
    tokens: list[Sequences]
    weights: Weights
    rows: list[int] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """A loss of ours and the peer's options for the same.

    Attributes:
        differing: the figures of which the two make something else, beside the accuracy of ties.
        rows: the file of pairs.
        reference: what ours is compared with; None is the model as it starts.
    """

    loss: PreferenceLoss
    options: Mapping[str, Any]
    differing: frozenset[str] = LOGITS
    rows: str = "mixed"
    reference: Callable[[], Reference | None] = lambda: None


class Unshifted(BCO):
    """BCO whose shift stays 0, which is the peer's."""

    def advance(self, state: State, means: State) -> dict[str, Tensor]:
        return {"shift": torch.zeros_like(means["shift"])}


def peer(loss_type: str, **options: Any) -> dict[str, Any]:
    return {"loss_type": [loss_type], **options}


CASES = {
    "sigmoid": Case(Sigmoid(), peer("sigmoid")),
    "hinge": Case(Hinge(), peer("hinge")),
    "ipo": Case(IPO(per_token=True), peer("ipo"), LOGITS | REWARDS),
    "exo_pair": Case(EXO(label_smoothing=1e-3), peer("exo_pair", label_smoothing=1e-3)),
    "nca_pair": Case(NCA(), peer("nca_pair")),
    "robust": Case(Robust(label_smoothing=0.2), peer("robust", label_smoothing=0.2)),
    "sppo_hard": Case(SPPO(), peer("sppo_hard")),
    "aot": Case(AOT(label_smoothing=0.2), peer("aot", label_smoothing=0.2)),
    "aot_unpaired": Case(AOTUnpaired(), peer("aot_unpaired")),
    "apo_zero": Case(APOZero(), peer("apo_zero")),
    "apo_down": Case(APODown(), peer("apo_down")),
    "discopop": Case(DiscoPOP(tau=0.2), peer("discopop", discopop_tau=0.2)),
    "sigmoid_norm": Case(Sigmoid(beta=0.2, per_token=True), peer("sigmoid_norm", beta=0.2), LOGITS | REWARDS),
    "bco_pair": Case(Unshifted(), peer("bco_pair")),
    "forward_kl": Case(
        Sigmoid(divergence=ForwardKL()), peer("sigmoid", f_divergence_type="forward_kl"), LOGITS | REWARDS - {ACCURACY}
    ),
    "js_divergence": Case(
        Sigmoid(divergence=JensenShannon()),
        peer("sigmoid", f_divergence_type="js_divergence"),
        LOGITS | REWARDS - {ACCURACY},
    ),
    "alpha_divergence": Case(  # ours is the paper's alpha, the peer's is 1 - alpha
        Hinge(divergence=AlphaDivergence(0.7)),
        peer("hinge", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3),
        LOGITS | REWARDS - {ACCURACY},
    ),
    "ld_alpha": Case(Sigmoid(ld_alpha=0.3), peer("sigmoid", ld_alpha=0.3), LOGITS | {"logps/chosen", "logps/rejected"}),
    "use_weighting": Case(Sigmoid(wpo=True), peer("sigmoid", use_weighting=True)),
    "loss_weights": Case(
        Sum((Sigmoid(), NCA()), (0.8, 0.2)), {"loss_type": ["sigmoid", "nca_pair"], "loss_weights": [0.8, 0.2]}
    ),
    "sync_ref_model": Case(
        Sigmoid(),
        peer("sigmoid", sync_ref_model=True, ref_model_mixup_alpha=0.6, ref_model_sync_steps=3),
        reference=lambda: MovingReference(alpha=0.6, every=3),
    ),
    # Where all answers have one length, means over tokens are means over answers.
    "sft": Case(SFT(), peer("sft"), frozenset(), rows="even"),
    "sigmoid_and_sft": Case(
        Sigmoid(sft_weight=0.5),
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        frozenset(),
        rows="even",
    ),
    "mixed_preference_optimisation": Case(
        Sum((Sigmoid(), Unshifted(), SFT()), (0.8, 0.2, 1.0)),
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        frozenset(),
        rows="even",
    ),
}


# The two sides


class Watched(DPOModule):
    """Keeps what it saw of each step's pairs."""

    def on_fit_start(self) -> None:
        self.batches: list[PreferenceBatch] = []
        self.scored: list[Scored] = []

    def score(self, batch: PreferenceBatch) -> Scored:
        scored = super().score(batch)
        self.batches.append(batch)
        self.scored.append(scored)
        return scored


class InOrder(DPOTrainer):
    """Takes the rows as they come, and keeps what it saw of each step."""

    def train(self) -> None:
        self.batches: list[Mapping[str, Tensor]] = []
        super().train()

    def _get_train_sampler(self, train_dataset: Dataset) -> SequentialSampler:
        return SequentialSampler(train_dataset)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.batches.append(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model without dropout, `mixed.jsonl`, half of whose labels are wrong so that accuracies vary, and `even.jsonl`,
    all of whose answers have 9 tokens with EOS.
    """
    folder = tmp_path_factory.mktemp("peer")
    make_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.update(dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0))
    model.save_pretrained(folder)
    make_pairs(folder / "mixed.jsonl", 50)
    rows = [json.loads(line) for line in (folder / "mixed.jsonl").read_text().splitlines()]
    draw = random.Random(0)
    flipped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    mixed = [draw.choice(both) for both in zip(rows, flipped, strict=True)]
    even = [row | {name: row[name][:8] for name in ("chosen", "rejected")} for row in mixed]
    for name, kept in (("mixed", mixed), ("even", even)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    gc.freeze()  # the peer collects garbage before each run, and looks at all that was ever imported
    yield folder
    gc.unfreeze()


@dataclass(frozen=True)
class Bench:
    """Runs both sides in a folder of their own."""

    folder: Path
    output: Path

    def own(
        self,
        loss: PreferenceLoss,
        rows: str = "mixed",
        reference: Reference | None = None,
        steps: int = STEPS,
        pairs: int = PAIRS,
    ) -> Run:
        """A run of this project's."""
        module = Watched(
            str(self.folder),
            loss=loss,
            reference=reference,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, weight_decay=0.0, fused=True, **ADAM),
            samples=0,
        )
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            gradient_clip_val=1.0,
            log_every_n_steps=1,
            limit_val_batches=0,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=CSVLogger(self.output),
        )
        data = PreferenceDataModule(str(self.folder / f"{rows}.jsonl"), val_fraction=0.2, batch_size=pairs)
        trainer.fit(module, datamodule=data)
        series = read_metrics(Path(trainer.logger.log_dir) / "metrics.csv")
        figures = {tag.removeprefix("train/"): values for tag, (_, values) in series.items()}
        return Run(
            {name: values for name, values in figures.items() if name in FIGURES},
            [sequences(batch) for batch in module.batches],
            module.policy.model.state_dict(),
            [row for batch in module.batches for row in batch.pair_ids.tolist()],
            module.scored,
        )

    def peer(self, options: Mapping[str, Any], rows: str, order: Sequence[int], pairs: int = PAIRS) -> Run:
        """A run of the peer's through these rows, in this order."""
        arguments = DPOConfig(
            output_dir=str(self.output / "peer"),
            max_steps=len(order) // pairs,
            per_device_train_batch_size=pairs,
            learning_rate=ADAM["lr"],
            adam_beta1=ADAM["betas"][0],
            adam_beta2=ADAM["betas"][1],
            adam_epsilon=ADAM["eps"],
            weight_decay=0.0,
            optim="adamw_torch_fused",
            lr_scheduler_type="linear",
            max_grad_norm=1.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **{"beta": 0.1, **options},
        )
        lines = (self.folder / f"{rows}.jsonl").read_text().splitlines()
        trainer = InOrder(
            AutoModelForCausalLM.from_pretrained(self.folder),
            args=arguments,
            train_dataset=Dataset.from_list([json.loads(lines[row]) for row in order]),
            processing_class=AutoTokenizer.from_pretrained(self.folder),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logged = [figures for figures in trainer.state.log_history if "loss" in figures]
        figures = {NAMES.get(name, name): [step[name] for step in logged] for name in logged[0]}
        return Run(
            {name: values for name, values in figures.items() if name in FIGURES},
            [peer_sequences(inputs) for inputs in trainer.batches],
            trainer.model.state_dict(),
        )

    def both(
        self, loss: PreferenceLoss, options: Mapping[str, Any], rows: str = "mixed", **how: Any
    ) -> tuple[Run, Run]:
        """Ours and the peer's, which have read the same tokens."""
        ours = self.own(loss, rows, **how)
        theirs = self.peer(options, rows, ours.rows, how.get("pairs", PAIRS))
        answers = 2 if loss.pairwise else 1
        for one, other in zip(ours.tokens, theirs.tokens, strict=True):
            assert 2 * len(one) == answers * len(other) and one == other[: len(one)]
        return ours, theirs

    def start(self) -> Weights:
        """The weights that both begin with."""
        return AutoModelForCausalLM.from_pretrained(self.folder).state_dict()


@pytest.fixture
def bench(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    return Bench(folder, tmp_path)


def sequences(batch: PreferenceBatch) -> Sequences:
    """Prompt and answer of each answer as our model reads them, chosen first."""
    found = []
    for answer in range(batch.num_answers):
        mine = batch.answer == answer
        tree = batch.tree.flatten()[batch.source[mine][0]]  # the prompt's last token predicts the answer's first
        prompt = batch.tokens[(batch.tree == tree) & (batch.branch == PROMPT)]
        found.append((prompt.tolist(), batch.target[mine].tolist()))
    return found


def peer_sequences(inputs: Mapping[str, Tensor]) -> Sequences:
    """The same of the peer's padded rows."""
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["completion_mask"].bool(), strict=True)
    return [(ids[seen & ~answer].tolist(), ids[seen & answer].tolist()) for ids, seen, answer in rows]


# Comparing them


def as_peer_logs(loss: PreferenceLoss, scored: Scored) -> dict[str, float]:
    """What the peer's definitions of figures make of our pairs."""
    policy, pairs = scored.policy, scored.policy.num_pairs
    logits = policy.statistics["mean_logits"]
    values = {"logits/chosen": logits[policy.answer < pairs], "logits/rejected": logits[policy.answer >= pairs]}
    if loss.implies_rewards:
        ratio = loss.losses[0] if isinstance(loss, Sum) else loss
        logps = ratio.logps(policy)  # [2 * B]
        rewards = ratio.beta * (logps - ratio.logps(scored.reference))
        margins = rewards[:pairs] - rewards[pairs:]
        values |= {
            "rewards/chosen": rewards[:pairs],
            "rewards/rejected": rewards[pairs:],
            "rewards/margins": margins,
            ACCURACY: (margins > 0).float(),
            "logps/chosen": logps[:pairs],
            "logps/rejected": logps[pairs:],
        }
    return {name: value.mean().item() for name, value in values.items()}


def disagreements(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> dict[str, list[int]]:
    """The figures in which two runs are further apart than rounding, with the steps."""
    found = {}
    for name in sorted(ours.keys() & theirs.keys()):
        both = zip(ours[name], theirs[name], strict=True)
        off = [step for step, (one, other) in enumerate(both, 1) if not close(one, other, FLOORS.get(name, 0.0))]
        found |= {name: off} if off else {}
    return found


def close(one: float, other: float, floor: float = 0.0) -> bool:
    return abs(one - other) <= RELATIVE * abs(other) + floor


def distance(one: Weights, other: Weights) -> float:
    """Of all weights together, in Euclidean norm."""
    assert one.keys() == other.keys()
    return sum((one[name].double() - other[name].double()).square().sum().item() for name in one) ** 0.5


def check_agreement(loss: PreferenceLoss, ours: Run, theirs: Run, differing: Set[str], start: Weights) -> None:
    """All figures agree but the differing ones, which do differ, and agree once made of our pairs as the peer does it.

    Ties are half an accuracy here and nothing there; only the first step has any, and all its pairs are.
    """
    shown = FIGURES if loss.implies_rewards else FIGURES - REWARDS - {"logps/rejected", "logits/rejected"}
    assert theirs.figures.keys() == FIGURES and ours.figures.keys() == shown
    found = disagreements(ours.figures, theirs.figures)
    if loss.implies_rewards and ACCURACY not in differing:
        assert found[ACCURACY] == [1] and (ours.figures[ACCURACY][0], theirs.figures[ACCURACY][0]) == (0.5, 0.0)
        differing = differing | {ACCURACY}
    assert found.keys() == differing, found
    steps = [as_peer_logs(loss, scored) for scored in ours.scored]
    assert not disagreements({name: [step[name] for step in steps] for name in differing}, theirs.figures)
    assert distance(ours.weights, theirs.weights) <= WEIGHTS * distance(theirs.weights, start)


# What agrees


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_agree(bench: Bench, name: str) -> None:
    case = CASES[name]
    ours, theirs = bench.both(case.loss, case.options, case.rows, reference=case.reference())
    assert len(ours.tokens) == STEPS
    check_agreement(case.loss, ours, theirs, case.differing, bench.start())


def test_the_comparison_sees_each_figure_and_the_weights(bench: Bench) -> None:
    """Every figure moves from step to step, and a run with a beta 1% larger is told apart in what depends on it."""
    ours, theirs = bench.both(Sigmoid(), peer("sigmoid"), "even")
    assert disagreements(ours.figures, theirs.figures).keys() == {ACCURACY}
    for name, values in theirs.figures.items():
        assert len(set(values)) > 2, name
        step = max(range(STEPS), key=lambda step: abs(values[step]))
        off = [value * (1 + 2 * RELATIVE * (at == step)) for at, value in enumerate(values)]
        assert disagreements({name: off}, theirs.figures) == {name: [step + 1]}

    other = bench.own(Sigmoid(beta=0.101), "even")
    assert disagreements(other.figures, theirs.figures).keys() >= REWARDS | {"loss", "grad_norm"}
    assert distance(other.weights, theirs.weights) > WEIGHTS * distance(theirs.weights, bench.start())


# What differs


def test_label_smoothing_is_read_here_and_not_by_the_peers_sigmoid(bench: Bench) -> None:
    """With one pair a step there is nothing to sort: the peer's AOT, which does read it, is the conservative DPO."""
    how = {"steps": 5, "pairs": 1}
    smoothed = Sigmoid(label_smoothing=0.2)
    ours, theirs = bench.both(smoothed, peer("sigmoid", label_smoothing=0.2), **how)
    plain = bench.peer(peer("sigmoid"), "mixed", ours.rows, pairs=1)
    assert theirs.figures == plain.figures and distance(theirs.weights, plain.weights) == 0
    assert "loss" in disagreements(ours.figures, theirs.figures)
    aot = bench.peer(peer("aot_unpaired", label_smoothing=0.2), "mixed", ours.rows, pairs=1)
    check_agreement(smoothed, ours, aot, frozenset(), bench.start())


def test_bco_has_a_shift_here_and_none_there(bench: Bench) -> None:
    """The shift is 0 until there was a reward, so that two steps are the same, and the third sees the same pairs."""
    ours, theirs = bench.both(BCO(decay=0.5), peer("bco_pair"), steps=3)
    differing = disagreements(ours.figures, theirs.figures)
    assert differing.keys() == LOGITS | {ACCURACY, "loss", "grad_norm"}
    assert differing["loss"] == differing["grad_norm"] == [3]
    rewards = [BCO().rewards(scored.policy, scored.reference).mean() for scored in ours.scored]
    third = ours.scored[2]
    for shift, loss in ((0.0, theirs.figures["loss"][2]), (0.5 * rewards[1], ours.figures["loss"][2])):
        # The paper's equation 12.
        chosen, rejected = BCO().rewards(third.policy, third.reference).unflatten(0, (2, -1))
        expected = -logsigmoid(chosen - shift) - logsigmoid(-(rejected - shift))
        assert close(expected.mean().item(), loss)


def test_ipo_is_of_whole_answers_here_and_per_token_there(bench: Bench) -> None:
    """Where all answers have 9 tokens, the first gradients differ in their length only, which clipping takes away."""
    ours, theirs = bench.both(IPO(), peer("ipo"), "even", steps=2)
    differing = disagreements(ours.figures, theirs.figures)
    assert differing == {ACCURACY: [1], "loss": [2], "grad_norm": [1, 2]}
    chosen, rejected = (ours.scored[1].logratios).unflatten(0, (2, -1))
    gap = chosen - rejected
    for tokens, run in ((1, ours), (9, theirs)):
        assert close((gap / tokens - 1 / (2 * 0.1)).square().mean().item(), run.figures["loss"][1])


def test_sft_is_a_mean_over_answers_here_and_over_tokens_there(bench: Bench) -> None:
    ours, theirs = bench.both(SFT(), peer("sft"), steps=1)
    assert disagreements(ours.figures, theirs.figures) == {"grad_norm": [1], "logits/chosen": [1], "loss": [1]}
    policy = ours.scored[0].policy
    assert close(-policy.token_logps.mean().item(), theirs.figures["loss"][0])
    by_hand = [-policy.token_logps[policy.answer == answer].mean().item() for answer in range(PAIRS)]
    assert close(sum(by_hand) / PAIRS, ours.figures["loss"][0])


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("nca_pair", NCA),
        ("bco_pair", Unshifted),
        ("sppo_hard", SPPO),
        ("apo_zero", APOZero),
        ("apo_down", APODown),
        ("aot_unpaired", AOTUnpaired),
    ],
)
def test_a_divergence_is_read_here_by_losses_with_which_the_peer_refuses_it(
    bench: Bench, name: str, loss: type[RatioLoss]
) -> None:
    with pytest.raises(ValueError, match="only supported for the following loss types"):
        bench.peer(peer(name, f_divergence_type="forward_kl"), "mixed", range(PAIRS))
    logps = torch.tensor([-3.0, -5.0, -4.0, -1.0])
    policy, reference = (PairLogps(values, torch.arange(4), 2, 4) for values in (logps, logps.flip(0)))
    state = {"shift": torch.tensor(0.0)}
    values = [call(loss(divergence=divergence), policy, reference, state) for divergence in (ReverseKL(), ForwardKL())]
    assert not torch.allclose(*values)


def test_both_refuse_what_cannot_be(bench: Bench) -> None:
    """AOT sorts, so that no loss is of one pair that could be weighed; AOT of pairs sorts before it compares."""
    for options in (peer("aot", use_weighting=True), peer("aot_unpaired", use_weighting=True)):
        with pytest.raises(NotImplementedError, match="misalign"):
            bench.peer(options, "mixed", range(PAIRS))
    with pytest.raises(ValueError, match="only supported for the following loss types"):
        bench.peer(peer("aot", f_divergence_type="forward_kl"), "mixed", range(PAIRS))
    for refused in (lambda: AOT(wpo=True), lambda: AOTUnpaired(wpo=True), lambda: AOT(divergence=ForwardKL())):
        with pytest.raises(InputError):
            refused()
