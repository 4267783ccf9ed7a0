"""The trained policy is the one the papers derive.

That is pi* = pi_ref * exp(r / beta) / Z, r being the reward for DPO (Rafailov et al. 2023, eq. 4), and for IPO the
probability of being preferred to an answer drawn at random (Azar et al. 2023, section 5).

A language model small enough to enumerate: every answer has two tokens of a vocabulary of four, all 16 are known with
their probabilities. Preferences are known exactly: every pair of answers counts in both orders, each by the
probability of that preference.

Legend: P prompts  A answers
"""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from dpo_lightning.data.packing import pack
from dpo_lightning.data.tokenization import TokenPair
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import FrozenModel
from dpo_lightning.objective.losses import IPO, Sigmoid
from dpo_lightning.objective.preference import PreferenceLoss

VOCABULARY, LENGTH = 4, 2
ANSWERS = [np.array(ids) for ids in itertools.product(range(VOCABULARY), repeat=LENGTH)]
PROMPTS = [np.array([0, 1]), np.array([3])]


@pytest.fixture
def policy() -> Policy:
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=32, **ends)
    model = GPT2LMHeadModel(config).double()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(4)  # so that its answers are not all about as likely
    return Policy(model.eval())


def log_probabilities(policy: Policy) -> Tensor:
    """`[P, A]` by plain forwards."""
    rows = []
    for prompt in PROMPTS:
        tokens = torch.tensor(np.stack([np.concatenate([prompt, answer]) for answer in ANSWERS]))
        logps = policy.model(tokens).logits.log_softmax(-1)[:, len(prompt) - 1 : -1]
        rows.append(logps.gather(-1, tokens[:, len(prompt) :, None]).sum((1, 2)))
    return torch.stack(rows)


def distance(one: Tensor, other: Tensor) -> float:
    """Total variation between the rows `[P, A]` of two tables, of the prompt where it is largest."""
    return ((one - other).abs().sum(1).max() / 2).item()


def bradley_terry(rewards: Tensor) -> Tensor:
    """`[P, A, A]` the probability that the first answer is preferred to the second, of rewards `[P, A]`."""
    return torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])


def train(policy: Policy, loss: PreferenceLoss, preferences: Tensor) -> tuple[Tensor, Tensor]:
    """Minimises the loss over the population, `preferences` `[P, A, A]` being its probabilities.

    Returns:
        Log-probabilities `[P, A]` before and after.
    """
    with torch.no_grad():
        start = log_probabilities(policy)
        assert torch.allclose(start.exp().sum(1), torch.ones(len(PROMPTS)).double())
    reference = FrozenModel()
    reference.prepare(policy)
    pairs, weights = [], []
    for number, prompt in enumerate(PROMPTS):
        for first, second in itertools.permutations(range(len(ANSWERS)), 2):
            pairs.append(TokenPair(prompt, ANSWERS[first], ANSWERS[second]))
            weights.append(preferences[number, first, second])
    batch, weight = pack(pairs, policy.layout), torch.stack(weights)
    known = reference.logps(batch)
    optimizer = torch.optim.LBFGS(
        policy.parameters(), max_iter=150, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=1e-12, tolerance_change=1e-16,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (weight * loss(policy.logps(batch), known)).sum() / weight.sum()
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        return start, log_probabilities(policy)


def draw_rewards() -> Tensor:
    """`[P, A]`, the same at every call."""
    return torch.randn(len(PROMPTS), len(ANSWERS), generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_dpo_reaches_the_tilted_reference(policy: Policy, beta: float) -> None:
    rewards = 2 * beta * draw_rewards()
    start, reached = train(policy, Sigmoid(beta=beta), bradley_terry(rewards))
    optimum = (start + rewards / beta).softmax(1)
    assert distance(start.exp(), optimum) > 0.3
    assert distance(reached.exp(), optimum) < 0.02
    # Not by going anywhere: half or twice the regularisation has another optimum.
    for other in (beta / 2, 2 * beta):
        assert distance(reached.exp(), (start + rewards / other).softmax(1)) > 0.1


def certain(rewards: Tensor) -> Tensor:
    """`[P, A, A]` where the answer with more of the reward is always preferred."""
    return (rewards[:, :, None] - rewards[:, None, :]).sign() / 2 + 0.5


@pytest.mark.parametrize("preferences", [bradley_terry, certain])
def test_ipo_reaches_the_reference_tilted_by_winning_rates(policy: Policy, preferences: Callable) -> None:
    """The gap of two answers' log-ratios is that of their winning rates over beta, Azar et al. 2023, eq. 11.

    Certain preferences too, where DPO has no optimum, since its gaps grow for ever.
    """
    beta, population = 0.15, preferences(draw_rewards())
    winning = population.mean(2)  # [P, A] against an answer drawn at random
    start, reached = train(policy, IPO(beta=beta), population)
    gaps, wanted = (
        values[:, :, None] - values[:, None, :] for values in (reached - start, winning / beta)
    )  # [P, A, A]
    assert wanted.abs().max() > 4
    assert (gaps - wanted).abs().max() < 0.02
    optimum = (start + winning / beta).softmax(1)
    assert distance(start.exp(), optimum) > 0.15
    assert distance(reached.exp(), optimum) < 0.02
    for other in (beta / 2, 2 * beta):
        assert distance(reached.exp(), (start + winning / other).softmax(1)) > 0.1
