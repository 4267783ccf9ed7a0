"""Preparing a data set until it is ready to train, rows a second: ours against TRL's DPOTrainer.

    python benchmarks/prepare.py --source ../shared/data/rm-static-test.jsonl.gz --tokenizer ../shared/tokenizers/gpt2

Both get the same file and the same tokenizer, loaded beforehand. TRL's way is `load_dataset` and what `DPOTrainer` does
with it when it is constructed; its tiny model is made beforehand too, and only the data set's part of the
construction counts. Ours is `PreferenceDataModule.compile`, checks, proofs and split included, and the pairs that a
loader reads from. Each run is a process of its own with a cache of its own, in turns; imports and first calls are left
out by preparing a few rows first. Then the same once more, in a new process that finds the cache.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jsonargparse import auto_cli

#: What is measured -> who, and how many processes.
CASES = {"ours": ("ours", 0), "ours, 2 processes": ("ours", 2), "TRL": ("trl", 0), "TRL, 2 processes": ("trl", 2)}

#: Rows of the first, unmeasured preparation.
FEW = 64

Prepare = Callable[[str], float]


def measure(source: str, tokenizer: str, rounds: int = 5, max_length: int = 1024) -> None:
    """Print a table: rows a second from nothing and from the cache, in wall and in CPU seconds.

    Args:
        source: a .jsonl, .jsonl.gz or .parquet file that both understand.
        tokenizer: folder or hub id.
        rounds: of all cases in turn; one more comes first and is left out.
        max_length: of prompt + one answer + EOS.
    """
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for number in range(rounds + 1):
        for case, (who, processes) in CASES.items():
            with tempfile.TemporaryDirectory() as folder:
                for start in ("from nothing", "from the cache"):
                    run = prepare_apart(who, source, tokenizer, max_length, processes, folder)
                    if number:
                        found.setdefault((case, start), []).append(run)
                        print(f"{number} {case}, {start}: {run}", file=sys.stderr, flush=True)
    print("| | | rows/s | spread | ours / TRL | s | CPU s | CPU s, TRL / ours |\n|---|---|---|---|---|---|---|---|")
    for (case, start), runs in found.items():
        wall, cpu = (statistics.median(run[name] for run in runs) for name in ("wall", "cpu"))
        rates = sorted(run["rows"] / run["wall"] for run in runs)
        rival = found[case.replace("ours", "TRL"), start]
        faster = statistics.median(b["wall"] / a["wall"] for a, b in zip(runs, rival, strict=True))
        cheaper = statistics.median(b["cpu"] / a["cpu"] for a, b in zip(runs, rival, strict=True))
        print(
            f"| {case} | {start} | {statistics.median(rates):,.0f} | {rates[0]:,.0f} to {rates[-1]:,.0f} "
            f"| {faster:.1f} | {wall:.2f} | {cpu:.2f} | {cheaper:.1f} |"
        )


def prepare_apart(
    who: str, source: str, tokenizer: str, max_length: int, processes: int, folder: str
) -> dict[str, float]:
    """One preparation in a new process with its caches in `folder`: rows, wall seconds and CPU seconds."""
    words = [sys.executable, __file__, "--inner", who, source, tokenizer, str(max_length), str(processes), folder]
    places = {"HF_HOME": f"{folder}/hub", "HF_DATASETS_CACHE": f"{folder}/datasets", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=os.environ | places, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def inner(who: str, source: str, tokenizer: str, max_length: str, processes: str, folder: str) -> None:
    """What `prepare_apart` runs: a few rows first, then all of them, timed."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    few = Path(folder) / "few.jsonl"
    if not few.exists():
        kind = "parquet" if source.endswith(".parquet") else "json"
        rows = load_dataset(kind, data_files=source, split="train", streaming=True).take(FEW)
        few.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    prepare = {"ours": ours, "trl": trl}[who](loaded, int(max_length), int(processes))
    prepare(str(few))
    start, used = time.perf_counter(), cpu()
    rows, left_out = prepare(source)
    wall, used = time.perf_counter() - start - left_out, cpu() - used - left_out
    print(json.dumps({"rows": rows, "wall": round(wall, 3), "cpu": round(used, 3)}))


def cpu() -> float:
    """CPU seconds of this process and its children, user and system."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ours(tokenizer, max_length: int, processes: int) -> Callable[[str], tuple[int, float]]:
    """File -> its rows, and 0 seconds to leave out."""
    from dpo_lightning.data.datamodule import PreferenceDataModule
    from dpo_lightning.data.pairs import TokenizedPairs

    def prepare(source: str) -> tuple[int, float]:
        data = PreferenceDataModule(source, max_length=max_length, bad_rows=1.0, num_workers=processes)
        data.compile(tokenizer, None)
        for table in data.tables.values():
            TokenizedPairs(table, "shared", pairwise=True)
        return sum(len(part.rows) for parts in data.parts.values() for part in parts), 0.0

    return prepare


def trl(tokenizer, max_length: int, processes: int) -> Callable[[str], tuple[int, float]]:
    """File -> its rows, and the seconds of the trainer's construction that are not the data set's."""
    from datasets import load_dataset
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import DPOConfig, DPOTrainer

    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    shape = GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=max_length, vocab_size=len(tokenizer))
    policy, reference = GPT2LMHeadModel(shape), GPT2LMHeadModel(shape)
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), report_to=[], use_cpu=True, max_length=max_length,
        dataset_num_proc=processes or None, bf16=False, logging_strategy="no",
    )  # fmt: skip
    spent: list[float] = []

    class Timed(DPOTrainer):
        def _prepare_dataset(self, *given):
            start = time.perf_counter()
            rows = super()._prepare_dataset(*given)
            spent.append(time.perf_counter() - start)
            return rows

    def prepare(source: str) -> tuple[int, float]:
        kind = "parquet" if source.endswith(".parquet") else "json"
        rows = load_dataset(kind, data_files=source, split="train")
        start = time.perf_counter()
        trainer = Timed(policy, reference, config, train_dataset=rows, processing_class=tokenizer)
        whole = time.perf_counter() - start
        assert "chosen_ids" in trainer.train_dataset.column_names
        return len(rows), whole - spent.pop()

    return prepare


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inner"]:
        inner(*sys.argv[2:])
    else:
        auto_cli(measure, as_positional=False)
