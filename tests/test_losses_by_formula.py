"""Every loss against its paper's formula, written out with `math` for one pair at a time.

In the formulas c and r are what a loss sees of the chosen and of the rejected answer: f' of policy / reference.

Legend: B pairs
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from dpo_lightning.objective.divergences import AlphaDivergence, Divergence, ForwardKL, JensenShannon, ReverseKL
from dpo_lightning.objective.likelihoods import LikelihoodLoss
from dpo_lightning.objective.losses import (
    AOT,
    BCO,
    CPO,
    EXO,
    IPO,
    NCA,
    ORPO,
    SFT,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    Hinge,
    Robust,
    Sigmoid,
    SimPO,
    Sum,
)
from dpo_lightning.objective.preference import PreferenceLoss, RatioLoss
from tests.objectives import Drawn, answers, concrete, draw, log_sigma, mean, run, sigma

SEEDS = (0, 1, 2)
SHIFT = 0.7  # BCO's state


def discopop(z: float, tau: float) -> float:
    """Lu et al. 2024, eq. 5, with f(z) = log(1 + exp(-z)) for the logistic part."""
    blend = 1 / (1 + math.exp(-z / tau))
    return (1 - blend) * math.log(1 + math.exp(-z)) + blend * math.exp(-z)


def exo(z: float, eps: float) -> float:
    """KL(p, q), sum over both labels."""
    odds, labels = (sigma(z), sigma(-z)), (1 - eps, eps)
    return sum(p * math.log(p / q) for p, q in zip(odds, labels, strict=True))


def robust(z: float, eps: float) -> float:
    return (-(1 - eps) * log_sigma(z) + eps * log_sigma(-z)) / (1 - 2 * eps)


Formula = Callable[[float, float], float]

RATIO_LOSSES: list[tuple[RatioLoss, Formula]] = [
    (Sigmoid(0.3), lambda c, r: -log_sigma(0.3 * c - 0.3 * r)),
    (Sigmoid(0.3, 0.2), lambda c, r: -0.8 * log_sigma(0.3 * (c - r)) - 0.2 * log_sigma(0.3 * (r - c))),
    (Robust(0.6, 0.2), lambda c, r: robust(0.6 * (c - r), 0.2)),
    (Hinge(0.2), lambda c, r: max(0.0, 1 - (0.2 * c - 0.2 * r))),
    (IPO(0.25), lambda c, r: ((c - r) - 2) ** 2),
    (EXO(0.4, 0.05), lambda c, r: exo(0.4 * (c - r), 0.05)),
    (NCA(0.3), lambda c, r: -log_sigma(0.3 * c) - 0.5 * (log_sigma(-0.3 * c) + log_sigma(-0.3 * r))),
    (BCO(0.3), lambda c, r: -log_sigma(0.3 * c - SHIFT) - log_sigma(-(0.3 * r - SHIFT))),
    # eta (P - 1/2) with eta = 1 / beta = 4 and P = 1 of the chosen, 0 of the rejected answer
    (SPPO(0.25), lambda c, r: (c - 4 * (1 - 1 / 2)) ** 2 + (r - 4 * (0 - 1 / 2)) ** 2),
    (APOZero(0.4), lambda c, r: 1 - sigma(0.4 * c) + sigma(0.4 * r)),
    (APODown(0.4), lambda c, r: sigma(0.4 * c) + 1 - sigma(0.4 * c - 0.4 * r)),
    (DiscoPOP(0.2, 0.5), lambda c, r: discopop(0.2 * (c - r), 0.5)),
]

OPTIONS = [
    {},
    {"per_token": True},
    {"ld_alpha": 0.3},
    {"ld_alpha": 0.0, "per_token": True},
    {"reference_free": True},
    {"reference_free": True, "per_token": True, "ld_alpha": 0.6},
    {"divergence": ForwardKL()},
    {"divergence": JensenShannon(), "ld_alpha": 0.5},
    {"divergence": AlphaDivergence(0.3)},
    {"divergence": AlphaDivergence(0.8), "per_token": True},
]


def derivative(divergence: Divergence, u: float) -> float:
    """f'(u), 0 at u = 1: Wang et al. 2023, table 1."""
    if isinstance(divergence, AlphaDivergence):
        return (1 - u**-divergence.alpha) / divergence.alpha
    return {ReverseKL: math.log(u), ForwardKL: 1 - 1 / u, JensenShannon: math.log(2 * u / (1 + u))}[type(divergence)]


