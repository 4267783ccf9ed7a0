"""Attention of all trees in one kernel. It runs on a GPU only, so that here a plain one stands in for the kernel."""

import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dpo_lightning.data.packing import pack
from dpo_lightning.models import attention, varlen
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.varlen import Sequences, agrees, with_gradients
from tests.families import tiny_model
from tests.oracles import assert_agrees, draw_pairs, oracle

CPU = torch.device("cpu")


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What PyTorch documents of `varlen_attn`, one query after another: queries are the last of their keys.

    In single precision inside, as kernels are.
    """
    dtype = query.dtype
    query, key, value = query.float(), key.float(), value.float()
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size[1] == 0
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_q[-1] == len(query) and cu_seq_k[-1] == len(key) == len(value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = (s.repeat_interleave(query.shape[1] // s.shape[1], dim=1) for s in (key, value))
    rows = []
    for (a, b), (c, d) in zip(cu_seq_q.unfold(0, 2, 1).tolist(), cu_seq_k.unfold(0, 2, 1).tolist(), strict=True):
        for place in range(a, b):
            last = d - (b - place) + 1
            first = c if window_size[0] < 0 else max(c, last - 1 - window_size[0])
            scores = torch.einsum("hd,khd->hk", query[place], key[first:last]) * scale
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), value[first:last]))
    return torch.stack(rows).to(dtype)


@pytest.fixture
def plain_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets a function stand in for the kernel, and this machine for a GPU; the first call forgets what had agreed."""

    def set_up(function: Callable[..., Tensor] = kernel) -> None:
        agrees.cache_clear()
        monkeypatch.setattr(varlen, "varlen_attn", lambda: function)

    yield set_up
    agrees.cache_clear()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "mistral"])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_one_kernel_gives_the_values_and_gradients_of_separate_forwards(
    family: str, layout: str, plain_kernel: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_kernel()
    calls: list[int] = []

    def counted(self: attention.Trees, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> bool:
        calls.append(1)
        return True

    model = tiny_model(family)
    policy, wanted = Policy(model, layout), oracle(family)
    monkeypatch.setattr(attention.Trees, "at_once", counted)
    monkeypatch.setattr("tests.oracles.ROW_TOKENS", policy.attention.row_tokens)
    assert_agrees(model, layout, wanted, share=1e-5)
    assert calls


def test_it_is_never_asked_for_on_a_cpu() -> None:
    policy = Policy(tiny_model("gpt2"))
    trees = policy.attention(pack(draw_pairs(), "shared"))["trees"]
    states = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)
    assert not trees.at_once(states, states, states, None)


def first_gradient(policy: Policy) -> Tensor:
    """Of a step under autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        policy.logps(policy.lay_out(draw_pairs())).logps.mean().backward()
    return next(parameter.grad for parameter in policy.parameters())


@pytest.mark.parametrize("asked_in", ["a step", "a validation in inference mode", "layers that are computed again"])
def test_it_is_trusted_wherever_a_model_first_asks_for_it(
    asked_in: str, plain_kernel: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a step would be computed twice, or nothing has gradients, the comparison with the plain way still has."""
    calls: list[int] = []

    def counted(*arguments: object, **options: object) -> Tensor:
        calls.append(1)
        return kernel(*arguments, **options)

    plain_kernel(counted)
    policy = Policy(tiny_model("llama")).train()
    wanted = first_gradient(policy).clone()
    policy.zero_grad()
    assert not calls
    monkeypatch.setattr(attention, "on_gpu", lambda states: True)
    if asked_in == "a validation in inference mode":
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            policy.logps(policy.lay_out(draw_pairs()))
    elif asked_in == "layers that are computed again":
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = first_gradient(policy)
    assert agrees.cache_info().currsize == 1 and agrees(CPU, torch.bfloat16, 4, 2, 8, None)
    assert len(calls) >= 1 + 2  # the comparison, and both layers
    assert_close(found, wanted, rtol=0.1, atol=0.05 * wanted.abs().max().item())


def test_a_kernel_that_is_not_trusted_is_not_used(
    plain_kernel: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_kernel(refuses)
    policy = Policy(tiny_model("llama")).train()
    wanted = first_gradient(policy).clone()
    policy.zero_grad()
    monkeypatch.setattr(attention, "on_gpu", lambda states: True)
    assert torch.equal(first_gradient(policy), wanted)


def test_values_of_another_width_than_keys_are_none_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "on_gpu", lambda states: True)
    monkeypatch.setattr(attention, "agrees", lambda *_: True)
    policy = Policy(tiny_model("llama"))
    trees = policy.attention(policy.lay_out(draw_pairs()))["trees"]
    wide, narrow = (torch.zeros(1, 4, 8, width, dtype=torch.bfloat16) for width in (16, 8))
    assert trees.at_once(wide, wide, wide, None) and not trees.at_once(wide, wide, narrow, None)


@pytest.mark.parametrize("shape", [(2, 2, 8), (4, 2, 8)])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_kernel_is_trusted(
    shape: tuple[int, int, int], window: int | None, dtype: torch.dtype, plain_kernel: Callable[..., None]
) -> None:
    plain_kernel()
    assert agrees(CPU, dtype, *shape, window)


def whole(*arguments: object, window_size: tuple[int, int], **options: object) -> Tensor:
    """Forgets the window."""
    return kernel(*arguments, window_size=(-1, 0), **options)


def wider(*arguments: object, window_size: tuple[int, int], **options: object) -> Tensor:
    """One token too wide."""
    return kernel(*arguments, window_size=(window_size[0] + 1, 0), **options)


def from_the_left(
    query: Tensor, key: Tensor, value: Tensor, q: Tensor, k: Tensor, *sizes: int, **options: object
) -> Tensor:
    """Queries are the first of their keys."""
    firsts = torch.cat(
        [torch.arange(c, c + b - a) for (a, b), c in zip(q.unfold(0, 2, 1).tolist(), k.tolist(), strict=False)]
    )
    return kernel(query, key[firsts], value[firsts], q, q, sizes[0], sizes[0], **options)


def no_gradient_of_keys(query: Tensor, key: Tensor, value: Tensor, *others: object, **options: object) -> Tensor:
    return kernel(query, key.detach() + 0 * key, value, *others, **options)


def refuses(*_: object, **__: object) -> Tensor:
    raise RuntimeError("no kernel for this head dimension")


def older(query: Tensor, key: Tensor, value: Tensor, *others: object, is_causal: bool = False) -> Tensor:
    """PyTorch 2.10's, which has no such options."""
    raise AssertionError


@pytest.mark.parametrize("wrong", [whole, wider, from_the_left, no_gradient_of_keys, refuses, older])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_kernel_is_not_trusted(
    wrong: Callable[..., Tensor], dtype: torch.dtype, plain_kernel: Callable[..., None]
) -> None:
    plain_kernel(wrong)
    assert not agrees(CPU, dtype, 4, 2, 8, 16)


def test_without_the_kernel_there_is_none_to_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> types.ModuleType:
        raise ImportError(name)

    agrees.cache_clear()
    monkeypatch.setattr(varlen, "import_module", missing)
    assert not agrees(CPU, torch.bfloat16, 2, 2, 8, None)
    agrees.cache_clear()


def test_under_autocast_it_computes_in_half_precision(plain_kernel: Callable[..., None]) -> None:
    plain_kernel()
    batch = pack(draw_pairs(), "shared", row_tokens=10**6)
    query, key, value = (torch.randn(1, 2, batch.tokens.numel(), 8) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = Sequences.of(batch).attend(query, key, value, None, None)
    single = Sequences.of(batch).attend(query, key, value, None, None)
    assert half.dtype == torch.bfloat16 and single.dtype == torch.float32
    assert_close(half.float(), single, rtol=0.05, atol=0.05)


def test_gradients_are_those_of_the_function() -> None:
    states = [torch.randn(2, 3, dtype=torch.float64) for _ in range(3)]
    slope = torch.randn(2, 3, dtype=torch.float64)
    value, *gradients = with_gradients(states, slope, lambda a, b, c: a * b + c)
    assert_close(value, (states[0] * states[1] + states[2]).float())
    assert_close(gradients, [(slope * s).float() for s in (states[1], states[0], torch.ones(()))])
