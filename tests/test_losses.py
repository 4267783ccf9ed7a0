"""The DPO and the supervised loss at close quarters, and what every loss owes: finite values, and guarded ranges.

All other formulas are in `test_losses_by_formula`.

Legend: B pairs
"""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_lightning.data.packing import pack
from dpo_lightning.data.tokenization import TokenPair
from dpo_lightning.errors import InputError
from dpo_lightning.objective.divergences import Divergence
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.losses import EXO, SFT, Robust, Sigmoid
from dpo_lightning.objective.preference import PreferenceLoss
from tests.objectives import answers, concrete, field_types, log_sigma, make, pair_logps, run

LN2 = math.log(2)

nats = st.floats(-200, 0)
betas = st.floats(0.01, 2)
smoothings = st.floats(0, 0.49)
laws = settings(deadline=None, max_examples=60)


def with_gap(gap: float, dtype: torch.dtype = torch.float64) -> tuple[PairLogps, PairLogps]:
    """A policy and a reference, one pair, whose log-ratio gap is `gap`; the policy takes gradient."""
    return answers([-3.0 + gap], [-5.0], dtype), answers([-3.0], [-5.0], dtype)


def logratios(policy: PairLogps, reference: PairLogps) -> Tensor:
    """What the losses see of all answers, `[2 * B]`, chosen first."""
    return torch.cat(Sigmoid().scores(policy, reference))


def logratio_gap(policy: PairLogps, reference: PairLogps) -> Tensor:
    chosen, rejected = Sigmoid().scores(policy, reference)
    return chosen - rejected


def smoothed_loss(gap: float, beta: float, eps: float) -> float:
    """Mitchell 2023, eq. 3, as it stands there."""
    return -(1 - eps) * log_sigma(beta * gap) - eps * log_sigma(-beta * gap)


def value(loss: Tensor) -> float:
    assert loss.shape == (1,)
    return loss.item()


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_sigmoid_at_no_gap_is_ln_2(beta: float, eps: float) -> None:
    assert value(Sigmoid(beta, eps)(*with_gap(0.0))) == pytest.approx(LN2, abs=1e-15)


def test_sigmoid_is_what_a_hand_computes() -> None:
    """Log-ratios 2 and -1, so gap 3; beta 0.5 gives 1.5, and ln(1 + e^-1.5) = 0.2014132779827524."""
    policy, reference = answers([-10.0], [-21.0]), answers([-12.0], [-20.0])
    assert value(Sigmoid(beta=0.5)(policy, reference)) == pytest.approx(0.2014132779827524, abs=1e-15)
    assert Sigmoid(beta=0.5).rewards(policy, reference).tolist() == [1.0, -0.5]
    # 0.9 * 0.2014132779827524 + 0.1 * 1.7014132779827524
    assert value(Sigmoid(0.5, 0.1)(policy, reference)) == pytest.approx(0.3514132779827524, abs=1e-15)


def test_sigmoid_keeps_pairs_apart() -> None:
    policy, reference = answers([-1.0, -2.0, -3.0], [-4.0, -1.0, -9.0]), answers([-2.0, -2.0, -1.0], [-2.0, -3.0, -8.0])
    gaps = [(-1 + 2) - (-4 + 2), (-2 + 2) - (-1 + 3), (-3 + 1) - (-9 + 8)]
    assert logratio_gap(policy, reference).tolist() == gaps
    assert logratios(policy, reference).tolist() == [1, 0, -2, -2, 2, -1]
    wanted = [smoothed_loss(gap, 0.1, 0) for gap in gaps]
    assert Sigmoid()(policy, reference).tolist() == pytest.approx(wanted, abs=1e-15)


@laws
@given(nats, nats, nats, nats, betas, smoothings)
def test_sigmoid_is_its_closed_form(pc: float, pr: float, rc: float, rr: float, beta: float, eps: float) -> None:
    found = value(Sigmoid(beta, eps)(answers([pc], [pr]), answers([rc], [rr])))
    assert found == pytest.approx(smoothed_loss((pc - rc) - (pr - rr), beta, eps), rel=1e-12, abs=1e-12)


