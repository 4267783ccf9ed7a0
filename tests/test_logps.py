"""Token log-probabilities in chunks, against log_softmax and gather of all of them at once.

Legend: N answer tokens  D hidden  V vocabulary  C chunk
"""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_lightning.objective import logps as module
from dpo_lightning.objective.logps import PairLogps, TargetLogps, token_logps

N, D, V = 23, 8, 61

#: Rows a chunk holds: one, some with a remainder, exactly all, more than all.
CHUNKS = (1, 5, N, 4 * N)


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the chunk, and how much is kept for backward, in rows."""

    def set_up(rows: int, kept: int = 0) -> None:
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", rows * V)
        monkeypatch.setattr(module, "KEPT_ELEMENTS", kept * V)

    return set_up


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """States `[N, D]`, targets `[N]` and a head `[V, D]`, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return states, torch.randint(V, (N,), generator=generator), head


def plain_logps(states: Tensor, target: Tensor, head: Tensor) -> Tensor:
    """The oracle: all logits at once."""
    return torch.log_softmax(states @ head.T, -1).gather(-1, target[:, None])[:, 0]


@pytest.mark.parametrize("rows", CHUNKS)
@pytest.mark.parametrize("kept", [0, 11, 2 * N])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_chunks_equal_log_softmax_of_all_in_value_and_gradient(
    rows: int, kept: int, dtype: torch.dtype, tolerance: float, chunked: Callable[..., None]
) -> None:
    chunked(rows, kept)
    states, target, head = draw(dtype)
    weights = torch.linspace(-1, 1, N, dtype=dtype)  # so that no two tokens have the same gradient
    found, _ = token_logps(states, target, lambda chunk: chunk @ head.T, V)
    wanted = plain_logps(states, target, head)
    assert found.dtype == dtype
    assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad((found * weights).sum(), (states, head))
    wanted_gradients = torch.autograd.grad((wanted * weights).sum(), (states, head))
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        assert (gradient - wanted_gradient).norm() <= tolerance * wanted_gradient.norm()


def test_without_gradient_the_values_are_the_same_and_carry_none(chunked: Callable[..., None]) -> None:
    chunked(5)
    states, target, head = draw(torch.float64)
    with torch.no_grad():
        found, _ = token_logps(states, target, lambda chunk: chunk @ head.T, V)
    assert not found.requires_grad
    assert_close(found, plain_logps(states, target, head).detach(), rtol=1e-12, atol=1e-12)


def test_no_tokens_give_no_log_probabilities() -> None:
    states, target, head = draw(torch.float32)
    found, statistics = token_logps(states[:0], target[:0], lambda chunk: chunk @ head.T, V, ("mean_logits",))
    assert found.shape == statistics["mean_logits"].shape == (0,)
    found.sum().backward()
    assert states.grad is None or not states.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_get_a_gradient_of_their_own_precision(dtype: torch.dtype) -> None:
    """As good as that of fp32 logits, but for its own rounding."""
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    target, weights = torch.arange(N), torch.linspace(-1, 1, N)
    wide = logits.detach().float().requires_grad_()
    (TargetLogps.apply(logits, target) * weights).sum().backward()
    (torch.log_softmax(wide, -1)[range(N), target] * weights).sum().backward()
    assert logits.grad.dtype == dtype
    assert_close(logits.grad, wide.grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def saved_logits(function: Callable[[], Tensor]) -> int:
    """Rows of logits that `function` keeps for backward."""
    rows: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (V,) and len(tensor) != D:  # not the head's
            rows.append(len(tensor))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(rows)


def test_logits_are_kept_as_far_as_they_may_be_and_not_computed_again(chunked: Callable[..., None]) -> None:
    states, target, head = draw(torch.float32)
    seen: list[int] = []

    def readout(chunk: Tensor) -> Tensor:
        seen.append(len(chunk))
        return chunk @ head.T

    kept, again = [], []
    for rows in (0, 5, 12, 100):
        chunked(5, kept=rows)
        kept.append(saved_logits(lambda: token_logps(states, target, readout, V)[0]))
        seen.clear()
        token_logps(states, target, readout, V)[0].sum().backward()
        again.append(sum(seen) - N)
    assert again == [N, N - 5, N - 12, 0]
    assert kept == [0, 5, 12, N]


def test_what_is_kept_goes_through_the_head_in_one_piece(chunked: Callable[..., None]) -> None:
    """Each piece casts the head in mixed precision, forward and backward, and adds up its gradient once more."""
    chunked(5, kept=12)
    states, target, head = draw(torch.float32)
    seen: list[int] = []

    def readout(chunk: Tensor) -> Tensor:
        seen.append(len(chunk))
        return chunk @ head.T

    token_logps(states, target, readout, V)
    assert sorted(seen) == [1, 5, 5, 12]
    seen.clear()
    with torch.no_grad():
        token_logps(states, target, readout, V)
    assert seen == [5, 5, 5, 5, 3]


def test_the_kept_logits_go_first_in_backward(chunked: Callable[..., None]) -> None:
    """So that they are gone when others come."""
    chunked(5, kept=12)
    states, target, head = draw(torch.float32)
    gone: list[int] = []

    def readout(chunk: Tensor) -> Tensor:
        logits = chunk @ head.T
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gone.append(len(gradient)))
        return logits

    token_logps(states, target, readout, V)[0].sum().backward()
    assert gone[0] == 12 and sorted(gone) == [1, 5, 5, 12]


