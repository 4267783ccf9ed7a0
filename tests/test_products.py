"""Attention written out in products of bf16: the values and gradients of sequences one by one, whatever the CPU."""

from threading import Event, Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_lightning.data.packing import Span, pack, visible
from dpo_lightning.data.tokenization import TokenPair
from dpo_lightning.models import attention, products
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.products import Blocks, WrittenOut, agrees, blocks, multiplied_in_bf16, quicker
from dpo_lightning.models.varlen import TREES, one_by_one, with_gradients
from tests.families import tiny_model
from tests.oracles import distance, dpo, draw_pairs, flat_gradient, oracle

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"), reason="needs PyTorch 2.9"
)

#: Lengths around those of a block, one token, and no second answer.
LONG = (Span(0, 127, 1, 129), Span(257, 300, 57, 260), Span(874, 1, 1, 1), Span(877, 65, 64, 0))


@pytest.fixture
def written_out(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets this machine be one that attention is written out on, however narrow the model; counts the layers."""
    calls: list[int] = []

    def counted(self: Blocks, *arguments: object) -> Tensor:
        calls.append(1)
        return own(self, *arguments)

    own = Blocks.attend
    monkeypatch.setattr(attention, "quicker", lambda: True)
    monkeypatch.setattr(products, "WIDTH", 0)
    monkeypatch.setattr(Blocks, "attend", counted)
    return calls


def drawn(heads: int, key_heads: int, width: int, tokens: int) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, and a slope of what they give, in bf16."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, heads, tokens, width)] + 2 * [(1, key_heads, tokens, width)] + [(1, tokens, heads, width)]
    *states, slope = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    states[0] *= 3  # some queries see one key only
    return states, slope


@pytest.mark.parametrize("trees", [TREES, LONG])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(2, 2, 8), (4, 2, 16), (3, 1, 24)])
@pytest.mark.parametrize("window", [None, 1, 50, 200])
def test_values_and_gradients_are_those_of_sequences_one_by_one(
    trees: tuple[Span, ...], heads: int, key_heads: int, width: int, window: int | None
) -> None:
    states, slope = drawn(heads, key_heads, width, sum(trees[-1]))
    bounds = []
    for start, prompt, first, second in trees:
        bounds += [(start, start, start, start + prompt + first)]
        if second:
            bounds += [(start, start + prompt, start + prompt + first, start + prompt + first + second)]
    found = with_gradients(states, slope, lambda *s: Blocks(trees).attend(*s, None, window))
    plain = with_gradients(states, slope, lambda *s: one_by_one(bounds, *s, window))
    exact = with_gradients([s.double() for s in states], slope.double(), lambda *s: one_by_one(bounds, *s, window))
    for f, p, e in zip(found, plain, exact, strict=True):
        assert (f - e).norm() <= 1.5 * (p - e).norm() + 1e-3 * e.norm()


def test_scaling_is_that_of_the_layer() -> None:
    states, _ = drawn(2, 2, 8, sum(TREES[-1]))
    scaled = [states[0] / 4, *states[1:]]
    found = Blocks(TREES).attend(*states, 8**-0.5 / 4, None)
    assert torch.equal(found, Blocks(TREES).attend(*scaled, None, None))  # a power of two: the same bits


spans = st.lists(st.tuples(*(st.integers(1, 200),) * 2, st.integers(1, 300)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(spans, st.none() | st.integers(1, 300))
def test_every_query_is_in_one_block_and_sees_what_it_may(lengths: list[tuple[int, ...]], window: int | None) -> None:
    pairs = [TokenPair(*(np.zeros(n, dtype=np.int32) for n in three)) for three in lengths]
    batch = pack(pairs, "shared", row_tokens=10**6)
    tokens = batch.tokens.numel()
    found, asked = torch.zeros(tokens, tokens, dtype=torch.bool), torch.zeros(tokens, dtype=torch.int)
    these = Blocks(batch.trees)
    for block in blocks(batch.trees, window):
        (queries, keys), mask = block.sizes, these.mask(block)
        seen = torch.ones(block.filled, dtype=torch.bool)
        seen[:, -mask.shape[1] :] = mask == 0
        assert not seen[:, keys:].any() and seen.any(dim=1).all()
        assert set(mask.unique().tolist()) <= {0.0, -torch.inf}
        places = torch.cat([torch.arange(part.start, part.stop) for part in block.keys])
        rows = torch.arange(block.queries.start, block.queries.stop)
        found[rows[:, None], places] = seen[:queries, :keys]
        asked[rows] += 1
    assert asked.unique().tolist() == [1]
    assert torch.equal(found, visible(batch, window)[0])


@pytest.mark.parametrize(("longest", "shapes"), [(512, 32), (2048, 64)])
def test_shapes_are_few(longest: int, shapes: int) -> None:
    """oneDNN keeps part of what it compiles for each shape for good."""
    draw, found = np.random.default_rng(0), set()
    for _ in range(5_000):
        prompt, first, second = draw.integers(1, longest // 2, size=3).tolist()
        found |= {block.filled for block in blocks([Span(0, prompt, first, second)], None)}
    assert len(found) <= shapes
    assert all(queries % 32 == 0 and keys % 64 == 0 for queries, keys in found)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "mistral", "qwen2-sliding"])
def test_a_model_scores_in_bf16_what_it_does_with_pytorchs_kernel(
    family: str, written_out: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors against fp32, of log-probabilities and of the gradient, are as large as with the kernel."""
    exact = oracle(family)

    def errors() -> list[Tensor]:
        policy = Policy(tiny_model(family), "shared")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scored = policy.logps(policy.lay_out(draw_pairs()))
        scored.logps.mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
        return [scored.token_logps.detach() - exact.logps, gradient]

    ours = errors()
    assert (layers := len(written_out)) >= tiny_model(family).config.num_hidden_layers
    monkeypatch.setattr(attention, "quicker", lambda: False)
    kernels = errors()
    assert len(written_out) == layers
    assert not torch.equal(ours[0], kernels[0])
    assert ours[0].norm() <= 1.5 * kernels[0].norm()
    assert (ours[1] - kernels[1]).norm() <= 0.03 * kernels[1].norm()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "mistral"])
