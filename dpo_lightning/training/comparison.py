"""What the `test` verb finds out: a policy's sampled answers beside the reference's, and what they say of it."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_lightning.data.oracle import Oracle
from dpo_lightning.data.tokenization import TokenPair
from dpo_lightning.models.generation import generate
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import Reference

#: Half the width of a 95% interval, in standard errors.
Z95 = 1.959964


@dataclass(frozen=True)
class Answer:
    """One sampled answer.

    Attributes:
        text: as decoded, without EOS.
        tokens: its length, EOS included.
        ended: 1 if it came to its EOS, 0 if it was cut off.
        figures: what the oracle says of it; empty where there is none.
    """

    text: str
    tokens: int
    ended: float
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """A prompt with an answer of each model.

    Attributes:
        row: of the prompt in its source.
        sample: which of the prompt's samples this is.
        logratio: log-probability of the policy's answer under the policy minus that under the reference, in nats.
    """

    row: int
    sample: int
    prompt: str
    policy: Answer
    reference: Answer
    logratio: float

    @property
    def win(self) -> float:
        """1 if the policy's answer has the higher true reward, 1/2 on a tie, 0 else."""
        better = self.policy.figures["true_reward"] - self.reference.figures["true_reward"]
        return (math.copysign(1, better) + 1) / 2 if better else 0.5


def compare(
    policy: Policy,
    reference: Reference,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[int, int, np.ndarray]],
    max_new_tokens: int,
    seed: int,
    oracle: Oracle | None,
) -> list[Comparison]:
    """Sample an answer of each model to every prompt, each with random numbers of its own.

    Args:
        policy, reference: the two models.
        tokenizer: of both.
        asked: row in its source, number of the sample, and ids of each prompt.
        max_new_tokens: longest answer, with its EOS.
        seed: of the random numbers, with row, model and sample.
        oracle: what knows how good an answer is, or None.
    """
    prompts = [prompt for _, _, prompt in asked]
    own_keys, other_keys = ([(seed, row, model, sample) for row, sample, _ in asked] for model in (0, 1))
    answers = generate(policy, tokenizer, prompts, max_new_tokens, own_keys)
    others = reference.generate(tokenizer, prompts, max_new_tokens, other_keys)
    pairs = [TokenPair(prompt, answer, None) for prompt, answer in zip(prompts, answers, strict=True)]
    batch = policy.lay_out(pairs)
    logratios = (policy.logps(batch).logps - reference.logps(batch).logps).tolist()  # [B]

    def judged(prompt: str, ids: np.ndarray) -> Answer:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        ended = float(ids[-1] == tokenizer.eos_token_id)
        return Answer(text, len(ids), ended, {} if oracle is None else oracle(prompt, text))

    found = []
    for (row, sample, ids), answer, other, logratio in zip(asked, answers, others, logratios, strict=True):
        prompt = tokenizer.decode(ids, skip_special_tokens=True)
        found.append(Comparison(row, sample, prompt, judged(prompt, answer), judged(prompt, other), logratio))
    return found


