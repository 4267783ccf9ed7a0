"""The frozen reference: what it scores, and what it keeps out of."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dpo_lightning.data.packing import LAYOUTS, Layout, pack
from dpo_lightning.errors import InputError
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import FrozenModel
from dpo_lightning.objective.losses import Sigmoid
from tests.families import (
    tiny_model,
)
from tests.oracles import distance, draw_pairs, oracle


class Trained(nn.Module):
    """A policy and its reference side by side, as in the training module."""

    def __init__(self, policy: Policy, reference: FrozenModel) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference
        reference.prepare(policy)


@pytest.fixture
def trained() -> Trained:
    """With dropout, so that a reference that leaves evaluation mode shows."""
    policy = Policy(tiny_model("gpt2", resid_pdrop=0.5))
    return Trained(policy.train(), FrozenModel())


def test_a_frozen_copy_scores_as_the_policy_did_at_the_start_whatever_comes(trained: Trained) -> None:
    batch = pack(draw_pairs(), "shared")
    wanted = oracle("gpt2").logps
    trained.train()
    with torch.no_grad():
        for parameter in trained.policy.parameters():
            parameter.mul_(1.5)
    found = trained.reference.logps(batch)
    assert distance(found.token_logps, wanted) < 1e-5
    assert not found.token_logps.requires_grad
    assert torch.equal(trained.reference.logps(batch).token_logps, found.token_logps)
    assert distance(trained.policy.eval().logps(batch).token_logps, wanted) > 1e-2  # the policy did move


def test_the_reference_gets_no_gradient_and_offers_no_parameter_to_train(trained: Trained) -> None:
    batch = pack(draw_pairs(), "shared")
    Sigmoid()(trained.policy.logps(batch), trained.reference.logps(batch)).mean().backward()
    assert any(p.grad is not None for p in trained.policy.parameters())
    assert all(p.grad is None and not p.requires_grad for p in trained.reference.parameters())
    assert all(p.requires_grad for p in trained.policy.parameters())


def test_the_reference_is_in_no_checkpoint(trained: Trained) -> None:
    names = set(trained.state_dict())
    assert names == {f"policy.{name}" for name in trained.policy.state_dict()} and names
    assert trained.reference.state_dict() == {}


def test_the_reference_stays_in_evaluation_mode(trained: Trained) -> None:
    assert not any(part.training for part in trained.reference.model.modules())
    trained.train()
    assert all(part.training for part in trained.policy.modules())
    assert not any(part.training for part in trained.reference.modules())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_checkpoint_can_be_the_reference(layout: Layout, folders: Callable[..., Path]) -> None:
    other = folders("mistral")
    trained = Trained(Policy(tiny_model("gpt2"), layout), FrozenModel(str(other)))
    found = trained.reference.logps(pack(draw_pairs(), layout)).token_logps
    assert distance(found, oracle("mistral").logps) < 1e-5
    assert trained.reference.model.layout == layout
    assert not any(name.startswith("reference") for name in trained.state_dict())


def test_a_reference_that_cannot_be_loaded_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path / "nowhere")):
        FrozenModel(str(tmp_path / "nowhere")).prepare(Policy(tiny_model("gpt2")))
