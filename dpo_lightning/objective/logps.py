"""Log-probabilities of answer tokens, a chunk of the vocabulary projection at a time.

Only positions that predict an answer token reach the LM head. The first of them, as far as `KEPT_ELEMENTS` go, in one
piece, whose logits are kept for backward and become their own gradient there; the others a chunk at a time, computed
again. So no `[B, T, V]` tensor exists: the memory of the projection is bounded, whatever the batch.

Legend: B pairs  N answer tokens  D hidden  C chunk  V vocabulary
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

#: Elements of one chunk of logits that is not kept: 64 MB in fp32. Each chunk costs a pass over the head's weights and
#: their gradient, in mixed precision the casts of both too, so that smaller ones take longer.
CHUNK_ELEMENTS = 2**24

#: Elements of logits that are kept for backward: 512 MB in fp32, half of that in bf16. What is computed again costs a
#: fourth product with the head's weights beside three, and one more gradient of these to be added up.
KEPT_ELEMENTS = 2**27

#: Elements of logits that are widened at a time. On a CPU 2 MB in fp32 stay in its cache, in memory that is not new to
#: it; elsewhere a kernel has work enough.
CPU_BLOCK, BLOCK = 2**19, 2**24

#: What a loss or a metric may ask of the logits beside the log-probability: name -> function of logits `[C, V]`.
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_logits": lambda logits: logits.mean(-1),
    "log_collision": lambda logits: (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1),  # log sum_v pi(v)^2
}


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of a batch of pairs, in nats, and what derives from them.

    Answer `i` is the chosen answer of pair `i`, answer `B + i` its rejected one. A supervised batch has no second half.

    Args:
        token_logps: `[N]` log-probability of each answer token given all before it; fp32 or wider.
        answer: `[N]` the answer each token belongs to.
        num_pairs: B.
        num_answers: `2 * B`, or `B` where no rejected answers were laid out.
        statistics: what was asked of the logits beside, each `[N]`, detached (see `STATISTICS`).

    >>> two = PairLogps(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 1]), num_pairs=1, num_answers=2)
    >>> two.chosen, two.rejected, two.lengths
    (tensor([-3.]), tensor([-4.]), tensor([2., 1.]))
    """

    token_logps: Tensor
    answer: Tensor
    num_pairs: int
    num_answers: int
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def logps(self) -> Tensor:
        """`[num_answers]` summed log-probability of each answer, in nats; 0 for an answer without a scored token."""
        return self.sums(self.token_logps)

    @property
    def chosen(self) -> Tensor:
        """`[B]` summed log-probability of the chosen answers, in nats."""
        return self.logps[: self.num_pairs]

    @property
    def rejected(self) -> Tensor:
        """`[B]` summed log-probability of the rejected answers, in nats.

        Raises:
            ValueError: if the batch has no rejected answers.
        """
        if self.num_answers == self.num_pairs:
            raise ValueError("this batch was laid out without rejected answers; a pairwise loss needs both")
        return self.logps[self.num_pairs :]

    @property
    def lengths(self) -> Tensor:
        """`[num_answers]` scored tokens of each answer."""
        return self.sums(torch.ones_like(self.token_logps))

    @property
    def means(self) -> Tensor:
        """`[num_answers]` log-probability per token, in nats; 0 for an answer without a scored token."""
        return self.logps / self.lengths.clamp(min=1)

    def sums(self, values: Tensor) -> Tensor:
        """Sum `values` `[N]` over the tokens of each answer: `[num_answers]`."""
        return values.new_zeros(self.num_answers).index_add(0, self.answer, values)


def token_logps(
    states: Tensor,
    target: Tensor,
    readout: Callable[[Tensor], Tensor],
    vocabulary: int,
    statistics: Sequence[str] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of `target` under `readout(states)`, in nats.

    Args:
        states: `[N, D]` hidden states at the positions that predict the targets.
        target: `[N]` token ids.
        readout: hidden states `[C, D]` -> logits `[C, V]`, the model's own.
        vocabulary: V, which sets the chunk.
        statistics: names from `STATISTICS`; only what is named is computed.

    Returns:
        `[N]` log-probabilities, fp32 or wider, and each named statistic `[N]`, detached.
    """

    def score(states: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        logits = readout(states)  # [C, V]
        logps = TargetLogps.apply(logits, target)  # [C]
        # Last, so that the recomputation in backward stops before them.
        return logps, *statistics_of(logits.detach(), statistics)

    def score_again(states: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return checkpoint(score, states, target, use_reentrant=False, preserve_rng_state=False)

    trains, chunk = torch.is_grad_enabled(), max(1, CHUNK_ELEMENTS // vocabulary)
    kept = min(KEPT_ELEMENTS // vocabulary, len(states)) if trains else 0
    pieces: list[tuple[Tensor, ...]] = []
    if kept < len(states) or not kept:
        again = score_again if trains else score
        pieces += map(again, states[kept:].split(chunk), target[kept:].split(chunk))
    if kept:  # last, so that backward begins with it, and its logits go before others come
        pieces.insert(0, score(states[:kept], target[:kept]))
    logps, *rest = (torch.cat(column) for column in zip(*pieces, strict=True))
    return logps, dict(zip(statistics, rest, strict=True))


def statistics_of(logits: Tensor, names: Sequence[str]) -> list[Tensor]:
    """Each named statistic `[C]` of logits `[C, V]`, a few rows of which are widened at a time."""
    if not names:
        return []
    rows = []
    for block in row_blocks(logits):
        wide = widened(block)
        rows.append([STATISTICS[name](wide) for name in names])
    return [torch.cat(column) for column in zip(*rows, strict=True)]


class TargetLogps(torch.autograd.Function):
    """`log_softmax(logits)` at the targets: logits `[C, V]`, targets `[C]` -> `[C]`, fp32 or wider.

    Backward writes the gradient over the logits, where that of `gather` and `logsumexp` makes four tensors of their
    size. So it can be gone through once, and a readout that keeps the logits for a backward of its own is refused by
    autograd. Both ways go over a few rows at a time: new memory of the logits' size costs a CPU more than the
    exponentials.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, target: Tensor) -> Tensor:
        normaliser = torch.cat([widened(block).logsumexp(-1) for block in row_blocks(logits)])
        ctx.save_for_backward(logits, normaliser, target)
        return widened(logits.gather(-1, target[:, None])).squeeze(-1) - normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        logits, normaliser, target = ctx.saved_tensors
        columns = (row_blocks(value, logits) for value in (logits, normaliser, gradient, target))
        for block, total, weight, token in zip(*columns, strict=True):
            wide = (block - total[:, None]).exp_().mul_(-weight[:, None])  # minus the probabilities, weighted
            block.copy_(wide.scatter_add_(-1, token[:, None], weight[:, None]))
        return logits, None


def row_blocks(values: Tensor, logits: Tensor | None = None) -> tuple[Tensor, ...]:
    """Rows of logits `[C, V]`, or of what belongs to them, as many as are widened at a time."""
    logits = values if logits is None else logits
    elements = CPU_BLOCK if logits.device.type == "cpu" else BLOCK
    return values.split(max(1, elements // logits.shape[-1]))


def widened(logits: Tensor) -> Tensor:
    """In fp32 or wider: in bf16 the normaliser over a vocabulary loses whole nats over an answer of 256 tokens."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