class Made(TorchDispatchMode):
    """Counts the tensors of the logits' size that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        found = function(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.numel() == N * V and found.untyped_storage().data_ptr() not in known:
            self.count += 1
        return found


def test_backward_makes_no_second_tensor_of_the_logits_size(
    chunked: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked(5, kept=N)
    monkeypatch.setattr(module, "CPU_BLOCK", 4 * V)
    states, target, head = draw(torch.float32)
    with Made() as plainly:
        plain_logps(states, target, head).sum().backward()
    with Made() as forward:
        found = token_logps(states, target, lambda chunk: chunk @ head.T, V)[0]
    with Made() as backward:
        found.sum().backward()
    assert plainly.count > 2  # the measure sees what it should
    assert (forward.count, backward.count) == (1, 0)


READOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bias": lambda logits: logits + torch.linspace(-1, 1, V, dtype=logits.dtype),
    "scale": lambda logits: 0.3 * logits,
    "division": lambda logits: logits / 0.3,
    "soft cap": lambda logits: 2 * torch.tanh(logits / 2),
    "cast": lambda logits: logits.double(),
    "row of a batch": lambda logits: logits[None].squeeze(0),
}


@pytest.mark.parametrize("name", READOUTS)
def test_the_gradient_that_is_written_over_the_logits_is_theirs_behind_any_readout(
    name: str, chunked: Callable[..., None]
) -> None:
    chunked(5, kept=12)
    states, target, head = draw(torch.float64)
    weights = torch.linspace(-1, 1, N, dtype=torch.float64)
    found, _ = token_logps(states, target, lambda chunk: READOUTS[name](chunk @ head.T), V)
    wanted = READOUTS[name](states @ head.T).log_softmax(-1).gather(-1, target[:, None])[:, 0]
    gradients = torch.autograd.grad((found * weights).sum(), (states, head))
    assert_close(gradients, torch.autograd.grad((wanted * weights).sum(), (states, head)), rtol=1e-10, atol=1e-12)


def test_a_second_backward_and_a_readout_that_keeps_its_logits_are_refused_and_not_wrong(
    chunked: Callable[..., None],
) -> None:
    chunked(5, kept=N)
    states, target, head = draw(torch.float64)
    found = token_logps(states, target, lambda chunk: chunk @ head.T, V)[0].sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()
    kept = token_logps(states, target, lambda chunk: torch.tanh(chunk @ head.T), V)[0].sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def largest_saved(function: Callable[[], Tensor]) -> int:
    """Elements of the largest tensor that `function` keeps for backward."""
    sizes = [0]

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return max(sizes)


def test_logits_of_all_tokens_are_never_kept_for_backward(chunked: Callable[..., None]) -> None:
    chunked(5)
    states, target, head = draw(torch.float32)
    assert largest_saved(lambda: plain_logps(states, target, head)) >= N * V  # the measure sees what it should
    assert largest_saved(lambda: token_logps(states, target, lambda chunk: chunk @ head.T, V)[0]) <= 5 * V


@pytest.mark.parametrize("rows", CHUNKS)
def test_the_head_sees_one_chunk_at_a_time_in_forward_and_in_backward(rows: int, chunked: Callable[..., None]) -> None:
    chunked(rows)
    states, target, head = draw(torch.float32)
    seen: list[int] = []

    def readout(chunk: Tensor) -> Tensor:
        seen.append(len(chunk))
        return chunk @ head.T

    found, _ = token_logps(states, target, readout, V)
    assert sum(seen) == N and max(seen) == min(rows, N)
    found.sum().backward()
    assert sum(seen) == 2 * N and max(seen) == min(rows, N)  # computed again, as largely as before


def test_a_vocabulary_larger_than_a_chunk_goes_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", V - 1)
    states, target, head = draw(torch.float64)
    found, _ = token_logps(states, target, lambda chunk: chunk @ head.T, V)
    assert_close(found, plain_logps(states, target, head), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", [True, False])
def test_a_statistic_is_computed_once_and_only_when_named(
    gradient: bool, chunked: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked(5)
    calls: list[int] = []

    def largest(logits: Tensor) -> Tensor:
        calls.append(len(logits))
        return logits.amax(-1)

    monkeypatch.setitem(module.STATISTICS, "largest", largest)
    states, target, head = draw(torch.float64)
    with torch.set_grad_enabled(gradient):
        _, none = token_logps(states, target, lambda chunk: chunk @ head.T, V)
        assert none == {} and calls == []
        found, statistics = token_logps(states, target, lambda chunk: chunk @ head.T, V, ("largest", "mean_logits"))
    if gradient:
        found.sum().backward()
    assert sum(calls) == N  # not again in backward
    assert list(statistics) == ["largest", "mean_logits"]
    logits = (states @ head.T).detach()
    assert_close(statistics["largest"], logits.amax(-1), rtol=1e-12, atol=1e-12)
    assert_close(statistics["mean_logits"], logits.mean(-1), rtol=1e-12, atol=1e-12)
    assert not any(values.requires_grad for values in statistics.values())


def test_statistics_of_half_precision_logits_never_widen_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_BLOCK", 4 * V)
    states, target, head = draw(torch.bfloat16)
    own, blocks, most = module.widened, [], 0

    def watched(logits: Tensor) -> Tensor:
        nonlocal most
        found = own(logits)
        blocks.append(weakref.ref(found))
        alive = [block() for block in blocks if block() is not None]
        most = max(most, sum(block.numel() for block in alive))
        return found

    monkeypatch.setattr(module, "widened", watched)
    with torch.no_grad():
        _, found = token_logps(states, target, lambda chunk: chunk @ head.T, V, tuple(module.STATISTICS))
    assert 4 * V <= most <= 2 * 4 * V  # one, and the next while it is made
    wide = (states @ head.T).float().detach()
    for name, values in found.items():
        assert_close(values, module.STATISTICS[name](wide))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_fp32(dtype: torch.dtype) -> None:
    """The trap: log_softmax in bf16 over GPT-2's vocabulary moves the sum over 256 tokens by tenths of a nat."""
    tokens, vocabulary = 256, 50257
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, 16, generator=generator).to(dtype)
    head = torch.randn(vocabulary, 16, generator=generator).to(dtype)
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    logits = states @ head.T  # [N, V], rounded
    with torch.no_grad():
        found, _ = token_logps(states, target, lambda chunk: chunk @ head.T, vocabulary)
    assert found.dtype == torch.float32
    rows = torch.arange(tokens)
    exact = torch.cat([part.double().log_softmax(-1) for part in logits.split(64)])[rows, target].sum()
    rounded = logits.log_softmax(-1)[rows, target].double().sum()
    assert (found.double().sum() - exact).abs() < 1e-3
    assert (rounded - exact).abs() > 1e-2  # what it would be without the care


