"""Weighted sums of losses, with what their parts need, ask for and remember.

Legend: B pairs
"""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from dpo_lightning.errors import InputError
from dpo_lightning.objective.losses import AOT, BCO, CPO, IPO, ORPO, SFT, AOTUnpaired, Sigmoid, SimPO, Sum
from dpo_lightning.objective.preference import PreferenceLoss
from tests.objectives import draw, log_sigma, mean, run


def start(loss: PreferenceLoss) -> Mapping[str, Tensor]:
    """What it remembers at first."""
    return {name: torch.tensor(value).double() for name, value in loss.initial_state.items()}


def gaps(seed: int) -> list[tuple[float, float, float]]:
    """Of each pair both log-ratios, and the chosen answer's mean log-probability."""
    drawn = draw(seed)
    columns = (drawn.chosen, drawn.chosen_reference, drawn.rejected, drawn.rejected_reference)
    return [(sum(a) - sum(b), sum(c) - sum(d), mean(a)) for a, b, c, d in zip(*columns, strict=True)]


def test_a_sum_is_mixed_preference_optimisation() -> None:
    """0.8 DPO + 0.2 BCO + SFT, BCO's shift being 0.7 by now."""
    drawn, loss = draw(0), Sum((Sigmoid(0.1), BCO(0.3), SFT()), (0.8, 0.2, 1.0))
    assert (loss.needs_reference, loss.pairwise, loss.whole_step) == (True, True, False)
    wanted = [
        -0.8 * log_sigma(0.1 * (w - r)) - 0.2 * (log_sigma(0.3 * w - 0.7) + log_sigma(0.7 - 0.3 * r)) - chosen
        for w, r, chosen in gaps(0)
    ]
    assert run(loss, drawn.policy, drawn.reference, **{"1_shift": 0.7}).tolist() == pytest.approx(wanted, rel=1e-9)


def test_without_weights_each_counts_once() -> None:
    drawn, losses = draw(0), (IPO(0.5), SFT())
    wanted = [(w - r - 1) ** 2 - chosen for w, r, chosen in gaps(0)]
    for loss in (Sum(losses), Sum(losses, (1.0, 1.0))):
        assert loss(drawn.policy, drawn.reference).tolist() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("losses", "needs_reference", "pairwise"),
    [
        ((SFT(), SFT()), False, False),
        ((SFT(), SimPO()), False, True),
        ((SFT(), Sigmoid(reference_free=True)), False, True),
        ((ORPO(), Sigmoid()), True, True),
    ],
)
def test_a_sum_needs_what_any_of_its_losses_needs(losses: tuple, needs_reference: bool, pairwise: bool) -> None:
    loss, drawn = Sum(losses), draw(0)
    assert (loss.needs_reference, loss.pairwise) == (needs_reference, pairwise)
    run(loss, drawn.policy, drawn.reference if needs_reference else None)


def test_a_sum_asks_for_each_statistic_once() -> None:
    assert Sum((Sigmoid(wpo=True), IPO(wpo=True), SFT())).statistics == ("log_collision",)
    assert Sum((Sigmoid(), SFT())).statistics == ()


def test_rewards_are_those_of_the_first_loss_that_implies_any() -> None:
    drawn = draw(0)
    found = Sum((SFT(), CPO(0.5), Sigmoid(0.1))).rewards(drawn.policy, drawn.reference)
    wanted = [0.5 * sum(tokens) for tokens in (*drawn.chosen, *drawn.rejected)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)
    none = Sum((SFT(), SFT()))
    assert none.rewards(drawn.policy, None) is None
    assert not none.implies_rewards and Sum((SFT(), CPO())).implies_rewards


NESTED = Sum((Sum((SFT(), BCO(0.3, decay=0.5))), BCO(0.6, decay=0.9)))
FLAT = Sum((BCO(0.3, decay=0.5), SFT(), BCO(0.6, decay=0.9)))


@pytest.mark.parametrize(
    ("loss", "first", "second"),
    [(FLAT, "0_shift", "2_shift"), (NESTED, "0_1_shift", "1_shift")],
    ids=["flat", "nested"],
)
def test_two_that_remember_remember_each_for_itself(loss: Sum, first: str, second: str) -> None:
    """Three steps of two BCO of their own beta and decay, by hand."""
    state, one, other = start(loss), 0.0, 0.0
    assert set(state) == {first, second}
    for seed in range(3):
        drawn, pairs = draw(seed), gaps(seed)
        wanted = [
            -log_sigma(0.3 * w - one) - log_sigma(one - 0.3 * r) - chosen
            - log_sigma(0.6 * w - other) - log_sigma(other - 0.6 * r)
            for w, r, chosen in pairs
        ]  # fmt: skip
        assert loss(drawn.policy, drawn.reference, state).tolist() == pytest.approx(wanted, rel=1e-9)
        observed = loss.observe(drawn.policy, drawn.reference)
        assert all(values.shape == (len(drawn),) and not values.requires_grad for values in observed.values())
        state = loss.advance(state, {name: values.mean() for name, values in observed.items()})
        middle = mean([(w + r) / 2 for w, r, _ in pairs])
        one, other = 0.5 * one + 0.5 * 0.3 * middle, 0.9 * other + 0.1 * 0.6 * middle
        assert {name: value.item() for name, value in state.items()} == pytest.approx({first: one, second: other})
    assert abs(one - other) > 0.01


def test_a_sum_of_losses_that_remember_nothing_remembers_nothing() -> None:
    loss, drawn = Sum((Sigmoid(), SFT())), draw(0)
    assert loss.initial_state == loss.observe(drawn.policy, drawn.reference) == loss.advance({}, {}) == {}


@pytest.mark.parametrize("losses", [(), (Sigmoid(),)])
def test_a_sum_of_fewer_than_two_is_refused(losses: tuple) -> None:
    with pytest.raises(InputError, match=rf"Sum\.losses .*two, got {len(losses)}"):
        Sum(losses)


@pytest.mark.parametrize(
    "weights", [(1.0,), (1.0, 1.0, 1.0), (1.0, 0.0), (1.0, -0.5), (math.nan, 1.0), (1.0, math.inf), ()]
)
def test_weights_that_give_no_sum_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"Sum\.weights .*2 losses") as caught:
        Sum((Sigmoid(), SFT()), weights)
    assert str(caught.value).endswith(f"got {weights}")


@pytest.mark.parametrize("loss", [AOT(), AOTUnpaired()])
def test_a_loss_that_sorts_is_refused_in_a_sum(loss: AOTUnpaired) -> None:
    with pytest.raises(InputError, match=rf"Sum\.losses has {type(loss).__name__}, which sorts"):
        Sum((Sigmoid(), loss))
