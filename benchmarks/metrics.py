"""What reporting costs: a training step with its figures against the figures alone, on the built-in world.

python benchmarks/metrics.py
"""

import statistics
import time

import numpy as np
import torch

from dpo_lightning.data import world
from dpo_lightning.data.formats import Preference
from dpo_lightning.data.tokenization import PairTokenizer, TokenPair
from dpo_lightning.models.checkpoint import load_policy, load_tokenizer
from dpo_lightning.objective.losses import Sigmoid
from dpo_lightning.objective.metrics import STATISTICS, PreferenceMetrics, Scored

ROUNDS, PAIRS = 50, 16


def main() -> None:
    torch.set_num_threads(1)
    policy, reference = load_policy(world.BASE), load_policy(world.BASE)
    encoder = PairTokenizer(load_tokenizer(world.BASE), 96, "keep_end")
    rows = [row for _, row in zip(range(PAIRS), world.pairs(), strict=False)]
    encoded = encoder([Preference(row["prompt"], row["chosen"], row["rejected"]) for row in rows])
    pairs = [TokenPair(*map(np.array, (one.prompt, one.chosen, one.rejected))) for one in encoded]
    batch, loss = policy.lay_out(pairs), Sigmoid()
    metrics = PreferenceMetrics(loss)

    def step(statistics: tuple[str, ...]) -> Scored:
        own = policy.logps(batch, statistics)
        with torch.no_grad():
            other = reference.logps(batch)
        losses = loss(own, other)
        losses.mean().backward()
        return Scored(own, other, losses, loss.rewards(own, other))

    times: dict[str, list[float]] = {"bare": [], "step": [], "figures": []}
    for _ in range(ROUNDS):
        started = time.perf_counter()
        step(())
        times["bare"].append(time.perf_counter() - started)
        started = time.perf_counter()
        scored = step(STATISTICS)
        times["step"].append(time.perf_counter() - started)
        started = time.perf_counter()
        metrics.update(scored, batch.weights, batch.num_tokens)
        times["figures"].append(time.perf_counter() - started)
    middle = {name: statistics.median(values) for name, values in times.items()}
    for name, value in middle.items():
        print(f"{name:8} {1000 * value:9.3f} ms, {value / middle['bare']:8.2%} of a step without statistics of logits")


if __name__ == "__main__":
    main()