@laws
@given(st.floats(-300, 300), betas, smoothings)
def test_gradient_is_minus_beta_sigma_of_minus_the_gap(gap: float, beta: float, eps: float) -> None:
    """By the chosen sum -beta sigma(-beta gap), by the rejected the opposite; smoothing adds eps * beta."""
    policy, reference = with_gap(gap)
    (gradient,) = torch.autograd.grad(Sigmoid(beta, eps)(policy, reference).sum(), policy.token_logps)
    wanted = -beta * math.exp(log_sigma(-beta * gap)) + eps * beta
    assert gradient.tolist() == pytest.approx([wanted, -wanted], rel=1e-10, abs=1e-13)


def test_every_token_of_an_answer_gets_the_gradient_of_its_sum() -> None:
    tokens = torch.tensor([-1.0, -2.0, -3.0, -0.5, -4.0], dtype=torch.float64, requires_grad=True)
    policy = PairLogps(tokens, torch.tensor([0, 0, 0, 1, 1]), num_pairs=1, num_answers=2)
    reference = answers([-5.0], [-6.0])
    (gradient,) = torch.autograd.grad(Sigmoid(0.2)(policy, reference).sum(), tokens)
    step = -0.2 / (1 + math.exp(0.2 * ((-6.0 + 5.0) - (-4.5 + 6.0))))
    assert gradient.tolist() == pytest.approx([step] * 3 + [-step] * 2, rel=1e-12)


@laws
@given(nats, nats, nats, nats, betas, smoothings)
def test_swapping_the_answers_flips_the_gap(
    pc: float, pr: float, rc: float, rr: float, beta: float, eps: float
) -> None:
    """Loss of the swapped pair minus loss of the pair is (1 - 2 eps) beta gap, and the rewards swap."""
    loss = Sigmoid(beta, eps)
    pair, swapped = (answers([pc], [pr]), answers([rc], [rr])), (answers([pr], [pc]), answers([rr], [rc]))
    gap = logratio_gap(*pair)
    assert torch.equal(logratio_gap(*swapped), -gap)
    assert value(loss(*swapped) - loss(*pair)) == pytest.approx((1 - 2 * eps) * beta * gap.item(), rel=1e-9, abs=1e-11)
    assert torch.equal(loss.rewards(*swapped), loss.rewards(*pair).flip(0))


