"""The frozen reference: what it scores, and what it keeps out of; and the one that moves."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dpo_lightning.data.packing import LAYOUTS, Layout, pack
from dpo_lightning.errors import InputError
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import FrozenModel, MovingReference
from dpo_lightning.objective.losses import Sigmoid
from tests.families import tiny_model
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reference", [FrozenModel(), MovingReference()])
def test_a_copy_differs_in_nothing(layout: Layout, reference: FrozenModel) -> None:
    policy = Policy(tiny_model("llama"), layout)
    reference.prepare(policy)
    assert reference.is_start and reference.differences(policy) == []


def test_another_checkpoint_differs_and_says_that_it_is_none_of_the_start(folders: Callable[..., Path]) -> None:
    reference, policy = FrozenModel(str(folders("gpt2", n_layer=3))), Policy(tiny_model("gpt2"))
    reference.prepare(policy)
    assert not reference.is_start
    found = reference.differences(policy)
    assert "12 tensors that the other has not, transformer.h.2" in found[0]  # the third layer's
    assert "other values than the policy's" in found[1]


@torch.no_grad()
def train(policy: Policy) -> None:
    """As if: every weight becomes another."""
    for parameter in policy.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


def test_a_moving_reference_moves_when_it_is_due_and_the_policy_stays() -> None:
    policy, reference = Policy(tiny_model("gpt2")), MovingReference(alpha=0.25, every=3)
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    reference.prepare(policy)
    train(policy)
    after = [parameter.detach().clone() for parameter in policy.parameters()]
    for step in (1, 2, 4, 5):
        reference.follow(policy, step)
        assert all(map(torch.equal, reference.model.parameters(), before))
    reference.follow(policy, 3)
    for own, first, last in zip(reference.model.parameters(), before, after, strict=True):
        assert torch.allclose(own, 0.25 * last + 0.75 * first, atol=1e-6) and not own.requires_grad
    assert all(map(torch.equal, policy.parameters(), after))


def test_a_frozen_reference_does_not_follow(trained: Trained) -> None:
    before = [parameter.clone() for parameter in trained.reference.parameters()]
    train(trained.policy)
    trained.reference.follow(trained.policy, 512)
    assert all(map(torch.equal, trained.reference.parameters(), before))


def test_a_moving_reference_is_in_every_checkpoint_and_comes_back_from_it() -> None:
    moved, fresh = (Trained(Policy(tiny_model("gpt2")), MovingReference(every=1)) for _ in range(2))
    train(moved.policy)
    moved.reference.follow(moved.policy, 1)
    assert moved.reference.differences(fresh.policy) != []
    state = {name: tensor.clone() for name, tensor in moved.state_dict().items()}
    assert len(state) == 2 * len(moved.policy.state_dict())
    fresh.load_state_dict(state)
    assert all(map(torch.equal, fresh.reference.parameters(), moved.reference.parameters()))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"alpha": 0.0}, r"MovingReference\.alpha must be in \(0, 1\], got 0.0"),
        ({"alpha": 1.01}, r"MovingReference\.alpha must be in \(0, 1\], got 1.01"),
        ({"alpha": float("nan")}, r"MovingReference\.alpha must be in \(0, 1\], got nan"),
        ({"every": 0}, r"MovingReference\.every must be at least 1, got 0"),
    ],
)
def test_a_move_that_would_be_none_or_too_far_is_refused(options: dict[str, float], named: str) -> None:
    with pytest.raises(InputError, match=named):
        MovingReference(**options)