def score(loss: RatioLoss, policy: Sequence[float], reference: Sequence[float], shared: int) -> float:
    """What a loss sees of an answer, given its tokens' log-probabilities and the length of the pair's shorter one."""
    weights = [1 if place < shared else loss.ld_alpha for place in range(len(policy))]
    ratios = [own - (not loss.reference_free) * other for own, other in zip(policy, reference, strict=True)]
    weighed = [weight * ratio for weight, ratio in zip(weights, ratios, strict=True)]
    return derivative(loss.divergence, math.exp(sum(weighed) / (len(policy) if loss.per_token else 1)))


def scores(loss: RatioLoss, drawn: Drawn) -> tuple[list[float], list[float]]:
    """`[B]` of the chosen and of the rejected answers."""
    shared = [min(len(c), len(r)) for c, r in zip(drawn.chosen, drawn.rejected, strict=True)]
    chosen = zip(drawn.chosen, drawn.chosen_reference, shared, strict=True)
    rejected = zip(drawn.rejected, drawn.rejected_reference, shared, strict=True)
    return [score(loss, *item) for item in chosen], [score(loss, *item) for item in rejected]


def name(item: object) -> str:
    """Of a loss or of options, as it is written."""
    if isinstance(item, dict):
        return ",".join(f"{key}={value}" for key, value in item.items()) or "plain"
    return repr(item) if isinstance(item, PreferenceLoss) else type(item).__name__


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize(("plain", "formula"), RATIO_LOSSES, ids=[type(loss).__name__ for loss, _ in RATIO_LOSSES])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_loss_of_log_ratios_is_its_formula_with_every_option(
    plain: RatioLoss, formula: Formula, options: dict, seed: int
) -> None:
    drawn, loss = draw(seed), replace(plain, **options)
    state = {"shift": SHIFT} if loss.initial_state else {}
    reference = None if loss.reference_free else drawn.reference
    chosen, rejected = scores(loss, drawn)
    wanted = [formula(c, r) for c, r in zip(chosen, rejected, strict=True)]
    assert run(loss, drawn.policy, reference, **state).tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    rewards = [loss.beta * value for value in (*chosen, *rejected)]
    assert loss.rewards(drawn.policy, reference).tolist() == pytest.approx(rewards, rel=1e-9, abs=1e-12)


def odds(tokens: Sequence[float]) -> float:
    p = math.exp(mean(tokens))
    return p / (1 - p)


def smoothed(z: float, eps: float) -> float:
    return -(1 - eps) * log_sigma(z) - eps * log_sigma(-z)


#: Loss, its formula of both answers' token log-probabilities, and that of an answer's reward.
LIKELIHOOD_LOSSES = [
    (SimPO(2.0, 1.0), lambda c, r: -log_sigma(2 / len(c) * sum(c) - 2 / len(r) * sum(r) - 1), lambda y: 2 * mean(y)),
    (SimPO(1.5, 0.0, 0.1), lambda c, r: smoothed(1.5 * (mean(c) - mean(r)), 0.1), lambda y: 1.5 * mean(y)),
    (ORPO(0.4), lambda c, r: -mean(c) - 0.4 * log_sigma(math.log(odds(c) / odds(r))), lambda y: 0.4 * mean(y)),
    (CPO(0.3), lambda c, r: -log_sigma(0.3 * sum(c) - 0.3 * sum(r)) - mean(c), lambda y: 0.3 * sum(y)),
    (
        CPO(0.3, sft_weight=0.5, label_smoothing=0.2),
        lambda c, r: smoothed(0.3 * (sum(c) - sum(r)), 0.2) - 0.5 * mean(c),
        lambda y: 0.3 * sum(y),
    ),
]


