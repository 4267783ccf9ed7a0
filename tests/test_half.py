"""Half precision: what bf16-mixed makes of long answers, against single precision on the same batch."""

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from dpo_lightning.data.packing import Layout, PreferenceBatch, pack
from dpo_lightning.data.tokenization import TokenPair
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import FrozenModel
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.losses import Sigmoid

LOSS = Sigmoid(beta=0.1)

#: Prompt, chosen and rejected tokens of each pair.
LENGTHS = ((20, 500, 490), (9, 480, 500), (31, 500, 500))


def trained(layout: Layout) -> tuple[Policy, FrozenModel, PreferenceBatch]:
    """A random model whose predictions differ as a trained one's do, two steps away from its reference."""
    torch.manual_seed(0)
    ids = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
    noise = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=1024, **ids, **noise)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 4
    draw = np.random.default_rng(0)
    pairs = [TokenPair(*(draw.integers(256, size=n, dtype=np.int32) for n in lengths)) for lengths in LENGTHS]
    batch, policy, reference = pack(pairs, layout), Policy(model, layout), FrozenModel()
    reference.prepare(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-5)
    for _ in range(2):
        optimizer.zero_grad()
        LOSS(policy.logps(batch), reference.logps(batch)).mean().backward()
        optimizer.step()
    return policy, reference, batch


@pytest.mark.parametrize("layout", ["shared", "padded"])
@torch.no_grad()
def test_answers_of_500_tokens_score_in_half_precision_what_they_do_in_single(layout: Layout) -> None:
    with torch.enable_grad():
        policy, reference, batch = trained(layout)
    single, other = policy.logps(batch), reference.logps(batch)
    with MixedPrecision("bf16-mixed", "cpu").forward_context():
        half, half_other = policy.logps(batch), reference.logps(batch)
        halved = LOSS(half, half_other).mean()

    assert policy.model.dtype == half.token_logps.dtype == torch.float32
    assert not torch.equal(half.token_logps, single.token_logps)  # it was half precision
    assert half.logps.tolist() == pytest.approx(single.logps.tolist(), rel=5e-3)
    loss = LOSS(single, other).mean()
    assert 0.3 < loss < 0.6  # where a loss still depends on what the answers score
    assert halved.item() == pytest.approx(loss.item(), abs=1e-2)

    # Were they added up in half precision they would not.
    wrong = PairLogps(half.token_logps.bfloat16(), half.answer, half.num_pairs, half.num_answers)
    assert relative(wrong.logps, single.logps).max() > 5e-3


def relative(found: Tensor, expected: Tensor) -> Tensor:
    """The difference of each element, relative to what is expected."""
    return ((found - expected) / expected).abs()
