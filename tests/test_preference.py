"""What every loss of log-ratios can take: length desensitising, WPO's weights, the SFT term, no reference.

The losses themselves, with these options, are in `test_losses_by_formula`; here each option is by itself.

Legend: B pairs  N answer tokens  D hidden  V vocabulary
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_lightning.errors import InputError
from dpo_lightning.objective.logps import PairLogps, token_logps
from dpo_lightning.objective.losses import AOT, IPO, ORPO, SFT, AOTUnpaired, DiscoPOP, Sigmoid
from dpo_lightning.objective.preference import PreferenceLoss, RatioLoss, desensitised
from tests.objectives import Drawn, answers, concrete, draw, log_sigma, mean, pair_logps, run

RATIO_LOSSES = concrete(RatioLoss)

# Length


def by_hand() -> tuple[PairLogps, PairLogps]:
    """Chosen has 3 tokens of log-ratios 1, 2, 4, rejected one of log-ratio 8."""
    return pair_logps([[-1.0, -2.0, -3.0]], [[-1.0]]), pair_logps([[-2.0, -4.0, -7.0]], [[-9.0]])


@pytest.mark.parametrize(("alpha", "chosen"), [(1.0, 7.0), (0.5, 4.0), (0.0, 1.0)])
def test_the_tokens_by_which_an_answer_is_longer_weigh_alpha(alpha: float, chosen: float) -> None:
    """1 + alpha * (2 + 4) for the longer one; the shorter one is as it was."""
    found = Sigmoid(1.0, ld_alpha=alpha).rewards(*by_hand())
    assert found.tolist() == [chosen, 8.0]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_the_longer_answers_further_tokens_get_alpha_of_the_gradient(alpha: float) -> None:
    policy, reference = by_hand()
    (gradient,) = torch.autograd.grad(Sigmoid(0.2, ld_alpha=alpha)(policy, reference).sum(), policy.token_logps)
    slope = -0.2 * math.exp(log_sigma(-0.2 * (1 + alpha * 6 - 8)))
    assert gradient.tolist() == pytest.approx([slope, alpha * slope, alpha * slope, -slope], rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_those_of_a_loop_over_places_in_both_answers(seed: int) -> None:
    drawn = draw(seed)
    shorter = [min(len(one), len(other)) for one, other in zip(drawn.chosen, drawn.rejected, strict=True)]
    wanted = [
        1.0 if place < shared else 0.3
        for side in (drawn.chosen, drawn.rejected)
        for tokens, shared in zip(side, shorter, strict=True)
        for place in range(len(tokens))
    ]
    assert 0.3 in wanted
    assert desensitised(drawn.policy, 0.3).tolist() == wanted  # to the last bit of fp64


def test_answers_of_one_length_are_desensitised_to_nothing() -> None:
    policy, reference = answers([-1.0, -2.0], [-3.0, -1.0]), answers([-2.0, -2.0], [-2.0, -2.0])
    assert torch.equal(Sigmoid(ld_alpha=0.0)(policy, reference), Sigmoid()(policy, reference))


def test_an_answer_without_a_scored_token_has_no_log_ratio() -> None:
    """An empty prompt and one token: nothing predicts it, so that the other answer is longer by all it has."""
    policy, reference = pair_logps([[-1.0, -2.0]], [[]]), pair_logps([[-2.0, -2.0]], [[]])
    for options, wanted in (({}, 1.0), ({"ld_alpha": 0.5}, 0.5), ({"per_token": True}, 0.5)):
        assert Sigmoid(1.0, **options).rewards(policy, reference).tolist() == [wanted, 0.0]


# Weights


def with_logits(seed: int = 3) -> tuple[PairLogps, PairLogps, Tensor, Tensor]:
    """Policy and reference of random logits, three pairs; and the policy's logits `[N, V]` and targets `[N]`."""
    generator = torch.Generator().manual_seed(seed)
    answer = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 4, 5, 5, 5, 5])
    count, hidden, vocabulary = len(answer), 8, 11
    states = torch.randn(2, count, hidden, generator=generator).double()
    head = torch.randn(vocabulary, hidden, generator=generator).double()
    target = (states[0] @ head.T).softmax(1).multinomial(1, generator=generator)[:, 0]  # [N], its own samples
    models = []
    for part in states:
        logps, statistics = token_logps(part, target, lambda x: x @ head.T, vocabulary, ("log_collision",))
        models.append(PairLogps(logps.detach().requires_grad_(), answer, 3, 6, statistics))
    return models[0], models[1], states[0] @ head.T, target


def wpo_weights(policy: PairLogps, logits: Tensor, target: Tensor) -> list[float]:
    """Zhou et al. 2024, eq. 2, from the whole softmax: of each answer the geometric mean, both multiplied."""
    probabilities = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    relative = [row[token] / (row**2).sum() for row, token in zip(probabilities, target.tolist(), strict=True)]
    of_answers = []
    for number in range(6):
        own = [value for value, place in zip(relative, policy.answer.tolist(), strict=True) if place == number]
        of_answers.append(math.prod(own) ** (1 / len(own)))
    return [of_answers[pair] * of_answers[3 + pair] for pair in range(3)]


