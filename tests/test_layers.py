"""The last layer's feed-forward block goes over what is read, and nothing that is read becomes another."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_lightning.data.packing import LAYOUTS, Layout, PreferenceBatch, pack
from dpo_lightning.errors import InputError
from dpo_lightning.models import policy as policy_module
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.models.checkpoint import load_policy
from dpo_lightning.models.layers import last_feed_forward, only_at
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import FrozenModel
from tests.families import FAMILIES, tiny_model
from tests.oracles import distance, draw_pairs, flat_gradient

#: Those whose block has another name, and one that is given something beside the states.
OTHERS = ("opt", "mpt", "mamba")
BLOOM = "bloom"
WITH_BLOCK = [family for family in FAMILIES if family not in (*OTHERS, BLOOM)]


def seen_by(block: nn.Module, work: Callable[[], object]) -> list[int]:
    """Places that a block goes over, at each call."""
    found: list[int] = []
    own = block.forward

    def forward(states: Tensor) -> Tensor:
        found.append(states.shape[0] * states.shape[1])
        return own(states)

    block.forward = forward
    try:
        work()
    finally:
        del block.forward
    return found


def last_block(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule(last_feed_forward(model))


def laid_out(policy: Policy) -> PreferenceBatch:
    return pack(draw_pairs(), policy.layout, row_tokens=policy.attention.row_tokens)


def scores_and_gradient(policy: Policy) -> tuple[Tensor, Tensor]:
    found = policy.logps(laid_out(policy))
    weight = torch.linspace(-1, 1, len(found.logps))
    return found.token_logps.detach(), flat_gradient((found.logps * weight).sum(), policy.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_of_the_usual_name_is_found_in_the_last_layer(family: str) -> None:
    name = last_feed_forward(tiny_model(family))
    assert (not name) == (family in OTHERS)
    if name:
        assert name.endswith(".1.mlp")  # of two layers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", WITH_BLOCK)
def test_it_goes_over_what_is_read_and_scores_and_gradients_stay(family: str, layout: Layout) -> None:
    if layout != "padded" and Policy(tiny_model(family)).layout == "padded":
        pytest.skip("the family reads padded rows only")
    short, long = (Policy(tiny_model(family), layout) for _ in range(2))
    assert short.shortened
    long.shortened = ""
    batch = laid_out(short)
    assert seen_by(last_block(short.model), lambda: short.logps(batch)) == [len(batch.read)]
    assert seen_by(last_block(long.model), lambda: long.logps(batch)) == [batch.tokens.numel()]
    assert len(batch.read) < 0.7 * batch.tokens.numel()
    for found, wanted in zip(scores_and_gradient(short), scores_and_gradient(long), strict=True):
        assert distance(found, wanted) < 1e-5


def test_a_block_that_is_given_more_than_states_goes_over_all() -> None:
    assert not Policy(tiny_model(BLOOM)).shortened


def test_why_a_layout_is_refused_is_said_of_the_whole_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both fail, the shortened block's fault may be its own."""
    monkeypatch.setattr(
        policy_module, "self_check", lambda policy: "it is short" if policy.shortened else "it is wrong"
    )
    with pytest.raises(InputError, match="it is wrong") as refused:
        Policy(tiny_model("llama"))
    assert "it is short" not in str(refused.value)


def test_what_is_read_is_what_predicts_an_answers_token_each_place_once() -> None:
    batch = pack(draw_pairs(), "shared")
    assert batch.read.tolist() == sorted({*batch.source.tolist()})
    assert len(batch.read) < len(batch.source)  # a prompt's last token predicts two


def test_layers_that_are_computed_again_in_backward_go_over_all() -> None:
    policy = Policy(tiny_model("llama")).train()
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = laid_out(policy)
    seen = seen_by(last_block(policy.model), lambda: policy.logps(batch).logps.sum().backward())
    assert seen == [batch.tokens.numel()] * 2
    # Where none is computed again, too: a reference has the same bits.
    reference = FrozenModel()
    reference.prepare(policy)
    for model in (policy.eval(), reference.model):
        assert seen_by(last_block(model.model), lambda model=model: model.logps(batch)) == [batch.tokens.numel()]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(policy.train().logps(batch).token_logps, reference.logps(batch).token_logps)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "mixtral"])
