"""What is made of log-ratios: against f of the paper's table, its slope by finite differences, and far out.

Legend: B pairs
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dpo_lightning.errors import InputError
from dpo_lightning.objective.divergences import (
    LIMIT,
    AlphaDivergence,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    exp,
)
from dpo_lightning.objective.losses import AOT, Sigmoid
from dpo_lightning.objective.preference import RatioLoss
from tests.objectives import answers, concrete, draw, run

LOGRATIOS = [-4.0, -1.5, -0.3, 0.0, 0.1, 0.9, 2.0, 5.0]


def alpha_f(alpha: float) -> Callable[[float], float]:
    return lambda u: (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))


#: f of Wang et al. 2023, table 1: D_f(policy, reference) is the reference's mean of f(policy / reference).
F: list[tuple[Divergence, Callable[[float], float]]] = [
    (ReverseKL(), lambda u: u * math.log(u)),
    (ForwardKL(), lambda u: -math.log(u)),
    (JensenShannon(), lambda u: u * math.log(u) - (u + 1) * math.log((u + 1) / 2)),
    *((AlphaDivergence(alpha), alpha_f(alpha)) for alpha in (0.1, 0.5, 0.9)),
]
DIVERGENCES = [divergence for divergence, _ in F]


def column(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def test_no_divergence_is_left_out() -> None:
    assert {type(divergence) for divergence in DIVERGENCES} == set(concrete(Divergence))


@pytest.mark.parametrize(("divergence", "f"), F, ids=map(repr, DIVERGENCES))
def test_a_divergence_is_the_slope_of_f_less_the_slope_at_1(divergence: Divergence, f: Callable) -> None:
    def slope(u: float, step: float = 1e-5) -> float:
        return (f(u * (1 + step)) - f(u * (1 - step))) / (2 * step * u)

    wanted = [slope(math.exp(x)) - slope(1.0) for x in LOGRATIOS]
    assert divergence(column(LOGRATIOS)).tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_where_policy_and_reference_agree_there_is_no_reward(divergence: Divergence) -> None:
    assert divergence(column([0.0])).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_what_became_likelier_has_more_reward(divergence: Divergence) -> None:
    """f is convex, out to where numbers of this precision end."""
    values = divergence(torch.linspace(-60, 30, 181, dtype=torch.float64))
    assert (values.diff() > 0)[:150].all() and (values.diff() >= 0).all()


@pytest.mark.parametrize(
    ("divergence", "formula"),
    [
        (ReverseKL(), math.log),
        (ForwardKL(), lambda u: 1 - 1 / u),
        (JensenShannon(), lambda u: math.log(2 * u / (1 + u))),
        (AlphaDivergence(0.25), lambda u: 4 * (1 - u**-0.25)),
    ],
)
def test_a_divergence_is_its_entry_in_the_table(divergence: Divergence, formula: Callable) -> None:
    wanted = [formula(math.exp(x)) for x in LOGRATIOS]
    found = divergence(column(LOGRATIOS).unflatten(0, (2, -1)))
    assert found.shape == (2, 4) and found.flatten().tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(("alpha", "limit"), [(1e-6, ReverseKL()), (1 - 1e-6, ForwardKL())])
def test_alpha_divergence_goes_from_reverse_to_forward_kl(alpha: float, limit: Divergence) -> None:
    values = column(LOGRATIOS)
    assert_close(AlphaDivergence(alpha)(values), limit(values), rtol=1e-4, atol=1e-9)
    assert not torch.allclose(AlphaDivergence(0.5)(values), limit(values), rtol=0.1)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5, 1.5, math.nan, math.inf])
def test_an_alpha_outside_its_range_is_refused_by_name(alpha: float) -> None:
    with pytest.raises(InputError, match=rf"AlphaDivergence\.alpha .*got {alpha}"):
        AlphaDivergence(alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_far_out_a_divergence_and_its_slope_are_finite(divergence: Divergence, dtype: torch.dtype) -> None:
    values = column([-1e4, -1e3, 1e3, 1e4], dtype)
    found = divergence(values)
    (slopes,) = torch.autograd.grad(found.sum(), values)
    assert found.dtype == dtype and found.isfinite().all() and slopes.isfinite().all()
    # An answer that became much less likely can still be moved back.
    assert (slopes[:2] > 0).all()


def test_the_exponential_is_itself_up_to_its_limit_and_its_tangent_after() -> None:
    values = column([-50.0, -1.0, 0.0, 3.0, LIMIT, LIMIT + 1e-6, LIMIT + 2, 1e4])
    found = exp(values)
    (slopes,) = torch.autograd.grad(found.sum(), values)
    edge = math.exp(LIMIT)
    assert found.tolist() == pytest.approx(
        [*map(math.exp, (-50.0, -1.0, 0.0, 3.0)), edge, edge * (1 + 1e-6), 3 * edge, edge * (1e4 - LIMIT + 1)],
        rel=1e-12,
    )
    assert slopes.tolist() == pytest.approx([*map(math.exp, (-50.0, -1.0, 0.0, 3.0)), *[edge] * 4], rel=1e-12)


@pytest.mark.parametrize("cls", concrete(RatioLoss))
def test_every_loss_of_log_ratios_takes_every_divergence_and_each_gives_other_losses(cls: type) -> None:
    """But for AOT, which has no log-ratio to measure, and says so."""
    drawn = draw(0)
    if cls is AOT:
        for divergence in set(DIVERGENCES) - {ReverseKL()}:
            with pytest.raises(InputError, match=r"AOT\.divergence .*ReverseKL.*got " + type(divergence).__name__):
                cls(divergence=divergence)
        return
    found = [run(cls(divergence=divergence), drawn.policy, drawn.reference) for divergence in DIVERGENCES]
    for place, losses in enumerate(found):
        assert all((losses - other).abs().max() > 1e-3 for other in found[:place]), DIVERGENCES[place]
    assert torch.equal(run(cls(), drawn.policy, drawn.reference), found[0])  # reverse KL is the default


@pytest.mark.parametrize("cls", concrete(RatioLoss))
def test_a_divergence_from_no_reference_is_refused(cls: type) -> None:
    with pytest.raises(InputError, match=rf"{cls.__name__}\.divergence .*ForwardKL.*reference_free"):
        cls(divergence=ForwardKL(), reference_free=True)
    cls(divergence=ReverseKL(), reference_free=True)


def test_rewards_are_beta_times_the_divergence() -> None:
    loss = Sigmoid(0.5, divergence=ForwardKL())
    rewards = loss.rewards(answers([-1.0], [-4.0]), answers([-2.0], [-2.0]))
    assert rewards.tolist() == pytest.approx([0.5 * (1 - math.exp(-1)), 0.5 * (1 - math.exp(2))], rel=1e-12)