def test_separate_forwards_are_agreed_with_to_the_rounding_of_bf16(
    family: str, written_out: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In single precision all around, so that a wrong key would be seen: only what attention takes is rounded."""
    policy, wanted, counted = Policy(tiny_model(family), "shared"), oracle(family), Blocks.attend
    monkeypatch.setattr(attention.Trees, "in_blocks", lambda *_: True)
    monkeypatch.setattr(Blocks, "attend", lambda self, query, *others: counted(self, query, *others).to(query.dtype))
    scored = policy.logps(policy.lay_out(draw_pairs()))
    assert isinstance(policy.attention, attention.TreeAttention)
    assert len(written_out) == policy.model.config.num_hidden_layers
    assert 0 < distance(scored.token_logps, wanted.logps) < 3e-3
    assert distance(flat_gradient(dpo(scored, wanted.reference), policy.model), wanted.gradient) < 1e-2


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_key_too_few_or_too_many_would_be_seen_there(
    shift: int, written_out: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = products.causal_mask
    monkeypatch.setattr(products, "causal_mask", lambda q, k, window, like: own(q, k, window, like).roll(shift, -1))
    with pytest.raises(AssertionError, match="distance"):
        test_separate_forwards_are_agreed_with_to_the_rounding_of_bf16("gpt2", written_out, monkeypatch)


def test_layers_that_are_computed_again_give_the_same_gradient(written_out: list[int]) -> None:
    def gradient(checkpointed: bool) -> Tensor:
        policy = Policy(tiny_model("llama")).train()
        if checkpointed:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            policy.logps(policy.lay_out(draw_pairs())).logps.mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])

    wanted = gradient(checkpointed=False)
    once = len(written_out)
    assert torch.equal(gradient(checkpointed=True), wanted) and len(written_out) == once + 2 * 2


def test_no_scores_are_kept_for_backward() -> None:
    states, _ = drawn(2, 2, 8, sum(TREES[-1]))
    states = [state.requires_grad_() for state in states]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        Blocks(TREES).attend(*states, None, None)
    assert sum(tensor.numel() for tensor in kept) == sum(state.numel() for state in states)


def test_a_second_derivative_is_refused() -> None:
    states, _ = drawn(2, 2, 8, sum(TREES[-1]))
    query = states[0].requires_grad_()
    found = Blocks(TREES).attend(query, *states[1:], None, None)
    (slope,) = torch.autograd.grad(found.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_products_of_bf16_values_are_exact() -> None:
    """To the sums of fp32, though they are multiplied in bf16 where the CPU can."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, 70, 64, generator=generator).bfloat16() for _ in range(2))
    with multiplied_in_bf16(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        found = left.float() @ right.float().mT
    exact = left.double() @ right.double().mT
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-6 * exact.abs().max()


@pytest.mark.parametrize("before", ["none", "ieee"])
def test_what_is_multiplied_elsewhere_is_as_precise_as_before(before: str) -> None:
    matmul = torch.backends.mkldnn.matmul
    was = matmul.fp32_precision
    try:
        matmul.fp32_precision = before
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ZeroDivisionError), multiplied_in_bf16():
            assert matmul.fp32_precision == "bf16" and not torch.is_autocast_enabled("cpu")
            1 / 0  # noqa: B018
        assert matmul.fp32_precision == before
    finally:
        matmul.fp32_precision = was


CASES = [
    ({"avx512_bf16": True}, True),
    ({"avx512_bf16": True, "amx_bf16": True}, False),  # PyTorch's kernel uses that
    ({"avx512_bf16": False}, False),
    ({}, False),
]


@pytest.mark.parametrize(("capabilities", "wanted"), CASES)
def test_it_is_for_cpus_that_multiply_bf16_without_amx(
    capabilities: dict[str, bool], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert quicker.__wrapped__() == wanted
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", SimpleNamespace())  # an older PyTorch
    assert not quicker.__wrapped__()


def test_it_is_asked_for_where_it_can(written_out: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tiny_model("gpt2"))
    trees = policy.attention(pack(draw_pairs(), "shared", row_tokens=10**6))["trees"]
    padded = policy.attention(pack(draw_pairs(), "shared"))["trees"]
    half = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)
    assert trees.in_blocks(half, half, half, None)
    assert not padded.in_blocks(half, half, half, None)
    assert not trees.in_blocks(half.float(), half.float(), half.float(), None)
    assert not trees.in_blocks(half, half, half[..., :4], None)
    assert not trees.in_blocks(half.to("meta"), half, half, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trees.in_blocks(half.float(), half.float(), half.float(), None)
    monkeypatch.setattr(products, "WIDTH", 33)
    assert not trees.in_blocks(half, half, half, None)  # too narrow to be worth it


@pytest.mark.parametrize("window", [None, 50])
def test_weights_in_bf16_change_nothing(window: int | None) -> None:
    """Lightning makes bf16 the default type of a forward, not of its backward, where all weights are in bf16."""
    states, slope = drawn(2, 2, 8, sum(TREES[-1]))

    def forward(*states: Tensor) -> Tensor:
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert agrees.__wrapped__(4, 2, 16, window)
            return Blocks(TREES).attend(*states, None, window)
        finally:
            torch.set_default_dtype(torch.float32)

    wanted = with_gradients(states, slope, lambda *s: Blocks(TREES).attend(*s, None, window))
    for found, other in zip(with_gradients(states, slope, forward), wanted, strict=True):
        assert torch.equal(found, other)


def test_a_pair_scores_the_same_whatever_is_beside_it(written_out: list[int]) -> None:
    states, _ = drawn(2, 2, 8, sum(LONG[-1]))
    together = Blocks(LONG).attend(*states, None, None)
    for start, *lengths in LONG:
        own = [state[:, :, start : start + sum(lengths)] for state in states]
        assert torch.equal(
            Blocks((Span(0, *lengths),)).attend(*own, None, None), together[:, start : start + sum(lengths)]
        )


def test_one_thread_at_a_time_has_another_precision() -> None:
    matmul, inside, also, overlapped = torch.backends.mkldnn.matmul, Event(), Event(), []
    before = matmul.fp32_precision

    def first() -> None:
        with multiplied_in_bf16():
            inside.set()
            overlapped.append(also.wait(0.5))

    def second() -> None:
        inside.wait(10)
        with multiplied_in_bf16():
            also.set()

    threads = [Thread(target=first), Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert overlapped == [False] and also.is_set() and matmul.fp32_precision == before


@pytest.mark.parametrize("error", [RuntimeError("could not create a primitive"), NotImplementedError()])
def test_a_refusal_leaves_it_to_the_kernel(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise error

    monkeypatch.setattr(products, "probabilities", refuse)
    assert not agrees.__wrapped__(4, 2, 16, None)
    monkeypatch.setattr(products, "probabilities", raise_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        agrees.__wrapped__(4, 2, 16, None)


def raise_out_of_memory(*_: object) -> Tensor:
    raise torch.OutOfMemoryError


def test_it_is_not_trusted_where_it_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert agrees.__wrapped__(4, 2, 16, None) and agrees.__wrapped__(4, 2, 16, 40)
    own = WrittenOut.backward

    def doubled(ctx: object, slope: Tensor) -> tuple[Tensor | None, ...]:
        by_query, by_key, *others = own(ctx, slope)
        return by_query, 2 * by_key, *others

    monkeypatch.setattr(WrittenOut, "backward", doubled)
    assert not agrees.__wrapped__(4, 2, 16, None)
