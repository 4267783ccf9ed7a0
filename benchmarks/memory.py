"""Peak memory of a whole `fit`: GPT-2 124M with random weights, frozen copy, bf16-mixed, 8 pairs a step.

    python benchmarks/memory.py --source ../shared/data/rm-static-test.jsonl.gz --tokenizer ../shared/tokenizers/gpt2

Prints the peak of the process, checkpoint, validation and export included, and exits with 1 if it is above the limit.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from jsonargparse import auto_cli
from transformers import GPT2Config, GPT2LMHeadModel

CONFIG = Path(__file__).parents[1] / "configs" / "gpt2.yaml"


def measure(source: str, tokenizer: str, steps: int = 10, max_length: int = 512, limit_gb: float = 6.0) -> None:
    """Run `fit` and print its peak resident memory.

    Args:
        source: whatever `data.source` takes.
        tokenizer: folder or hub id of GPT-2's tokenizer.
        steps: optimizer steps.
        max_length: of prompt + one answer + EOS.
        limit_gb: peak above which the exit status is 1, in 10^9 bytes.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(f"{folder}/gpt2")
        options = {
            "config": CONFIG,
            "model.checkpoint": f"{folder}/gpt2",
            "model.tokenizer": tokenizer,
            "data.source": source,
            "data.max_length": max_length,
            "trainer.max_steps": steps,
            "trainer.limit_val_batches": 4,
            "trainer.accelerator": "cpu",
            "trainer.default_root_dir": f"{folder}/runs",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "dpo_lightning", "fit", *words], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
    print(f"Peak resident memory: {peak:.2f} GB (limit {limit_gb:g})")
    sys.exit(peak > limit_gb)


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
