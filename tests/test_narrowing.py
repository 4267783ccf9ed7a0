"""A frozen model's matrices, cast once: the same bits under autocast, in half of the memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dpo_lightning.data.packing import LAYOUTS, Layout, PreferenceBatch, pack
from dpo_lightning.models.narrowing import narrow
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import FrozenModel, MovingReference
from tests.families import FAMILIES, tiny_model
from tests.oracles import draw_pairs


def bytes_of(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@torch.no_grad()
def under_autocast(model: Policy | FrozenModel, batch: PreferenceBatch) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.logps(batch).token_logps


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reference_scores_the_same_bits_from_matrices_that_were_cast_once(family: str) -> None:
    policy, reference = Policy(tiny_model(family)), FrozenModel()
    reference.prepare(policy)
    batch = pack(draw_pairs(), policy.layout)
    found = [under_autocast(reference, batch) for _ in range(2)]
    assert all(torch.equal(scores, under_autocast(policy, batch)) for scores in found)
    assert reference.narrowed == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert reference.differences(policy) == []


def test_of_a_model_that_is_mostly_matrices_half_of_the_memory_is_left() -> None:
    policy, reference = Policy(tiny_model("llama", hidden_size=128, num_attention_heads=4)), FrozenModel()
    reference.prepare(policy)
    whole = bytes_of(reference)
    under_autocast(reference, pack(draw_pairs(), policy.layout))
    assert bytes_of(reference) < 0.6 * whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_single_precision_nothing_is_cast(layout: Layout) -> None:
    policy, reference = Policy(tiny_model("llama"), layout), FrozenModel()
    reference.prepare(policy)
    reference.logps(pack(draw_pairs(), layout))
    assert reference.narrowed is None and {p.dtype for p in reference.parameters()} == {torch.float32}


def test_once_cast_it_is_used_under_autocast_wherever_it_is_asked() -> None:
    policy, reference = Policy(tiny_model("gpt2")), FrozenModel()
    reference.prepare(policy)
    batch = pack(draw_pairs(), policy.layout)
    wanted = under_autocast(reference, batch)
    assert torch.equal(reference.logps(batch).token_logps, wanted)


def test_a_reference_that_moves_keeps_its_precision() -> None:
    policy, reference = Policy(tiny_model("gpt2")), MovingReference(alpha=0.5, every=1)
    reference.prepare(policy)
    under_autocast(reference, pack(draw_pairs(), policy.layout))
    assert {p.dtype for p in reference.parameters()} == {torch.float32}


def test_another_models_weights_are_still_found_when_they_are_cast(folders: Callable[..., Path]) -> None:
    policy, reference = Policy(tiny_model("gpt2")), FrozenModel()
    reference.prepare(policy)
    with torch.no_grad():
        next(p for name, p in policy.named_parameters() if "c_attn.weight" in name).mul_(1.1)
    under_autocast(reference, pack(draw_pairs(), policy.layout))
    [fault] = reference.differences(policy)
    assert "1 of the reference's" in fault and "c_attn.weight" in fault


class Wide(nn.Module):
    """A linear layer that is used in single precision on purpose, autocast or not."""

    def __init__(self, guarded: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.guarded = guarded

    def forward(self, states: Tensor) -> Tensor:
        if self.guarded:
            with torch.autocast("cpu", enabled=False):
                return self.inner(states)
        return (states[:, None] * self.inner.weight).sum(-1)


@pytest.mark.parametrize("guarded", [True, False])
@torch.no_grad()
def test_a_model_that_would_compute_something_else_is_left_as_it_was(guarded: bool) -> None:
    torch.manual_seed(0)
    model, states = Wide(guarded), torch.randn(3, 8)

    def score() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(states)

    before, wanted = model.inner.weight, score()
    assert narrow(model, torch.bfloat16, score) == set()
    assert model.inner.weight is before and torch.equal(score(), wanted)


class Short(nn.Module):
    """A model for which there is no memory a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.calls = 0

    def forward(self) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise torch.OutOfMemoryError
        return self.inner(torch.ones(8))


@torch.no_grad()
def test_a_lack_of_memory_is_not_taken_for_a_difference_and_leaves_the_model_as_it_was() -> None:
    model = Short()
    before = model.inner.weight
    with pytest.raises(torch.OutOfMemoryError):
        narrow(model, torch.bfloat16, model)
    assert model.inner.weight is before
