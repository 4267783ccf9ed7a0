"""Answers from a policy, by transformers' generation: greedy, or exact samples that do not depend on the batch.

A sample is drawn from the model's own distribution, at temperature 1 and from the whole vocabulary, so that averages
over samples are those of the policy (its KL to the reference, for one). Every prompt has random numbers of its own,
one a token, so that its sample is the same in whatever batch and on whatever rank it is drawn.

Legend: P prompts  T tokens  V vocabulary
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpo_lightning.models.checkpoint import context_length
from dpo_lightning.models.policy import Policy


class Sampler(LogitsProcessor):
    """Leaves one token to each row, the one that its next random number falls on.

    Args:
        numbers: `[P, T]` uniform in [0, 1), one for each row and new token.
        first: tokens of the prompts, padding included.
    """

    def __init__(self, numbers: np.ndarray, first: int) -> None:
        self.numbers = torch.from_numpy(numbers)
        self.first = first
        self.sound = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wide = torch.float32 if scores.device.type == "mps" else torch.float64  # a sum over V is not exact in float32
        ends = scores.to(wide).softmax(-1).cumsum(-1)  # [P, V]
        self.sound = self.sound and bool(ends[:, -1].isfinite().all())
        number = self.numbers[:, input_ids.shape[1] - self.first].to(ends)[:, None]  # [P, 1]
        token = torch.searchsorted(ends, number * ends[:, -1:], right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


@torch.no_grad()
def generate(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    keys: Sequence[tuple[int, ...]] | None = None,
) -> list[np.ndarray]:
    """Answer every prompt in one batch.

    Args:
        policy: the model.
        tokenizer: of the model, for the end of an answer.
        prompts: ids of each prompt `[Lp]`, at least one.
        max_new_tokens: longest answer, with its EOS.
        keys: seed of each prompt's random numbers; None for greedy answers.

    Returns:
        ids of each answer, with EOS unless it was cut off.

    Raises:
        ValueError: if the longest prompt and its answer may not fit into the model's context, or the model's scores are
            no numbers.
    """
    model = policy.model
    longest = max(map(len, prompts))
    room = context_length(model.config)
    if room is not None and longest + max_new_tokens > room:
        raise ValueError(
            f"a prompt of {longest} tokens and an answer of up to {max_new_tokens} do not fit into the model's context "
            f"of {room}; ask for shorter answers"
        )
    pad = 0 if tokenizer.eos_token_id is None else tokenizer.eos_token_id  # never seen: it is masked
    tokens, mask = padded(prompts, pad)
    sampler = None
    if keys is not None:
        sampler = Sampler(np.stack([np.random.default_rng(key).random(max_new_tokens) for key in keys]), longest)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    with generating(model, config):
        processors = LogitsProcessorList([] if sampler is None else [sampler])
        rows = policy.extend(tokens.to(model.device), mask.to(model.device), processors)
    if sampler is not None and not sampler.sound:
        raise ValueError(
            f"the scores of {type(model).__name__} in {model.dtype} are no numbers; its weights are not finite, or it "
            "cannot run padded prompts in this precision: try another precision or attn_implementation"
        )
    return [until_eos(row, tokenizer.eos_token_id) for row in rows[:, longest:].cpu().numpy()]


def padded(prompts: Sequence[np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    """Ids and mask `[P, T]` of prompts padded on the left."""
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), fill)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    return tokens, mask


@contextmanager
def generating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Within, the model is in evaluation mode, and `config` its only one.

    Its own would fill in what is not set there: penalties, biases, a top_k.
    """
    own, mode = model.generation_config, model.training
    model.generation_config = config
    try:
        model.eval()
        yield
    finally:
        model.generation_config = own
        model.train(mode)


def until_eos(ids: np.ndarray, eos: int) -> np.ndarray:
    """An answer's ids up to and with its first EOS.

    >>> until_eos(np.array([5, 7, 0, 0]), eos=0)
    array([5, 7, 0])
    """
    ends = np.flatnonzero(ids == eos)
    return ids[: ends[0] + 1] if len(ends) else ids
