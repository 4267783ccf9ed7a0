"""The trained policy is the one the paper derives: pi* = pi_ref * exp(r / beta) / Z (Rafailov et al. 2023, eq. 4).

A language model small enough to enumerate: every answer has two tokens of a vocabulary of four, all 16 are known with
their probabilities. Preferences are Bradley and Terry's, exactly: every pair of answers counts in both orders, each by
the probability of that preference.
"""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from dpo_lightning.data.packing import pack
from dpo_lightning.data.tokenization import TokenPair
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import FrozenModel
from dpo_lightning.objective.losses import Sigmoid

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
    """`[prompts, answers]` by plain forwards."""
    rows = []
    for prompt in PROMPTS:
        tokens = torch.tensor(np.stack([np.concatenate([prompt, answer]) for answer in ANSWERS]))
        logps = policy.model(tokens).logits.log_softmax(-1)[:, len(prompt) - 1 : -1]
        rows.append(logps.gather(-1, tokens[:, len(prompt) :, None]).sum((1, 2)))
    return torch.stack(rows)


def distance(one: Tensor, other: Tensor) -> float:
    """Total variation between the rows `[prompts, answers]` of two tables, of the prompt where it is largest."""
    return ((one - other).abs().sum(1).max() / 2).item()


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_dpo_reaches_the_tilted_reference(policy: Policy, beta: float) -> None:
    rewards = 2 * beta * torch.randn(len(PROMPTS), len(ANSWERS), generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        start = log_probabilities(policy)
        assert torch.allclose(start.exp().sum(1), torch.ones(len(PROMPTS)).double())
    optimum = (start + rewards / beta).softmax(1)
    reference = FrozenModel()
    reference.prepare(policy)
    pairs, weights = [], []
    for number, prompt in enumerate(PROMPTS):
        for first, second in itertools.permutations(range(len(ANSWERS)), 2):
            pairs.append(TokenPair(prompt, ANSWERS[first], ANSWERS[second]))
            weights.append(torch.sigmoid(rewards[number, first] - rewards[number, second]))
    batch, weight = pack(pairs, policy.layout), torch.stack(weights)
    loss, known = Sigmoid(beta=beta), reference.logps(batch)
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
        reached = log_probabilities(policy).exp()
    assert distance(start.exp(), optimum) > 0.3
    assert distance(reached, optimum) < 0.02
    # Not by going anywhere: half or twice the regularisation has another optimum.
    for other in (beta / 2, 2 * beta):
        assert distance(reached, (start + rewards / other).softmax(1)) > 0.1