@pytest.mark.parametrize(("loss", "formula", "reward"), LIKELIHOOD_LOSSES, ids=name)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_loss_of_likelihoods_is_its_formula_and_looks_at_no_reference(
    loss: LikelihoodLoss, formula: Callable, reward: Callable, seed: int
) -> None:
    drawn = draw(seed)
    wanted = [formula(c, r) for c, r in zip(drawn.chosen, drawn.rejected, strict=True)]
    assert not loss.needs_reference
    for reference in (None, drawn.reference):
        assert loss(drawn.policy, reference).tolist() == pytest.approx(wanted, rel=1e-9)
        rewards = [reward(tokens) for tokens in (*drawn.chosen, *drawn.rejected)]
        assert loss.rewards(drawn.policy, reference).tolist() == pytest.approx(rewards, rel=1e-9)


#: Where they are compared with a formula that is not in one of the tables above.
ELSEWHERE = {AOT, AOTUnpaired, SFT, Sum}


def test_no_loss_is_without_a_formula() -> None:
    tables = {type(loss) for loss, *_ in RATIO_LOSSES + LIKELIHOOD_LOSSES}
    assert tables | ELSEWHERE == set(concrete(PreferenceLoss))


# Losses of all pairs of a step together

SORTED_OPTIONS = [
    {},
    {"label_smoothing": 0.2},
    {"per_token": True},
    {"ld_alpha": 0.3, "per_token": True},
    {"reference_free": True},
    {"sft_weight": 0.5},
]


def sorted_loss(loss: AOTUnpaired, above: Sequence[float], below: Sequence[float], drawn: Drawn) -> float:
    """The mean over pairs: the i-th largest above against the i-th largest below, plus the chosen answers' SFT."""
    descending = zip(sorted(above, reverse=True), sorted(below, reverse=True), strict=True)
    losses = [smoothed(loss.beta * (a - b), loss.label_smoothing) for a, b in descending]
    return mean(losses) - loss.sft_weight * mean([mean(tokens) for tokens in drawn.chosen])


@pytest.mark.parametrize("options", [*SORTED_OPTIONS, {"divergence": ForwardKL()}], ids=name)
@pytest.mark.parametrize("seed", SEEDS)
def test_aot_unpaired_compares_sorted_chosen_with_sorted_rejected_rewards(options: dict, seed: int) -> None:
    drawn, loss = draw(seed), AOTUnpaired(0.3, **options)
    chosen, rejected = scores(loss, drawn)
    found = loss(drawn.policy, None if loss.reference_free else drawn.reference)
    assert found.shape == (len(drawn),)
    assert found.mean().item() == pytest.approx(sorted_loss(loss, chosen, rejected, drawn), rel=1e-9)


@pytest.mark.parametrize("options", SORTED_OPTIONS, ids=name)
@pytest.mark.parametrize("seed", SEEDS)
def test_aot_compares_sorted_gaps_of_policy_with_sorted_gaps_of_reference(options: dict, seed: int) -> None:
    drawn, loss = draw(seed), AOT(0.3, **options)
    # The gap of the policy alone is that of the log-ratio to a uniform reference.
    alone = replace(loss, reference_free=True)
    chosen, rejected = scores(alone, drawn)
    above = [c - r for c, r in zip(chosen, rejected, strict=True)]
    below = [0.0] * len(drawn)
    if not loss.reference_free:
        of_reference = Drawn(drawn.chosen_reference, drawn.rejected_reference, drawn.chosen, drawn.rejected)
        chosen, rejected = scores(alone, of_reference)
        below = [c - r for c, r in zip(chosen, rejected, strict=True)]
    reference = None if loss.reference_free else drawn.reference
    found = loss(drawn.policy, reference)
    assert found.mean().item() == pytest.approx(sorted_loss(loss, above, below, drawn), rel=1e-9)
    rewards = [loss.beta * value for part in scores(loss, drawn) for value in part]
    assert loss.rewards(drawn.policy, reference).tolist() == pytest.approx(rewards, rel=1e-9)


@pytest.mark.parametrize("loss", [AOT(0.3, 0.1), AOTUnpaired(0.3, 0.1)], ids=name)
@pytest.mark.parametrize("seed", SEEDS)
def test_of_a_single_pair_aot_is_dpo(loss: AOTUnpaired, seed: int) -> None:
    drawn = draw(seed, count=1)
    (c,), (r,) = scores(loss, drawn)
    assert loss(drawn.policy, drawn.reference).item() == pytest.approx(smoothed(0.3 * (c - r), 0.1), rel=1e-9)


