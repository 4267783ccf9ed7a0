"""What policy and reference are before the first step: the same, for every loss, layout and precision.

Legend: B pairs
"""

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, MixedPrecision, Precision
from torch import nn

from dpo_lightning.data.packing import LAYOUTS, Layout, PreferenceBatch, pack
from dpo_lightning.errors import InputError
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import HALF, SINGLE, FrozenModel, MovingReference, Reference
from dpo_lightning.objective.divergences import Divergence
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.losses import BCO, IPO, SFT, Sigmoid, Sum
from dpo_lightning.objective.preference import PreferenceLoss
from dpo_lightning.training.start import check_start
from tests.families import tiny_model
from tests.objectives import concrete, make
from tests.oracles import draw_pairs, plain_logps

LN2 = math.log(2)

#: As Lightning runs a step: the weights' type, and the plugin whose context it is in.
PRECISIONS: dict[str, tuple[torch.dtype, Callable[[], Precision]]] = {
    "32-true": (torch.float32, Precision),
    "bf16-mixed": (torch.float32, lambda: MixedPrecision("bf16-mixed", "cpu")),
    "64-true": (torch.float64, DoublePrecision),
}


@cache
def policy_of(layout: Layout, precision: str) -> Policy:
    """As `load_policy` gives it: without dropout, in training mode."""
    silent = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return Policy(tiny_model("gpt2", PRECISIONS[precision][0], **silent), layout).train()


def start(loss: PreferenceLoss, reference: Reference, layout: Layout = "shared", precision: str = "32-true") -> float:
    """The check of a reference that was prepared for the policy, in the precision's own context."""
    policy = policy_of(layout, precision)
    reference.prepare(policy)
    state = {name: torch.tensor(value) for name, value in loss.initial_state.items()}
    with PRECISIONS[precision][1]().train_step_context():
        return check_start(loss, state, policy, reference, pack(draw_pairs(), layout))


#: The loss of a policy against itself, by hand, all rewards being 0: sigma(0) = 1/2.
BY_HAND: dict[str, float] = {
    "AOT": LN2,
    "AOTUnpaired": LN2,
    "APODown": 1 / 2 + 1 / 2,
    "APOZero": 1 / 2 + 1 / 2,
    "BCO": 2 * LN2,
    "DiscoPOP": LN2 / 2 + 1 / 2,
    "EXO": (math.log(0.5 / 0.999) + math.log(0.5 / 0.001)) / 2,
    "Hinge": 1,
    "IPO": 5**2,  # 1 / (2 * 0.1) is 5
    "NCA": LN2 + LN2 / 2 + LN2 / 2,
    "Robust": LN2,
    "SPPO": 5**2 + 5**2,
    "Sigmoid": LN2,
}
COMPARING = [cls for cls in concrete(PreferenceLoss) if cls is not Sum and make(cls).needs_reference]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", COMPARING)
def test_every_loss_starts_from_what_it_is_of_a_policy_against_itself(
    cls: type[PreferenceLoss], layout: Layout, precision: str
) -> None:
    assert start(cls(), FrozenModel(), layout, precision) == pytest.approx(BY_HAND[cls.__name__], rel=1e-6)


def supervised() -> float:
    """Mean over pairs of the chosen answer's mean negative log-likelihood, by plain forwards."""
    logps = plain_logps(policy_of("padded", "64-true").model, draw_pairs())
    chosen = logps[: len(logps) // 2]
    return -sum(tokens.mean().item() for tokens in chosen) / len(chosen)


OPTIONS: dict[str, tuple[PreferenceLoss, Callable[[], float]]] = {
    "MPO": (Sum((Sigmoid(), BCO(), SFT()), (0.8, 0.2, 1.0)), lambda: 0.8 * LN2 + 0.2 * 2 * LN2 + supervised()),
    "SFT term": (Sigmoid(sft_weight=0.2), lambda: LN2 + 0.2 * supervised()),
    "length-desensitised": (Sigmoid(ld_alpha=0.3), lambda: LN2),
    "a token": (Sigmoid(per_token=True), lambda: LN2),
    "smoothed": (Sigmoid(label_smoothing=0.2), lambda: LN2),
    **{cls.__name__: (Sigmoid(divergence=make(cls)), lambda: LN2) for cls in concrete(Divergence)},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_loss_and_sums_start_from_what_they_are_of_a_policy_against_itself(
    name: str, precision: str
) -> None:
    loss, by_hand = OPTIONS[name]
    rounding = {"32-true": 1e-5, "bf16-mixed": 2e-2, "64-true": 1e-9}[precision]
    for layout in LAYOUTS:
        assert start(loss, FrozenModel(), layout, precision) == pytest.approx(by_hand(), rel=rounding)


def likeliness(model: nn.Module) -> float:
    """The mean of WPO's weights (Zhou et al. 2024, eq. 2), by plain forwards."""
    weights = []
    for pair in draw_pairs():
        logs = 0.0
        for answer in (pair.chosen, pair.rejected):
            tokens = torch.tensor([*pair.prompt.tolist(), *answer.tolist()])
            scores = torch.log_softmax(model(input_ids=tokens[None]).logits[0], -1)  # [T, V]
            places = range(max(len(pair.prompt), 1), len(tokens))
            excess = [scores[i - 1, tokens[i]] - scores[i - 1].exp().square().sum().log() for i in places]
            logs += sum(excess).item() / len(excess)
        weights.append(math.exp(logs))
    return sum(weights) / len(weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weighed_loss_starts_from_ln_2_times_its_weights(layout: Layout) -> None:
    wanted = LN2 * likeliness(policy_of("padded", "64-true").model)
    assert start(Sigmoid(wpo=True), FrozenModel(), layout, "64-true") == pytest.approx(wanted, rel=1e-9)
    assert start(Sigmoid(wpo=True), FrozenModel(), layout, "bf16-mixed") == pytest.approx(wanted, rel=5e-2)


def test_a_reference_that_will_move_starts_where_the_policy_does() -> None:
    assert start(Sigmoid(), MovingReference()) == pytest.approx(LN2, rel=1e-6)


class Shifted(FrozenModel):
    """Finds every token likelier, or less so, by some nats."""

    def __init__(self, nats: float) -> None:
        super().__init__()
        self.nats = nats

    def logps(self, batch: PreferenceBatch) -> PairLogps:
        found = super().logps(batch)
        return PairLogps(found.token_logps + self.nats, found.answer, found.num_pairs, found.num_answers)


@pytest.mark.parametrize(("precision", "allowed"), [("32-true", SINGLE), ("64-true", SINGLE), ("bf16-mixed", HALF)])
@pytest.mark.parametrize("loss", [Sigmoid(), IPO(), Sum((Sigmoid(), BCO()))])
def test_what_is_allowed_is_a_rounding_a_token(loss: PreferenceLoss, precision: str, allowed: float) -> None:
    for nats in (0.8 * allowed, -0.8 * allowed):
        start(loss, Shifted(nats), precision=precision)
    for nats in (1.3 * allowed, -1.3 * allowed):
        with pytest.raises(InputError) as caught:
            start(loss, Shifted(nats), precision=precision)
        differ = f"log-probabilities differ by up to {1.3 * allowed:.2g} nats a token ({allowed:g} allowed)"
        assert differ in str(caught.value) and "no cause was found" in str(caught.value)


def test_log_probabilities_that_are_no_numbers_are_not_taken_for_noise() -> None:
    with pytest.raises(InputError, match="the reference's log-probabilities are not finite") as caught:
        start(Sigmoid(), Shifted(math.nan))
    assert "dropout" not in str(caught.value)
