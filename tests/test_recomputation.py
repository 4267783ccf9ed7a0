"""What backward makes again is what forward had made, to the bit, and is not kept in between."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from dpo_lightning.data.packing import pack
from dpo_lightning.models import policy as policy_module
from dpo_lightning.models import recomputation
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.models.checkpoint import load_policy
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.recomputation import computed_again, telling
from dpo_lightning.training.footprint import KeptForBackward
from tests.families import FAMILIES, VOCABULARY, tiny_model
from tests.oracles import draw_pairs, flat_gradient


def half() -> AbstractContextManager[None]:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)  # as Lightning has it


@contextmanager
def everything_kept() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_module, "computed_again", lambda model: nullcontext())
        yield


def scores_and_gradient(policy: Policy) -> tuple[Tensor, Tensor]:
    batch = pack(draw_pairs(), policy.layout, row_tokens=policy.attention.row_tokens)
    found = policy.logps(batch)
    weight = torch.linspace(-1, 1, len(found.logps))
    return found.token_logps.detach(), flat_gradient((found.logps * weight).sum(), policy.model)


def kept_bytes(policy: Policy) -> int:
    """Bytes that the decoder keeps for backward, beside its weights."""
    batch = policy.lay_out(draw_pairs([(20, 9, 6), (11, 14, 8)] * 3))
    kept = KeptForBackward([*policy.parameters(), *policy.buffers()], None)
    with kept.counting():
        hidden = policy.hidden(batch)
    assert hidden.requires_grad
    return kept.close()


@pytest.mark.parametrize("precision", [nullcontext, half])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_are_the_same_to_the_bit(
    family: str, precision: Callable[[], AbstractContextManager[None]]
) -> None:
    policy = Policy(tiny_model(family))
    with precision():
        found = scores_and_gradient(policy)
        with everything_kept():
            wanted = scores_and_gradient(policy)
    assert wanted[1].any()
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", [nullcontext, half])
def test_an_adapters_gradients_too(
    folders: Callable[..., Path], precision: Callable[[], AbstractContextManager[None]]
) -> None:
    for family in ("gpt2", "llama"):
        policy = load_policy(str(folders(family)), lora=LoRA(r=2))
        with precision():
            found = scores_and_gradient(policy)
            with everything_kept():
                wanted = scores_and_gradient(policy)
        assert wanted[1].any() and all(map(torch.equal, found, wanted))


def wide_gpt2() -> Policy:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=2, n_positions=128, activation_function="gelu"
    )
    return Policy(GPT2LMHeadModel(config).eval())


def wide_llama() -> Policy:
    shape = {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 3, "num_attention_heads": 2}
    return Policy(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **shape)).eval())


@pytest.mark.parametrize(
    ("make", "precision", "share"),
    [
        (wide_gpt2, nullcontext, 0.75),
        (wide_gpt2, half, 0.65),
        (wide_llama, nullcontext, 0.85),
        (wide_llama, half, 0.75),
    ],
)
def test_much_less_is_kept(
    make: Callable[[], Policy], precision: Callable[[], AbstractContextManager[None]], share: float
) -> None:
    policy = make()
    with precision():
        found = kept_bytes(policy)
        with everything_kept():
            assert found < share * kept_bytes(policy)


class Block(nn.Module):
    """Each thing that is made again, and some that look like it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8, eps=1e-3)
        self.gate, self.up, self.down, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, states: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        states = self.norm(states)
        return self.out(self.down(activation(self.gate(states)) * self.up(states)))


def kept_of(work: Callable[[], object], model: nn.Module) -> list[Tensor]:
    found: list[Tensor] = []
    with computed_again(model), telling(found.append):
        work()
    return found


@pytest.mark.parametrize("activation", [silu, gelu, lambda states: gelu(states, approximate="tanh")])
def test_norms_activations_and_their_products_are_made_again(activation: Callable[[Tensor], Tensor]) -> None:
    block, states = Block(), torch.randn(5, 8, requires_grad=True)
    kept = kept_of(lambda: block(states, activation), block)
    normed = block.norm(states)
    gate, up = block.gate(normed), block.up(normed)
    made = (normed, activation(gate), activation(gate) * up)
    assert not any(tensor.shape == one.shape and torch.equal(tensor, one) for tensor in kept for one in made)
    for one in (states, gate, up, block.down(made[-1])):
        assert any(tensor.shape == one.shape and torch.equal(tensor, one) for tensor in kept)


def test_nothing_is_computed_a_second_time_in_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("gelu", "silu", "layer_norm"):
        own = getattr(recomputation, name)
        monkeypatch.setattr(
            recomputation, name, lambda *a, own=own, name=name, **k: (calls.append(name), own(*a, **k))[1]
        )
    block, states = Block(), torch.randn(5, 8, requires_grad=True)
    with computed_again(block):
        found = block(states, silu)
    assert not calls
    found.sum().backward()
    assert {*calls} == {"silu", "layer_norm"}


class OwnNorm(nn.LayerNorm):
    """Has an epsilon of its own."""

    def forward(self, states: Tensor) -> Tensor:
        return layer_norm(states, self.normalized_shape, self.weight, self.bias, 0.5)