@pytest.mark.parametrize("loss", [AOT(0.3), AOTUnpaired(0.3, sft_weight=0.1)], ids=name)
def test_parts_of_micro_batches_side_by_side_are_the_parts_of_the_step(loss: AOTUnpaired) -> None:
    drawn = draw(0)
    halves = [
        Drawn(*(part[half] for part in vars(drawn).values())) for half in (slice(0, 2), slice(2, None))
    ]  # of 2 and 4 pairs
    parts = torch.cat([loss.parts(half.policy, half.reference) for half in halves], dim=-1)
    assert loss.of_parts(parts).tolist() == pytest.approx(loss(drawn.policy, drawn.reference).tolist(), rel=1e-12)


def test_aot_unpaired_does_not_know_which_answers_belong_together() -> None:
    drawn, order = draw(0), random.Random(0).sample(range(6), 6)
    mixed = replace(
        drawn,
        rejected=[drawn.rejected[i] for i in order],
        rejected_reference=[drawn.rejected_reference[i] for i in order],
    )
    means = [
        [loss(one.policy, one.reference).mean().item() for one in (drawn, mixed)]
        for loss in (AOTUnpaired(), AOT(), Sigmoid())
    ]
    assert means[0][0] == pytest.approx(means[0][1], rel=1e-12)
    assert means[1][0] != pytest.approx(means[1][1], rel=1e-3) and means[2][0] != pytest.approx(means[2][1], rel=1e-3)


# Laws beside the formulas


@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_the_robust_loss_is_dpos_in_the_mean_over_flipped_labels(eps: float) -> None:
    drawn = draw(0)
    flipped = Drawn(drawn.rejected, drawn.chosen, drawn.rejected_reference, drawn.chosen_reference)
    right, wrong = (Robust(0.5, eps)(one.policy, one.reference) for one in (drawn, flipped))
    chosen, rejected = scores(Sigmoid(0.5), drawn)
    wanted = [-log_sigma(0.5 * (c - r)) for c, r in zip(chosen, rejected, strict=True)]
    assert ((1 - eps) * right + eps * wrong).tolist() == pytest.approx(wanted, rel=1e-9)


def test_exo_is_least_and_0_where_the_policy_has_the_labels_odds() -> None:
    gap = math.log(0.9 / 0.1) / 0.5
    losses = EXO(0.5, 0.1)(answers([gap, gap + 0.1, gap - 0.1], [0, 0, 0]), answers([0, 0, 0], [0, 0, 0]))
    assert losses[0].item() == pytest.approx(0, abs=1e-15) and (losses[1:] > 1e-5).all()


def test_bco_moves_its_shift_by_the_steps_mean_reward_and_uses_it_in_the_next() -> None:
    """Three steps of different pairs, by hand: shift <- decay * shift + (1 - decay) * mean reward of all answers."""
    loss, shift = BCO(0.3, decay=0.8), 0.0
    state = {name: torch.tensor(value, dtype=torch.float64) for name, value in loss.initial_state.items()}
    for seed in SEEDS:
        drawn = draw(seed)
        chosen, rejected = scores(loss, drawn)
        pairs = list(zip(chosen, rejected, strict=True))
        wanted = [-log_sigma(0.3 * c - shift) - log_sigma(shift - 0.3 * r) for c, r in pairs]
        assert loss(drawn.policy, drawn.reference, state).tolist() == pytest.approx(wanted, rel=1e-9)
        observed = loss.observe(drawn.policy, drawn.reference)
        assert not observed["shift"].requires_grad
        assert observed["shift"].tolist() == pytest.approx([0.3 * (c + r) / 2 for c, r in pairs], rel=1e-9)
        state = loss.advance(state, {name: values.mean() for name, values in observed.items()})
        shift = 0.8 * shift + 0.2 * mean([0.3 * value for value in (*chosen, *rejected)])
        assert state["shift"].item() == pytest.approx(shift, rel=1e-9)
    assert abs(shift) > 0.01


def test_bco_without_decay_takes_the_step_before_alone() -> None:
    old, new = {"shift": torch.tensor(5.0)}, {"shift": torch.tensor(-1.0)}
    assert BCO(decay=0.0).advance(old, new)["shift"].item() == -1
