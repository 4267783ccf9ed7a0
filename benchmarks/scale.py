"""A million pairs: how long they take to compile, and how much memory is kept for them.

    python benchmarks/scale.py --rows 1000000 --processes 2

Rows are made up. Memory is this process's own (anonymous pages): what is mapped from the table's file is not counted,
since the system takes it back when it needs it.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")

from dpo_lightning.data.batching import BatchPlan
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.pairs import TokenizedPairs
from dpo_lightning.models.checkpoint import load_tokenizer


def own_memory() -> float:
    """Anonymous memory of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> None:
    """Make rows, compile them, and take a thousand batches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        with source.open("w") as file:
            for i in range(options.rows):
                row = {"prompt": f"What is {i}?", "chosen": f" It is number {i}.", "rejected": " I do not know."}
                if i % 1000 == 7:
                    row["rejected"] = " "
                file.write(json.dumps(row) + "\n")
        data = PreferenceDataModule(str(source), num_workers=options.processes)
        tokenizer = load_tokenizer("world:base")
        before, start = own_memory(), time.perf_counter()
        data.compile(tokenizer, 512)
        print(f"compiled in {time.perf_counter() - start:.0f} s, {own_memory() - before:.0f} MB kept")
        start = time.perf_counter()
        pairs = TokenizedPairs(data.tables["train"], "shared", pairwise=True)
        plan = BatchPlan(pairs.costs, 8, shuffle=True).batches(0)
        print(f"planned in {time.perf_counter() - start:.2f} s, {own_memory() - before:.0f} MB kept")
        start = time.perf_counter()
        for _ in range(1000):
            pairs[next(plan)]
        print(f"1,000 batches of 8 in {time.perf_counter() - start:.2f} s, {own_memory() - before:.0f} MB kept")


if __name__ == "__main__":
    main()