@pytest.mark.parametrize("cls", [cls for cls in RATIO_LOSSES if not cls.whole_step])
def test_wpo_weighs_a_pair_by_how_likely_its_answers_are_against_samples(cls: type) -> None:
    policy, reference, logits, target = with_logits()
    wanted = torch.tensor(wpo_weights(policy, logits, target))
    assert wanted.min() < 0.8 and wanted.max() > 1.2
    plain, weighed = (run(cls(wpo=wpo), policy, reference) for wpo in (False, True))
    assert weighed.tolist() == pytest.approx((plain * wanted).tolist(), rel=1e-12)
    # The weights carry no gradient of their own.
    found, slope = (torch.autograd.grad(losses.sum(), policy.token_logps)[0] for losses in (weighed, plain))
    scale = wanted[policy.answer % 3]
    assert found.tolist() == pytest.approx((slope * scale).tolist(), rel=1e-9, abs=1e-15)


def test_wpo_leaves_rewards_and_the_sft_term_unweighed() -> None:
    policy, reference, logits, target = with_logits()
    wanted = torch.tensor(wpo_weights(policy, logits, target))
    loss = Sigmoid(wpo=True, sft_weight=0.5)
    plain = Sigmoid()(policy, reference)
    added = torch.tensor([-mean(policy.token_logps[policy.answer == pair].tolist()) for pair in range(3)]).double()
    assert loss(policy, reference).tolist() == pytest.approx((wanted * plain + 0.5 * added).tolist(), rel=1e-6)
    assert torch.equal(loss.rewards(policy, reference), Sigmoid().rewards(policy, reference))


def test_only_wpo_asks_for_a_statistic_of_the_logits() -> None:
    for cls in concrete(PreferenceLoss):
        assert "wpo" not in cls.__dataclass_fields__ or cls().statistics == ()
    assert Sigmoid(wpo=True).statistics == ("log_collision",)


@pytest.mark.parametrize("cls", [AOT, AOTUnpaired])
def test_a_loss_that_sorts_refuses_weights_of_pairs(cls: type) -> None:
    with pytest.raises(InputError, match=rf"{cls.__name__}\.wpo .*got True"):
        cls(wpo=True)
    assert cls().whole_step and not Sigmoid().whole_step


# The SFT term


@pytest.mark.parametrize("weight", [0.2, 3.0])
@pytest.mark.parametrize("cls", RATIO_LOSSES)
def test_the_sft_term_adds_the_chosen_answers_mean_negative_log_likelihood(cls: type, weight: float) -> None:
    """Whatever the reference says; the rewards are those without it."""
    drawn = draw(1)
    plain, added = (cls(beta=0.3, sft_weight=value) for value in (0.0, weight))
    difference = run(added, drawn.policy, drawn.reference) - run(plain, drawn.policy, drawn.reference)
    assert difference.tolist() == pytest.approx([-weight * mean(tokens) for tokens in drawn.chosen], rel=1e-9)
    assert added.rewards(drawn.policy, drawn.reference).equal(plain.rewards(drawn.policy, drawn.reference))


# No reference


@pytest.mark.parametrize("cls", RATIO_LOSSES)
def test_without_a_reference_the_log_probabilities_alone_count(cls: type) -> None:
    """As if the reference were certain of every token; the reference that is there is not looked at."""
    drawn = draw(0)
    free = cls(reference_free=True)
    assert not free.needs_reference and cls().needs_reference
    found = run(free, drawn.policy, None)
    certain = Drawn(
        drawn.chosen,
        drawn.rejected,
        *([[0.0] * len(tokens) for tokens in side] for side in (drawn.chosen, drawn.rejected)),
    )
    assert found.tolist() == pytest.approx(run(cls(), certain.policy, certain.reference).tolist(), rel=1e-12)
    assert torch.equal(run(free, drawn.policy, drawn.reference), found)
    rewards = [cls().beta * sum(tokens) for tokens in (*drawn.chosen, *drawn.rejected)]
    assert free.rewards(drawn.policy, None).tolist() == pytest.approx(rewards, rel=1e-12)


def test_options_stand_together() -> None:
    """By hand: log-ratios 1 + 0.5 * (2 + 4) = 4 over 3 tokens, and 8 over 1; IPO's target is 2."""
    policy, reference = by_hand()
    policy.statistics["log_collision"] = torch.full((4,), -2.0).double()
    loss = IPO(0.25, ld_alpha=0.5, per_token=True, wpo=True, sft_weight=0.1)
    # Tokens -1, -2, -3 less -2 have the mean 0, and -1 less -2 is 1.
    wanted = math.exp(0 + 1) * (4 / 3 - 8 - 2) ** 2 + 0.1 * 2
    assert loss(policy, reference).item() == pytest.approx(wanted, rel=1e-12)


# What a loss says of itself


def test_a_loss_says_whether_it_implies_rewards() -> None:
    drawn = draw(0)
    for cls in (Sigmoid, DiscoPOP, ORPO, SFT):
        rewards = cls().rewards(drawn.policy, drawn.reference)
        assert cls().implies_rewards == (rewards is not None) == (cls is not SFT)


def test_a_loss_is_a_value_that_can_be_replaced_and_compared() -> None:
    assert replace(Sigmoid(0.2), label_smoothing=0.1) == Sigmoid(0.2, 0.1) != Sigmoid(0.2)
    with pytest.raises(AttributeError):
        Sigmoid().beta = 1.0
    with pytest.raises(InputError, match=r"Sigmoid\.beta"):
        replace(Sigmoid(), beta=-1.0)