@laws
@given(nats, nats, nats, nats, st.floats(-100, 100), betas)
def test_sigmoid_sees_only_what_policy_and_reference_do_not_share(
    pc: float, pr: float, rc: float, rr: float, shift: float, beta: float
) -> None:
    pair = answers([pc], [pr]), answers([rc], [rr])
    shifted = answers([pc + shift], [pr]), answers([rc + shift], [rr])
    assert value(Sigmoid(beta)(*shifted)) == pytest.approx(value(Sigmoid(beta)(*pair)), abs=1e-9)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_label_smoothing_is_least_where_the_model_is_as_sure_as_the_labels(eps: float) -> None:
    """The smoothed loss has its minimum at sigma(beta gap) = 1 - eps; without smoothing it falls for ever."""
    gaps = torch.linspace(-60, 60, 2401, dtype=torch.float64)
    nothing = [0.0] * len(gaps)
    losses = Sigmoid(0.5, eps)(answers(gaps.tolist(), nothing), answers(nothing, nothing))
    best = gaps[losses.argmin()].item()
    assert best == pytest.approx(60.0 if eps == 0 else math.log((1 - eps) / eps) / 0.5, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("eps", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_a_huge_gap_has_a_finite_loss_and_gradient(dtype: torch.dtype, gap: float, eps: float, beta: float) -> None:
    policy, reference = with_gap(gap, dtype)
    loss = Sigmoid(beta, eps)(policy, reference)
    (gradient,) = torch.autograd.grad(loss.sum(), policy.token_logps)
    assert loss.dtype == dtype
    # Linear on the wrong side with the weight of the label that says so, 0 on the right one.
    wrong = eps if gap > 0 else 1 - eps
    assert value(loss) == pytest.approx(wrong * beta * 1e4, rel=1e-3, abs=1e-30)
    step = beta * (eps if gap > 0 else eps - 1)
    assert gradient.tolist() == pytest.approx([step, -step], rel=1e-5, abs=1e-30)


def scored(pair: TokenPair, per_token: float) -> PairLogps:
    """A batch of one pair as the layout counts it, every token at `per_token` nats."""
    batch = pack([pair], "shared")
    values = torch.full((len(batch.target),), per_token, dtype=torch.float64, requires_grad=True)
    return PairLogps(values, batch.answer, batch.num_pairs, batch.num_answers)


def ids(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


def test_one_token_answers_weigh_one_token() -> None:
    pair = TokenPair(ids(4), ids(1), ids(1))
    policy, reference = scored(pair, -2.0), scored(pair, -3.0)
    assert logratios(policy, reference).tolist() == [1, 1]
    assert value(Sigmoid()(policy, reference)) == pytest.approx(LN2, abs=1e-15)
    assert SFT()(policy, None).tolist() == [2]


def test_the_first_token_after_an_empty_prompt_is_counted_out() -> None:
    """Chosen has 3 tokens of which 2 are predicted, rejected 1 of which none is; no mean is divided by what is not."""
    pair = TokenPair(ids(0), ids(3), ids(1))
    policy, reference = scored(pair, -2.0), scored(pair, -3.0)
    assert policy.lengths.tolist() == [2, 0]
    assert logratio_gap(policy, reference).tolist() == [2]
    assert SFT()(policy, None).tolist() == [2]
    losses = Sigmoid(0.1)(policy, reference)
    assert value(losses) == pytest.approx(smoothed_loss(2, 0.1, 0), abs=1e-15)
    (gradient,) = torch.autograd.grad(losses.sum(), policy.token_logps)
    assert gradient.tolist() == pytest.approx([-0.1 / (1 + math.exp(0.2))] * 2, rel=1e-12)


def test_an_answer_without_any_predicted_token_has_no_supervised_loss() -> None:
    policy = scored(TokenPair(ids(0), ids(1), None), -2.0)
    losses = SFT()(policy, None)
    losses.sum().backward()
    assert losses.tolist() == [0]


@laws
@given(st.lists(st.lists(nats, min_size=1, max_size=6), min_size=1, max_size=5))
def test_sft_is_the_mean_over_tokens_of_each_answer(tokens: list[list[float]]) -> None:
    values = torch.tensor([value for answer in tokens for value in answer], dtype=torch.float64)
    answer = torch.tensor([i for i, answer in enumerate(tokens) for _ in answer])
    losses = SFT()(PairLogps(values, answer, num_pairs=len(tokens), num_answers=len(tokens)), None)
    assert losses.tolist() == pytest.approx([-np.mean(answer) for answer in tokens], abs=1e-9)


def test_sft_looks_at_neither_reference_nor_rejected() -> None:
    loss = SFT()
    assert not loss.needs_reference and not loss.pairwise
    policy = answers([-1.0, -2.0], [-3.0, -4.0])
    losses = loss(policy, None)
    assert losses.tolist() == [1, 2] and loss.rewards(policy, None) is None
    (gradient,) = torch.autograd.grad(losses.sum(), policy.token_logps)
    assert gradient.tolist() == [-1, -1, 0, 0]


# What every loss owes

#: Policy and reference, each chosen and rejected, in nats: the gap comes from one answer, from the other or from both.
FAR = {
    "rejected fell": ((-1.0, -1e4), (-1.0, -1.0)),
    "chosen fell": ((-1e4, -1.0), (-1.0, -1.0)),
    "chosen rose": ((-1.0, -1.0), (-1e4, -1.0)),
    "rejected rose": ((-1.0, -1.0), (-1.0, -1e4)),
    "as wanted": ((-1.0, -1e4), (-1e4, -1.0)),
    "the wrong way": ((-1e4, -1.0), (-1.0, -1e4)),
    "certain": ((0.0, -1e4), (-1e4, 0.0)),
    "certainly wrong": ((-1e4, 0.0), (0.0, -1e4)),
}
LENGTHS = {"one token": (1, 1), "three against one": (3, 1), "one against three": (1, 3)}


def tokens(logp: float, count: int) -> list[float]:
    """One token has it all, the others are certain: a mean must not hide the size."""
    return [logp] + [0.0] * (count - 1)


def variants(cls: type) -> list[PreferenceLoss]:
    """A loss with each divergence and with each flag set, as far as it takes them."""
    types = field_types(cls)
    options = [{}]
    options += [{name: True} for name in types if types[name] is bool]
    options += [{name: 0.25} for name in ("ld_alpha", "sft_weight") if name in types]
    options += [{name: item()} for name in types if types[name] is Divergence for item in concrete(Divergence)]
    made = []
    for option in options:
        try:
            made.append(make(cls, **option))
        except InputError:  # AOT takes no weights
            assert option
    return made


LOSSES = concrete(PreferenceLoss)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("cls", LOSSES)
def test_no_loss_overflows_at_gaps_of_ten_thousand_nats(cls: type, lengths: tuple[int, int]) -> None:
    """In fp32, with every divergence; in two pairs, so that losses that sort have something to sort."""
    for loss, (case, (own, other)) in product(variants(cls), FAR.items()):
        near = (-2.0, -3.0)
        policy, reference = (
            pair_logps(*([tokens(pair[i], lengths[i]) for pair in pairs] for i in (0, 1)), torch.float32)
            for pairs in ((own, near), (other, near))
        )
        policy.statistics["log_collision"] = torch.full_like(policy.token_logps.detach(), -0.5)
        losses = run(loss, policy, reference if loss.needs_reference else None)
        (gradient,) = torch.autograd.grad(losses.sum(), policy.token_logps)
        assert losses.dtype == torch.float32 and losses.shape == (2,)
        assert losses.isfinite().all() and gradient.isfinite().all(), f"{loss}, {case}: {losses}, {gradient}"
        state = loss.observe(policy, reference)
        assert all(values.isfinite().all() for values in state.values()), f"{loss}, {case}: {state}"


def test_the_walk_over_huge_gaps_takes_every_divergence_and_every_flag() -> None:
    assert len(variants(Sigmoid)) == 1 + 3 + 2 + len(concrete(Divergence)) and len(concrete(Divergence)) == 4


#: What no loss may take, by the name of its field; and what it must take still.
REFUSED: dict[str, tuple[float, ...]] = {
    "beta": (0.0, -0.1, math.nan, math.inf),
    "label_smoothing": (-0.01, 0.5, 1.0, math.nan),
    "ld_alpha": (-0.01, 1.01, math.nan, math.inf),
    "sft_weight": (-0.1, math.inf, math.nan),
    "gamma": (-0.1, math.inf, math.nan),
    "tau": (0.0, -0.1, math.inf, math.nan),
    "decay": (-0.1, 1.0, math.inf, math.nan),
}
TAKEN: dict[str, tuple[float, ...]] = {
    "beta": (1e-6, 1e3),
    "label_smoothing": (1e-9, 0.499),
    "ld_alpha": (0.0, 1.0),
    "sft_weight": (0.0, 10.0),
    "gamma": (0.0, 10.0),
    "tau": (1e-6, 1e3),
    "decay": (0.0, 0.999),
}
NUMBERS = [(cls, name) for cls in LOSSES for name, kind in field_types(cls).items() if kind is float]


@pytest.mark.parametrize(("cls", "name"), NUMBERS)
def test_a_number_outside_its_range_is_refused_by_name_and_one_at_its_edge_is_taken(cls: type, name: str) -> None:
    assert name in REFUSED, f"say which values {cls.__name__}.{name} must refuse"
    for value in REFUSED[name]:
        with pytest.raises(InputError, match=rf"{cls.__name__}\.{name} .*got {value}"):
            make(cls, **{name: value})
    for value in TAKEN[name]:
        assert getattr(make(cls, **{name: value}), name) == value


@pytest.mark.parametrize("cls", [EXO, Robust])
def test_where_labels_must_be_able_to_flip_no_smoothing_is_refused(cls: type) -> None:
    with pytest.raises(InputError, match=rf"{cls.__name__}\.label_smoothing .*got 0\.0"):
        cls(label_smoothing=0.0)


@pytest.mark.parametrize("cls", LOSSES)
def test_a_loss_that_needs_a_reference_says_so_where_it_gets_none(cls: type) -> None:
    for loss in variants(cls):
        policy = answers([-1.0], [-2.0])
        policy.statistics["log_collision"] = torch.zeros_like(policy.token_logps)
        if not loss.needs_reference:
            run(loss, policy, None)
            continue
        with pytest.raises(ValueError, match="reference"):
            run(loss, policy, None)
