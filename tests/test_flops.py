"""What a step computes against what the work needs: FLOPs do not depend on the machine, nor on what else it does."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dpo_lightning.data.packing import Layout, pack
from dpo_lightning.data.tokenization import TokenPair
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import FrozenModel
from dpo_lightning.objective import logps
from dpo_lightning.objective.losses import Sigmoid

#: Prompt, chosen and rejected tokens of eight pairs drawn from human dialogues.
LENGTHS = (
    (217, 49, 80),
    (44, 62, 9),
    (313, 90, 92),
    (98, 17, 45),
    (131, 120, 33),
    (25, 71, 130),
    (180, 8, 58),
    (66, 44, 44),
)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    file = Path(__file__).parents[1] / "benchmarks" / "versus_trl.py"
    spec = importlib.util.spec_from_file_location("versus_trl", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["versus_trl"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    yield module
    del sys.modules["versus_trl"]


def model(family: str) -> PreTrainedModel:
    """Wide enough that products are nearly all of it, as in models that people train."""
    shape = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=2, n_head=4, n_positions=512, **shape)).eval()
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, tie_word_embeddings=False, **sizes, **shape)).eval()


def flops_over_floor(benchmark: ModuleType, family: str, layout: Layout) -> float:
    """FLOPs of a forward and backward of the policy and a forward of the reference, over those that are needed."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    pairs = [TokenPair(*(draw.integers(4096, size=n, dtype=np.int32) for n in lengths)) for lengths in LENGTHS]
    policy, reference = Policy(model(family), layout), FrozenModel()
    reference.prepare(policy)
    batch = pack(pairs, layout, row_tokens=policy.attention.row_tokens)
    with benchmark.flop_counter() as counter:
        Sigmoid()(policy.logps(batch), reference.logps(batch)).mean().backward()
    work = benchmark.Work(*(np.array(column) for column in zip(*LENGTHS, strict=True)))
    return counter.get_total_flops() / len(pairs) / work.floor(policy.model.config, passes=4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_step_computes_hardly_more_than_it_must(benchmark: ModuleType, family: str) -> None:
    """At most a tenth, though the counter takes the half of a causal product that no kernel computes for work."""
    assert 1.0 <= flops_over_floor(benchmark, family, "shared") <= 1.10


def test_padded_rows_compute_more_than_twice_as_much(benchmark: ModuleType) -> None:
    assert flops_over_floor(benchmark, "gpt2", "padded") > 2 * flops_over_floor(benchmark, "gpt2", "shared")


def test_logits_that_are_computed_again_show(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = flops_over_floor(benchmark, "gpt2", "shared")
    monkeypatch.setattr(logps, "KEPT_ELEMENTS", 0)
    assert flops_over_floor(benchmark, "gpt2", "shared") > kept + 0.03


def test_the_floor_of_a_pair_is_what_one_counts_by_hand(benchmark: ModuleType) -> None:
    """One layer without a bias, one pair: 3 prompt tokens, answers of 2 and 1."""
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    matrices = 4 * 4 + 2 * (4 * 2) + 4 * 4 + 3 * (4 * 6)  # query, key and value, output, and three of the MLP
    unread = 2 + 1 + 1  # two of the prompt, and the last of each answer, predict no answer's token
    blocks = 2 * matrices * (3 + 2 + 1) - 2 * (3 * 4 * 6) * unread
    head = 2 * 10 * 4 * (2 + 1)
    seen = 1 + 2 + 3 + 4 + 5 + 4  # by each prompt token, each of the first answer, and the second's
    attention = 2 * 2 * 4 * seen  # scores, and the mean of values, over both heads
    work = benchmark.Work(*(np.array([n]) for n in (3, 2, 1)))
    assert work.floor(config, passes=3) == 3 * (blocks + head + attention)
