"""Plain forwards of one sequence each, in value and gradient: what the layouts are tested against.

Legend: B pairs  N answer tokens  V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_lightning.data.packing import Layout, pack
from dpo_lightning.data.tokenization import TokenPair
from dpo_lightning.models.policy import Policy
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.losses import Sigmoid
from tests.families import (
    CONTEXT,
    VOCABULARY,
    tiny_model,
)

BETA = 0.5

#: Prompt, chosen, rejected: longer than the windows, one-token answers, an empty prompt, a prompt of one token.
LENGTHS = [(9, 7, 3), (6, 1, 8), (0, 4, 2), (1, 5, 1), (12, 6, 6)]

#: Several trees a row, several rows, padding, and rows longer than the model's context.
ROW_TOKENS = CONTEXT + 16


def draw_pairs(lengths: Sequence[tuple[int, int, int]] = LENGTHS) -> list[TokenPair]:
    rng = np.random.default_rng(0)
    return [TokenPair(*(rng.integers(0, VOCABULARY, length, dtype=np.int32) for length in item)) for item in lengths]


def plain_logps(model: PreTrainedModel, pairs: Sequence[TokenPair]) -> list[Tensor]:
    """The oracle: one forward an answer, no mask, no padding; token log-probabilities by answer, chosen first."""
    answers = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    logps = []
    for prompt, answer in answers:
        tokens = torch.tensor([*prompt.tolist(), *answer.tolist()])
        scores = torch.log_softmax(model(input_ids=tokens[None]).logits[0], -1)  # [T, V]
        scored = range(max(len(prompt), 1), len(tokens))
        logps.append(torch.stack([scores[i - 1, tokens[i]] for i in scored]))
    return logps


def plain_dpo(logps: Sequence[Tensor], reference: Tensor) -> Tensor:
    """The DPO loss of Rafailov et al. 2023, eq. 7, written out; `reference` `[2 * B]` are constants."""
    ratios = torch.stack([tokens.sum() for tokens in logps]) - reference
    chosen, rejected = ratios.chunk(2)
    return torch.log1p(torch.exp(-BETA * (chosen - rejected))).mean()


def dpo(found: PairLogps, reference: Tensor) -> Tensor:
    """The same loss by the package."""
    constant = PairLogps(reference, torch.arange(len(reference)), found.num_pairs, found.num_answers)
    return Sigmoid(BETA)(found, constant).mean()


def flat_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    """The gradient of all parameters as one vector."""
    model.zero_grad()
    loss.backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def distance(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, relative to the norm of what is wanted."""
    return ((found - wanted).norm() / wanted.norm()).item()


@dataclass(frozen=True)
class Oracle:
    """What plain forwards give: `logps` `[N]`, and the `gradient` of the DPO loss against `reference` `[2 * B]`."""

    logps: Tensor
    reference: Tensor
    gradient: Tensor


@cache
def oracle(family: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> Oracle:
    model = tiny_model(family, dtype, attention)
    logps = plain_logps(model, draw_pairs())
    # So near the policy that every pair's sigmoid has a slope.
    reference = torch.stack([tokens.sum().detach() for tokens in logps]) + torch.linspace(-1, 1, len(logps))
    gradient = flat_gradient(plain_dpo(logps, reference), model)
    return Oracle(torch.cat(logps).detach(), reference, gradient)


def assert_agrees(model: PreTrainedModel, layout: Layout, wanted: Oracle, share: float) -> None:
    """Log-probabilities and the gradient of a DPO loss differ from the oracle's by no more than `share` of it."""
    found = Policy(model, layout).logps(pack(draw_pairs(), layout, row_tokens=ROW_TOKENS))
    assert distance(found.token_logps, wanted.logps) < share
    assert distance(flat_gradient(dpo(found, wanted.reference), model), wanted.gradient) < share
