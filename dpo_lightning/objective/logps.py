"""Log-probabilities of answer tokens, a chunk of the vocabulary projection at a time.

Only positions that predict an answer token reach the LM head, `chunk` of them at a time, and each chunk is computed
again in backward. So no `[B, T, V]` tensor exists: the memory of the projection is `chunk * V`, whatever the batch.

Legend: B pairs  N answer tokens  D hidden  C chunk  V vocabulary
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: Elements of one chunk of logits: 64 MB in fp32. Each chunk costs a pass over the head's weights, in mixed precision
#: their cast too, so that smaller ones take longer.
CHUNK_ELEMENTS = 2**24

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
        # In bf16 the logsumexp over a vocabulary loses whole nats over an answer of 256 tokens.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logps = logits.gather(-1, target[:, None]).squeeze(-1) - logits.logsumexp(-1)  # [C]
        # Last, so that the recomputation in backward stops before them.
        return logps, *(STATISTICS[name](logits.detach()) for name in statistics)

    chunk = max(1, CHUNK_ELEMENTS // vocabulary)
    recompute = torch.is_grad_enabled()
    pieces = [
        checkpoint(score, *piece, use_reentrant=False, preserve_rng_state=False) if recompute else score(*piece)
        for piece in zip(states.split(chunk), target.split(chunk), strict=True)
    ]
    logps, *rest = (torch.cat(column) for column in zip(*pieces, strict=True))
    return logps, dict(zip(statistics, rest, strict=True))
