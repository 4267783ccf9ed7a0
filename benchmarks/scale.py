"""A million pairs: how long they take to compile, how much memory they take, and how soon a second start is ready.

    python benchmarks/scale.py --rows 1000000 --processes 2

Rows are made up, as Parquet or as JSON lines. Each start is a process of its own; the second finds the first one's
cache. Memory is the growth of its resident set over the imports, at its end and at its peak, and apart from that
its own (anonymous) part: what is mapped from the table's file is in the resident set, but the system takes it back
when it needs it. Times are beyond imports.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

#: Rows that are written at once.
BLOCK = 100_000


def main() -> None:
    """Make rows, and start twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"rows.{options.format}"
        write(source, options.rows)
        print(f"{options.rows:,} rows, {source.stat().st_size / 1e6:.0f} MB of {options.format}", flush=True)
        places = {"HF_DATASETS_CACHE": f"{folder}/datasets", "HF_HUB_OFFLINE": "1"}
        for name in ("first", "second"):
            print(f"{name} start", flush=True)
            words = [sys.executable, __file__, "--inner", str(source), str(options.processes)]
            subprocess.run(words, env=os.environ | places, check=True)


def write(source: Path, count: int) -> None:
    """Made-up rows, one in a thousand of them bad."""
    import pyarrow
    from pyarrow import parquet

    if source.suffix == ".jsonl":
        with source.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(0, count))
        return
    schema = pyarrow.schema(dict.fromkeys(("prompt", "chosen", "rejected"), pyarrow.string()))
    with parquet.ParquetWriter(source, schema) as file:
        for first in range(0, count, BLOCK):
            file.write_table(pyarrow.Table.from_pylist(list(rows(first, min(first + BLOCK, count))), schema))


def rows(first: int, end: int) -> Iterator[dict[str, str]]:
    for i in range(first, end):
        rejected = " " if i % 1000 == 7 else " I do not know."
        yield {"prompt": f"What is {i}?", "chosen": f" It is number {i}.", "rejected": rejected}


def inner(source: str, processes: str) -> None:
    """One start: compile, plan, and a thousand batches."""
    from dpo_lightning.data.batching import BatchPlan
    from dpo_lightning.data.datamodule import PreferenceDataModule
    from dpo_lightning.data.pairs import TokenizedPairs
    from dpo_lightning.models.checkpoint import load_tokenizer

    tokenizer = load_tokenizer("world:base")
    before, start = memory(), time.perf_counter()
    data = PreferenceDataModule(source, num_workers=int(processes))
    data.compile(tokenizer, 512)
    say("compiled", start, before)
    pairs = TokenizedPairs(data.tables["train"], "shared", pairwise=True)
    plan = BatchPlan(pairs.costs, 8, shuffle=True).batches(0)
    pairs[next(plan)]
    say("the first batch", start, before)
    start = time.perf_counter()
    for _ in range(1000):
        pairs[next(plan)]
    say("1,000 batches of 8 alone", start, before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  at the peak {peak - before['VmRSS']:.0f} MB resident", flush=True)


def memory() -> dict[str, float]:
    """This process's resident memory and the part of it that is no file's, in MB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0][:-1]: int(line[1]) / 1024 for line in lines if line[0] in ("VmRSS:", "RssAnon:")}


def say(what: str, start: float, before: dict[str, float]) -> None:
    now = {name: value - before[name] for name, value in memory().items()}
    seconds = time.perf_counter() - start
    print(f"  {what}: {seconds:.1f} s, {now['VmRSS']:.0f} MB resident, {now['RssAnon']:.0f} MB its own", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inner"]:
        inner(*sys.argv[2:])
    else:
        main()
