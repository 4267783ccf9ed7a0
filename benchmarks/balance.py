"""How long ranks wait for the slowest: tokens of the slowest rank over the mean, of the plan on 1 to 1,024 ranks.

    python benchmarks/balance.py --source ../shared/data/rm-static-test.jsonl.gz --tokenizer ../shared/tokenizers/gpt2

Nothing is trained: an optimizer step of one micro-batch is dealt to the ranks as a run would do it, with the real
lengths of a first epoch's pairs. Where the source has fewer pairs than the steps need, lengths are drawn from it again,
with replacement and a fixed seed: a step of 1,024 ranks with 16 pairs each has 16,384 pairs. Tokens are counted as the
layout has them through the model, without the padding of rows. Prints the mean over steps, and the worst step.
"""

import time

import numpy as np
from jsonargparse import auto_cli
from transformers import AutoTokenizer

from dpo_lightning.data.batching import deal
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.packing import Layout
from dpo_lightning.data.pairs import TokenizedPairs


def simulate(
    source: str,
    tokenizer: str,
    layout: Layout = "shared",
    max_length: int = 1024,
    max_ranks: int = 1024,
    most_steps: int = 100,
    least_steps: int = 20,
) -> None:
    """Print a table: ranks by pairs a rank.

    Args:
        source: whatever `data.source` takes.
        tokenizer: folder or hub id.
        layout: by which tokens are counted.
        max_length: of prompt + one answer + EOS.
        max_ranks: the largest number of ranks, of 1, 2, 4 and so on.
        most_steps: of an epoch that are dealt.
        least_steps: for which lengths are drawn again where the source is too small.
    """
    data = PreferenceDataModule(source, max_length=max_length, bad_rows=1.0)
    data.compile(AutoTokenizer.from_pretrained(tokenizer), None)
    costs = TokenizedPairs(data.tables["train"], layout, pairwise=True).costs
    sizes = (1, 2, 4, 8, 16)
    print(f"{len(costs):,} pairs, {layout}: mean {costs.mean():.0f} tokens, longest {costs.max()}")
    print("| ranks | " + " | ".join(f"{size} pairs" for size in sizes) + " | ms to deal 8 pairs |\n" + "|---" * 7 + "|")
    ranks = 1
    while ranks <= max_ranks:
        cells, spent = [], 0.0
        for size in sizes:
            ratios, seconds = imbalance(costs, ranks, size, most_steps, least_steps)
            cells.append(f"{np.mean(ratios):.3f}, {max(ratios):.3f}")
            spent = seconds if size == 8 else spent
        print(f"| {ranks:,} | " + " | ".join(cells) + f" | {1000 * spent:.1f} |", flush=True)
        ranks *= 2


def imbalance(
    costs: np.ndarray, ranks: int, batch_size: int, most_steps: int, least_steps: int
) -> tuple[list[float], float]:
    """The slowest rank's tokens over the mean in each step, and the median seconds of CPU to deal one."""
    generator = np.random.default_rng(0)
    step = ranks * batch_size
    steps = min(max(len(costs) // step, least_steps), most_steps)
    order = generator.permutation(costs) if steps * step <= len(costs) else generator.choice(costs, steps * step)
    ratios, seconds = [], []
    for start in range(0, steps * step, step):
        some = order[start : start + step]
        began = time.process_time()
        dealt = deal(some, ranks, batch_size)
        seconds.append(time.process_time() - began)
        loads = np.array([some[pairs].sum() for pairs in dealt])
        ratios.append(float(loads.max() / loads.mean()))
    return ratios, float(np.median(seconds))


if __name__ == "__main__":
    auto_cli(simulate, as_positional=False)