class Unnamed(nn.Module):
    """By a weight of no norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, states: Tensor) -> Tensor:
        return layer_norm(states, (8,), self.weight, None, 0.5)


def one_weight_two_epsilons() -> nn.Module:
    norms = nn.Sequential(nn.LayerNorm(8, eps=0.5), nn.LayerNorm(8, eps=1e-3))
    norms[1].weight = norms[0].weight
    return norms


@pytest.mark.parametrize("make", [lambda: OwnNorm(8), Unnamed, one_weight_two_epsilons])
def test_a_norm_of_unknown_epsilon_is_kept(make: Callable[[], nn.Module]) -> None:
    norm, layer, states = make(), nn.Linear(8, 8), torch.randn(5, 8, requires_grad=True)
    same(lambda: layer(norm(states)).square().sum(), nn.ModuleList([norm, layer]), states, layer.weight)


def same(work: Callable[[], Tensor], model: nn.Module, *leaves: Tensor) -> None:
    """The same gradients as where all is kept."""
    wanted = torch.autograd.grad(work(), leaves)
    with computed_again(model):
        found = work()
    assert all(map(torch.equal, torch.autograd.grad(found, leaves), wanted))


def test_a_product_with_what_has_no_gradient_is_kept() -> None:
    states, mask, layer = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8), nn.Linear(8, 8)
    same(lambda: layer(silu(states) * mask).sum(), layer, states, layer.weight)


def test_what_is_sliced_transposed_or_not_contiguous_comes_back_as_it_was() -> None:
    layer, states, factor = nn.Linear(6, 6), torch.randn(6, 4, 6, requires_grad=True), torch.randn(5, 4, 6)
    factor.requires_grad_()

    def work() -> Tensor:
        turned = gelu(states.transpose(0, 2))  # of strides of its own
        sliced = gelu(states)[1:] * factor
        return (layer(gelu(states).transpose(0, 1)[1:, ::2]).sum() + layer(turned.transpose(0, 2)).sum()) * sliced.sum()

    same(work, layer, states, layer.weight, factor)


def test_what_was_rounded_on_the_way_is_rounded_again() -> None:
    layer, norm, states = nn.Linear(8, 8, bias=False), nn.LayerNorm(8), torch.randn(5, 8, requires_grad=True)

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(torch.bfloat16).float()

    same(lambda: (states @ rounded(layer.weight)).square().sum(), layer, states, layer.weight)
    for make in (norm, gelu):
        same(lambda make=make: layer(rounded(make(states))).square().sum(), norm, states, layer.weight)


def test_what_was_written_over_is_kept() -> None:
    layer, states = nn.Linear(8, 8), torch.randn(5, 8, requires_grad=True)

    def work() -> Tensor:
        found = gelu(states)
        with torch.no_grad():
            found.clamp_(max=0.5)
        return layer(found).sum()

    same(work, layer, states, layer.weight)


def change_what_is_kept(states: Tensor, layer: nn.Linear) -> Tensor:
    factor = states * 1
    found = layer(factor)
    factor.add_(1)
    return found


def change_an_activations_input(states: Tensor, layer: nn.Linear) -> Tensor:
    given = states * 1
    found = layer(gelu(given))
    given.add_(1)
    return found


def change_a_result(states: Tensor, layer: nn.Linear) -> Tensor:
    found = layer(states).exp()
    return found.add_(1)


@pytest.mark.parametrize("work", [change_what_is_kept, change_an_activations_input, change_a_result])
def test_what_is_changed_in_place_is_noticed(work: Callable[[Tensor, nn.Linear], Tensor]) -> None:
    """As autograd notices it of what it keeps itself."""
    layer, states = nn.Linear(8, 8), torch.randn(3, 8, requires_grad=True)
    with computed_again(layer):
        found = work(states, layer)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        found.sum().backward()
    with pytest.raises(RuntimeError, match="inplace operation"):
        work(states, layer).sum().backward()


@pytest.mark.parametrize("work", [torch.tanh, torch.exp, lambda states: states.softmax(-1), gelu])
def test_a_graph_that_is_dropped_leaves_nothing(work: Callable[[Tensor], Tensor]) -> None:
    """A node that kept what it gave itself would keep itself, and no collector sees that."""
    layer, states = nn.Linear(8, 8), torch.randn(3, 8, requires_grad=True)
    kept = KeptForBackward([], None)
    for context in (computed_again(layer), kept.counting()):
        with context:
            found = work(layer(states))
        kept.close()
        alive = weakref.ref(found)
        del found
        assert alive() is None


def test_layers_that_are_checkpointed_are_left_alone() -> None:
    """OPT-350m's last layer ends in a norm that a projection outside of it reads."""
    shape = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "dropout": 0.0}
    config = OPTConfig(vocab_size=VOCABULARY, do_layer_norm_before=False, word_embed_proj_dim=16, **shape)
    policy = Policy(OPTForCausalLM(config).eval())
    wanted = scores_and_gradient(policy)
    policy.train().model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(map(torch.equal, scores_and_gradient(policy), wanted))


def test_a_weight_that_has_changed_is_noticed() -> None:
    """As autograd notices it of what it keeps itself."""
    layer, states = nn.Linear(8, 8), torch.randn(3, 8, requires_grad=True)
    with half(), computed_again(layer):
        found = layer(states).sum()
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        found.backward()


def test_a_second_derivative_is_refused() -> None:
    layer, states = nn.Linear(8, 8), torch.randn(3, 8, requires_grad=True)
    with computed_again(layer):
        found = layer(gelu(states)).square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(found, [layer.weight], create_graph=True)


def test_the_memory_plan_counts_what_is_kept_and_no_more() -> None:
    layer, states = nn.Linear(64, 64), torch.randn(100, 64, requires_grad=True)
    kept = KeptForBackward([*layer.parameters(), states], None)
    with kept.counting(), computed_again(layer):
        found = layer(gelu(layer(states)))
    assert kept.close() == 100 * 64 * 4  # the activation's input
    assert recomputation.TOLD.get() is None
    del found
