"""Sharded policies, of every family: a mesh of one device has every hook that a larger one has.

That several devices compute what one does, and hold a part each, is shown in `tests/e2e`.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, LogitsProcessorList

from dpo_lightning.data.packing import pack
from dpo_lightning.data.tokenization import TokenPair
from dpo_lightning.models.checkpoint import load_policy
from dpo_lightning.models.generation import generating
from dpo_lightning.models.layers import blocks
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.sharding import gathered, like, shard, total_norm
from tests.families import FAMILIES, VOCABULARY, tiny_model


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """One device that is a world of its own."""
    with tempfile.NamedTemporaryFile() as file:
        torch.distributed.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        torch.distributed.destroy_process_group()


@pytest.fixture
def single() -> Iterator[None]:
    """The default type is afterwards what it is for other tests."""
    yield
    torch.set_default_dtype(torch.float32)


def pairs() -> list[TokenPair]:
    draw = np.random.default_rng(0)
    return [TokenPair(*(draw.integers(3, VOCABULARY, size=n, dtype=np.int32) for n in (5, 4, 6))) for _ in range(2)]


def extended(policy: Policy) -> Tensor:
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad(), generating(policy.model, config):
        return policy.extend(tokens, torch.ones_like(tokens), LogitsProcessorList())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_are_the_decoders_layers(family: str) -> None:
    model = tiny_model(family)
    assert len(blocks(model)) == model.config.num_hidden_layers
    assert len({type(block) for block in blocks(model)}) == 1
    inside = sum(p.numel() for block in blocks(model) for p in block.parameters())
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    outside = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in embeddings) - inside
    assert outside < 0.3 * inside  # positions and a norm


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_family_scores_learns_and_generates_sharded_as_it_does_whole(
    mesh: DeviceMesh, folders: Callable[..., Path], single: None, family: str, checkpointing: bool
) -> None:
    precision, rtol, atol = (torch.float64, 1e-9, 1e-12) if family != "mixtral" else (torch.float32, 1e-4, 1e-5)
    torch.set_default_dtype(precision)  # the products of a mixture of experts take no float64
    whole = load_policy(str(folders(family)), gradient_checkpointing=checkpointing)
    sharded = copy.deepcopy(whole)
    shard(sharded, mesh)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    batch = pack(pairs(), whole.layout)
    torch.testing.assert_close(extended(sharded), extended(whole))
    for policy in (whole, sharded):
        policy.logps(batch, ("mean_logits",)).logps.square().mean().backward()
    with torch.no_grad():
        found, expected = sharded.logps(batch).token_logps, whole.logps(batch).token_logps
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.grad is not None}
    other = {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.grad is not None}
    assert other.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(other[name], gradient, rtol=rtol, atol=atol)
    assert len(gradients) > 5
    norm = total_norm([parameter.grad for parameter in sharded.parameters() if parameter.grad is not None])
    torch.testing.assert_close(norm, total_norm(list(gradients.values())))
    assert not isinstance(norm, DTensor)


def test_what_is_gathered_is_the_state_before_with_tied_weights_still_tied(mesh: DeviceMesh) -> None:
    policy = Policy(tiny_model("gpt2"))
    expected = copy.deepcopy(policy.state_dict())
    shard(policy, mesh)
    found = gathered(policy.state_dict(keep_vars=True), keep=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and not found[name].requires_grad for name in expected)
    head, embeddings = (found[f"model.{name}.weight"] for name in ("lm_head", "transformer.wte"))
    assert head.data_ptr() == embeddings.data_ptr()
    dropped = gathered(policy.state_dict(keep_vars=True), keep=False)
    assert dropped.keys() == expected.keys() and sum(value.numel() for value in dropped.values()) == 0


def test_a_whole_tensor_is_sharded_like_its_example_and_back(mesh: DeviceMesh) -> None:
    policy = Policy(tiny_model("gpt2"))
    plain = next(policy.parameters()).detach().clone()
    assert like(plain, plain) is plain
    shard(policy, mesh)
    example = next(policy.parameters())
    sharded = like(2 * plain.double(), example)
    assert isinstance(sharded, DTensor) and sharded.placements == example.placements
    assert torch.equal(gathered(sharded, keep=True), 2 * plain)