ANSWER = torch.tensor([3, 0, 0, 2, 3, 3, 0])  # of 2 pairs; answer 1 has no token
VALUES = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -64.0], dtype=torch.float64)


def test_sums_lengths_and_means_are_those_of_a_loop_over_tokens() -> None:
    pair = PairLogps(VALUES, ANSWER, num_pairs=2, num_answers=4)
    tokens = [[v for v, a in zip(VALUES.tolist(), ANSWER.tolist(), strict=True) if a == i] for i in range(4)]
    assert pair.logps.tolist() == [sum(values) for values in tokens] == [-70.0, 0.0, -8.0, -49.0]
    assert pair.lengths.tolist() == [len(values) for values in tokens] == [3, 0, 1, 3]
    assert pair.means.tolist() == [sum(values) / max(len(values), 1) for values in tokens]
    assert pair.chosen.tolist() == [-70.0, 0.0] and pair.rejected.tolist() == [-8.0, -49.0]
    assert pair.sums(VALUES**2).tolist() == [sum(v * v for v in values) for values in tokens]


def test_an_answer_without_tokens_has_a_finite_mean_and_no_gradient() -> None:
    values = VALUES.clone().requires_grad_()
    pair = PairLogps(values, ANSWER, num_pairs=2, num_answers=4)
    (gradient,) = torch.autograd.grad(pair.means[1], values)
    assert pair.means[1] == 0 and not gradient.any()


def test_gradient_of_a_sum_reaches_its_own_tokens_only() -> None:
    values = VALUES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(PairLogps(values, ANSWER, num_pairs=2, num_answers=4).chosen[0], values)
    assert gradient.tolist() == (ANSWER == 0).double().tolist()


def test_a_batch_without_rejected_answers_refuses_to_give_them() -> None:
    supervised = PairLogps(VALUES, ANSWER.clamp(max=1), num_pairs=2, num_answers=2)
    assert supervised.chosen.shape == (2,)
    with pytest.raises(ValueError, match="without rejected answers"):
        _ = supervised.rejected
