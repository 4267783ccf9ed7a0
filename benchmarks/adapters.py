"""Peak memory of a whole `fit` of a Llama of 1B parameters: all weights against a frozen copy, and what needs less.

    python benchmarks/adapters.py

Random weights, 32-true, one short pair a step: what is measured are weights, gradients and the optimizer's state, not
activations. Prints a table; checkpoint, validation and export included. Needs 17 GB of disk and 21 GB of memory.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from jsonargparse import auto_cli
from transformers import LlamaConfig, LlamaForCausalLM

#: Of Llama 3.2 1B, but 12 layers in place of 16: of 0.99 billion parameters all fits into 24 GB.
SHAPE = {
    "hidden_size": 2048,
    "num_hidden_layers": 12,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
}

#: What is trained against what -> options.
CASES: dict[str, list[str]] = {
    "all weights, FrozenModel": ["--model.reference", "FrozenModel"],
    "all weights, CachedLogps": ["--model.reference", "CachedLogps"],
    "LoRA, AdapterOff": ["--model.lora.r", "16", "--model.reference", "AdapterOff"],
    "LoRA, CachedLogps": ["--model.lora.r", "16", "--model.reference", "CachedLogps"],
}


def peak(words: list[str]) -> float:
    """Peak resident memory of one fit, in 10^9 bytes: measured by a process between, which waits for that one alone."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, sys.executable, "-m", "dpo_lightning", "fit", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024 / 1e9  # Linux counts in KiB


def measure(layers: int = SHAPE["num_hidden_layers"], steps: int = 2) -> None:
    """Run every case and print the peaks.

    Args:
        layers: of the model; fewer for a quick look.
        steps: optimizer steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": layers}))
        print(f"{model.num_parameters() / 1e9:.2f} billion parameters, 32-true")
        model.save_pretrained(f"{folder}/model")
        del model
        options = {
            "model.checkpoint": f"{folder}/model",
            "model.tokenizer": "world:base",
            "model.samples": 0,
            "data.source": "world:pairs",
            "data.batch_size": 1,
            "data.max_train_pairs": 4,
            "data.max_val_pairs": 2,
            "trainer.max_steps": steps,
            "trainer.accelerator": "cpu",
            "trainer.num_sanity_val_steps": 0,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        full = 0.0
        for name, more in CASES.items():
            place = ["--trainer.default_root_dir", str(Path(folder) / "runs" / name.replace(", ", "-"))]
            gigabytes = peak([*words, *more, *place])
            shutil.rmtree(Path(folder) / "runs")
            full = full or gigabytes
            print(f"{name:28} {gigabytes:6.2f} GB  {gigabytes / full:5.0%}", flush=True)


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