def test_under_autocast_it_is_short_by_no_more_than_rounding(family: str) -> None:
    short, long = (Policy(tiny_model(family)) for _ in range(2))
    long.shortened = ""
    batch = laid_out(short)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = (policy.logps(batch).token_logps for policy in (short, long))
    exact = long.logps(batch).token_logps
    assert (found - wanted).abs().max() <= (wanted - exact).abs().max()
    gradients = [flat_gradient(scores.sum(), p.model) for scores, p in ((found, short), (wanted, long), (exact, long))]
    assert distance(gradients[0], gradients[1]) <= distance(gradients[1], gradients[2]) < 0.1


def test_an_adapter_learns_the_same(folders: Callable[..., Path]) -> None:
    gradients = []
    for shortened in (True, False):
        torch.manual_seed(0)
        policy = load_policy(str(folders("llama")), lora=LoRA(r=2))
        assert policy.shortened
        policy.shortened = policy.shortened if shortened else ""
        batch = laid_out(policy)
        gradients.append(
            flat_gradient(policy.logps(batch).logps @ torch.linspace(-1, 1, batch.num_answers), policy.model)
        )
    assert gradients[0].any() and distance(*gradients) < 1e-5


def test_a_reference_computes_with_its_own_block() -> None:
    policy, reference = Policy(tiny_model("gpt2")), FrozenModel()
    reference.prepare(policy)
    batch = laid_out(policy)
    before = reference.logps(batch).token_logps
    assert seen_by(last_block(reference.model.model), lambda: reference.logps(batch)) == [len(batch.read)]
    with torch.no_grad():
        for parameter in last_block(policy.model).parameters():
            parameter.zero_()
    assert torch.equal(reference.logps(batch).token_logps, before)
    assert not torch.equal(policy.logps(batch).token_logps, before)


def test_the_policys_weights_have_the_names_that_they_had() -> None:
    policy = Policy(tiny_model("llama"))
    assert policy.shortened
    assert all(name.startswith("model.") for name in policy.state_dict())
    assert copy.deepcopy(policy).state_dict().keys() == policy.state_dict().keys()


class Blurred(nn.Module):
    """A block that mixes neighbours: it sees one place before its own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, states: Tensor) -> Tensor:
        return self.block(states + 0.3 * states.roll(1, dims=1) * (torch.arange(states.shape[1]) > 0)[None, :, None])


def blurred() -> PreTrainedModel:
    model = tiny_model("llama")
    layer = model.model.layers[-1]
    layer.mlp = Blurred(layer.mlp)
    return model


def test_a_block_that_mixes_places_goes_over_all_of_them() -> None:
    policy = Policy(blurred(), "padded")
    assert not policy.shortened
    batch = laid_out(policy)
    assert seen_by(last_block(policy.model), lambda: policy.logps(batch)) == [batch.tokens.numel()]


def test_nothing_stays_hooked_where_a_forward_fails() -> None:
    block = nn.Linear(3, 3)
    with pytest.raises(RuntimeError), only_at(block, torch.tensor([1])):
        block(torch.zeros(1, 4, 7))
    assert not block._forward_hooks and not block._forward_pre_hooks
    assert block(torch.ones(1, 4, 3)).ne(0).all()


def test_elsewhere_it_is_zero_and_gives_no_gradient() -> None:
    block, places = nn.Linear(3, 3), torch.tensor([0, 5, 6])
    states = torch.randn(2, 4, 3, requires_grad=True)
    with only_at(block, places):
        found = block(states)
    assert found.shape == states.shape
    rows = found.flatten(0, 1)
    torch.testing.assert_close(rows[places], block(states).flatten(0, 1)[places])
    assert [n for n, row in enumerate(rows) if row.any()] == places.tolist()
    found.sum().backward()
    assert [n for n, row in enumerate(states.grad.flatten(0, 1)) if row.any()] == places.tolist()