def summarise(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Figures of all answers: means, with the 95% intervals of KL and win rate.

    `kl` is KL(policy, reference) in nats per answer, estimated by the mean log-ratio of the policy's samples. Prompts
    are what was drawn independently, so an interval comes of the spread of their means; each has as many samples.
    """
    ratios = by_prompt(comparisons, lambda c: c.logratio)
    kl, variance = mean(ratios), variance_of(ratios)
    spread = math.sqrt(variance / (len(ratios) - 1)) if len(ratios) > 1 else math.inf
    found = {"kl": kl, "kl/low": kl - Z95 * spread, "kl/high": kl + Z95 * spread}
    for whose in ("policy", "reference"):
        answers = [getattr(c, whose) for c in comparisons]
        found[f"tokens/{whose}"] = mean(answer.tokens for answer in answers)
        found[f"ended/{whose}"] = mean(answer.ended for answer in answers)
        for name in answers[0].figures:
            tag = name if whose == "policy" else f"{name}/reference"
            found.setdefault(tag, mean(answer.figures[name] for answer in answers))  # an oracle's tokens are not ours
    if "true_reward" in found:
        wins = by_prompt(comparisons, lambda c: c.win)
        share, variance = mean(wins), variance_of(wins)
        # As many independent answers as would spread so; a prompt's samples are alike, ties spread less than wins.
        alone = min(share * (1 - share) / variance * len(wins), len(comparisons)) if variance else len(wins)
        found["win_rate"], (found["win_rate/low"], found["win_rate/high"]) = share, wilson(share, alone)
    return found


def by_prompt(comparisons: Iterable[Comparison], figure: Callable[[Comparison], float]) -> list[float]:
    """The mean of a figure over each prompt's samples."""
    values: dict[int, list[float]] = {}
    for comparison in comparisons:
        values.setdefault(comparison.row, []).append(figure(comparison))
    return [mean(samples) for samples in values.values()]


def mean(values: Iterable[float]) -> float:
    """The mean, exactly rounded, so that it does not depend on the order.

    >>> mean([0.1] * 10)
    0.1
    """
    values = list(values)
    return math.fsum(values) / len(values)


def variance_of(values: Sequence[float]) -> float:
    """The mean squared deviation from the mean, exactly rounded.

    >>> variance_of([1, 3])
    1.0
    """
    centre = mean(values)
    return mean((value - centre) ** 2 for value in values)


def wilson(share: float, count: float) -> tuple[float, float]:
    """A 95% interval for a share of `count` cases (Wilson 1927); on the safe side where ties count as halves.

    >>> [round(end, 3) for end in wilson(0.8, 100)]
    [0.711, 0.867]
    """
    z2 = Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    width = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return centre - width, centre + width


def write_samples(comparisons: Iterable[Comparison], path: Path) -> None:
    """All answers, a line of JSON for each of a prompt's samples."""
    with path.open("w", encoding="utf-8") as lines:
        for comparison in comparisons:
            lines.write(json.dumps(asdict(comparison), ensure_ascii=False) + "\n")


def as_text(comparisons: Sequence[Comparison], shown: int = 3) -> str:
    """All figures, and the first few prompts with their answers, for a terminal."""
    found = summarise(comparisons)
    samples = 1 + max(c.sample for c in comparisons)
    lines = [
        "",
        f"{len({c.row for c in comparisons})} prompts, {samples} sample{'s' * (samples > 1)} of each model:",
        f"  {'':20} {'policy':>10} {'reference':>10}",
    ]
    for name in (name.removesuffix("/reference") for name in found if name.endswith("/reference")):
        own = found[name] if name in found else found[f"{name}/policy"]
        lines.append(f"  {name:20} {own:10.4f} {found[f'{name}/reference']:10.4f}")
    lines.append(
        f"  {'kl':20} {found['kl']:10.4f} nats an answer, 95% within {found['kl/low']:.2f} to {found['kl/high']:.2f}"
    )
    if "win_rate" in found:
        lines.append(
            f"  {'win_rate':20} {found['win_rate']:10.4f} against the reference, ties as half, 95% within "
            f"{found['win_rate/low']:.3f} to {found['win_rate/high']:.3f}"
        )
    for comparison in [c for c in comparisons if c.sample == 0][:shown]:
        lines += [f"  {on_one_line(comparison.prompt, keep_end=True)}"]
        for whose in ("reference", "policy"):
            lines.append(f"    {whose + ':':10} {on_one_line(getattr(comparison, whose).text)}")
    return "\n".join(lines)


def on_one_line(text: str, keep_end: bool = False, most: int = 240) -> str:
    """Any text as one line of at most `most` characters for a terminal, which control characters would confuse.

    >>> on_one_line(" Two\\n lines\\x1b[31m. ")
    'Two lines\\\\x1b[31m.'
    >>> on_one_line("abcdefgh", keep_end=True, most=6)
    '...fgh'
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    if len(line) <= most:
        return line
    return f"...{line[3 - most :]}" if keep_end else f"{line[: most - 3]}..."
