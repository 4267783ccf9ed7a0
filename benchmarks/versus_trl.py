"""Steps of this trainer and of TRL's DPOTrainer in turn: the same model, tokenizer, pairs, order and optimizer.

    python benchmarks/versus_trl.py --source PAIRS --tokenizer DIR

Each side is a whole trainer in a process of its own, which waits at the end of every step for its turn, so that the two
never compute at once and neighbours in time are compared. The model has random weights. What is not measured is what
comes before the first step. The losses of both sides are compared step by step: they do the same work.

Sides: `ours`, `cached` (with a table of the reference's log-probabilities), `padded` (our padded layout), `trl` (as it
comes), `best` (TRL without gradient checkpointing, its reference precomputed, in the micro-batch that is fastest).
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import auto_cli
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    TrainerCallback,
)

from dpo_lightning.data.batching import Order
from dpo_lightning.heap import settings
from dpo_lightning.models.layers import last_feed_forward
from dpo_lightning.models.products import multiplied_in_bf16

BETA, RATE = 0.1, 1e-6

#: Micro-batches that TRL may be fastest in.
MICRO = (1, 2, 4, 8)

Side = Literal["ours", "cached", "padded", "trl", "best"]

#: How the sides meet: TRL as it comes, TRL at its best, and our own layouts.
MEETINGS: tuple[tuple[Side, Side], ...] = (("ours", "trl"), ("cached", "best"), ("ours", "padded"))


@dataclass(frozen=True)
class Case:
    """What one process trains on.

    Args:
        side: whose trainer.
        folder: where `model` and `rows.jsonl` are, and `ordered.jsonl`, the same in the order of our first epoch.
        tokenizer: folder or hub id.
        pairs: of a step.
        micro: pairs of a micro-batch.
        steps: with those that are discarded.
        max_length: of prompt + one answer + EOS.
        half: bf16 under autocast, else fp32.
        cuda: on a GPU.
    """

    side: Side
    folder: str
    tokenizer: str
    pairs: int
    micro: int
    steps: int
    max_length: int
    half: bool
    cuda: bool


# The two sides


def train_ours(case: Case, turn: Callable[[float], None]) -> None:
    """Our trainer; `turn` is called with the loss at the end of every step."""
    from lightning import Callback, Trainer, seed_everything

    from dpo_lightning.data.datamodule import PreferenceDataModule
    from dpo_lightning.models.cached import CachedLogps
    from dpo_lightning.objective.losses import Sigmoid
    from dpo_lightning.training.allocator import KeptMemory
    from dpo_lightning.training.module import DPOModule

    class Turn(Callback):
        def on_train_batch_end(self, trainer: object, module: object, outputs: Any, batch: object, index: int) -> None:
            turn(float(outputs["loss"]))

    seed_everything(0, verbose=False)
    folder = Path(case.folder)
    module = DPOModule(
        str(folder / "model"),
        case.tokenizer,
        Sigmoid(beta=BETA),
        CachedLogps(directory=str(folder / "tables")) if case.side == "cached" else None,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True),
        lr_scheduler="constant",
        samples=0,
    )
    data = PreferenceDataModule(
        str(folder / "rows.jsonl"),
        val_source=str(folder / "validation.jsonl"),
        batch_size=case.pairs,
        max_length=case.max_length,
        layout="padded" if case.side == "padded" else "auto",
    )
    trainer = Trainer(
        accelerator="cuda" if case.cuda else "cpu",
        devices=1,
        precision="bf16-mixed" if case.half else "32-true",
        max_steps=case.steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=case.folder,
        callbacks=[KeptMemory(), Turn()],  # the first as the command line has it
    )
    trainer.fit(module, datamodule=data)


def train_trl(case: Case, turn: Callable[[float], None]) -> None:
    """TRL's trainer; `turn` is called with the mean loss of the step at the end of every step."""
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    losses: list[torch.Tensor] = []

    class Turn(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            turn(float(torch.stack(losses).mean()))
            losses.clear()

    class Watched(DPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            found = super().compute_loss(*args, **kwargs)
            losses.append(found.detach())
            return found

    best = case.side == "best"
    config = DPOConfig(
        output_dir=case.folder,
        per_device_train_batch_size=case.micro,
        gradient_accumulation_steps=case.pairs // case.micro,
        max_steps=case.steps,
        max_length=case.max_length,
        beta=BETA,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        bf16=case.half,
        use_cpu=not case.cuda,
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        **({"gradient_checkpointing": False, "precompute_ref_log_probs": True} if best else {}),
    )
    tokenizer = AutoTokenizer.from_pretrained(case.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    rows = load_dataset("json", data_files=f"{case.folder}/ordered.jsonl", split="train")
    rows = rows.select(range(case.pairs * case.steps))
    Watched(
        f"{case.folder}/model", args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[Turn()]
    ).train()


# A process that waits for its turn


class Products(TorchDispatchMode):
    """Counts the matrix products that go by, by what they multiply, and how."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, Callable[[], Any]]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket
        if name in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            left, right = args[-2:]
            told = multiplied_in_bf16 if told_bf16() else nullcontext
            self.found[left.shape, right.shape, left.dtype, told] += 1
        return function(*args, **(kwargs or {}))

    def seconds(self, device: str) -> float:
        """All of them, of dense matrices, timed alone, each a few times."""
        total = 0.0
        for (left, right, dtype, told), count in self.found.items():
            a, b = (torch.randn(shape, device=device).to(dtype) for shape in (left, right))
            with told():
                total += count * median(timed(lambda a=a, b=b: a @ b, device) for _ in range(3))
        return total


def told_bf16() -> bool:
    """Whether a CPU multiplies in bf16 what is in fp32."""
    return getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None) == "bf16"


def timed(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def flop_counter() -> FlopCounterMode:
    """A counter that knows attention on a CPU, too."""
    ops = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            ops._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
            ops._scaled_dot_product_flash_attention_for_cpu_backward: (
                lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
            ),
        },
    )


def work(case: Case) -> None:
    """One side: reports the end of every step on stdout, and takes a line on stdin as leave for the next.

    What a line says is done in that step: `go`, or `count` the FLOPs and the products.
    """
    out, sys.stdout = sys.stdout, sys.stderr
    device = "cuda" if case.cuda else "cpu"
    start, counter, products = clocks(), None, Products()
    done = 0

    def turn(loss: float) -> None:
        nonlocal start, counter, done
        if case.cuda:
            torch.cuda.synchronize()
        seconds, cpu = (now - then for now, then in zip(clocks(), start, strict=True))
        report: dict[str, float] = {"seconds": seconds, "cpu": cpu, "loss": loss, "peak": peak(case.cuda)}
        if counter is not None:
            products.__exit__(None, None, None)
            counter.__exit__(None, None, None)
            report["flops"], counter = counter.get_total_flops(), None
            forget_peak(case.cuda)  # counting takes memory, too
        done += 1
        if done == case.steps and products.found:
            gc.collect()
            report["products"] = products.seconds(device)
        print(json.dumps(report), file=out, flush=True)
        if done < case.steps:
            if sys.stdin.readline().strip() == "count":
                counter = flop_counter()
                counter.__enter__()
                products.__enter__()
            start = clocks()

    (train_trl if case.side in ("trl", "best") else train_ours)(case, turn)


def clocks() -> tuple[float, float]:
    """Seconds that have gone by, and those in which this process had a processor."""
    return time.perf_counter(), time.process_time()


def peak(cuda: bool) -> float:
    """Most memory so far, in GB: allocated on the device, or resident."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9


def forget_peak(cuda: bool) -> None:
    """Let `peak` speak of what comes after now."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what counting has freed, and the allocator keeps
        Path("/proc/self/clear_refs").write_text("5")


class Worker:
    """The other end of `work`."""

    def __init__(self, case: Case) -> None:
        self.case = case
        log = Path(case.folder) / f"{case.side}.log"
        self.log = log.open("a")
        ours = case.side not in ("trl", "best")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(asdict(case))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **(settings(os.environ) if ours else {})},  # as our command has it
        )

    def report(self) -> dict[str, float]:
        """The end of its step; waits for it."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.case.side} ended before its time:\n{Path(self.log.name).read_text()[-3000:]}")
        return json.loads(line)

    def step(self, what: str = "go") -> dict[str, float]:
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self.report()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


# The work itself


@dataclass(frozen=True)
class Work:
    """What pairs need, whoever trains on them: tokens of each pair.

    Args:
        prompt: `[pairs]`, `chosen` and `rejected` likewise.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    def of_steps(self, first: int, last: int, pairs: int) -> "Work":
        """That of the steps from `first` to before `last`, in our order, which both sides have."""
        chosen = Order(len(self.prompt), seed=0)(0)[first * pairs : last * pairs]
        return Work(self.prompt[chosen], self.chosen[chosen], self.rejected[chosen])

    @property
    def tokens(self) -> float:
        """Mean tokens of a pair, its prompt once."""
        return float((self.prompt + self.chosen + self.rejected).mean())

    def floor(self, config: PreTrainedConfig, passes: int) -> float:
        """FLOPs that a pair needs: each token once through the blocks, but for the last one's feed-forward part, which
        only those need that predict an answer's token; each answer token once through the head; each query against what
        it may see, in the last block, too. `passes` is 3 for a forward and a backward, and 1 more for a reference's
        forward. Nothing is computed again.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings().weight
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings | {id(head)})
        name = last_feed_forward(model)
        last = sum(p.numel() for p in model.get_submodule(name).parameters() if p.ndim == 2) if name else 0
        prompt, answers = self.prompt.astype(float), (self.chosen.astype(float), self.rejected.astype(float))
        visible = prompt * (prompt + 1) / 2 + sum(a * prompt + a * (a + 1) / 2 for a in answers)
        width = config.num_attention_heads * getattr(
            config, "head_dim", config.hidden_size // config.num_attention_heads
        )
        blocks = 2 * matrices * (prompt + sum(answers)) - 2 * last * (prompt + 1)  # the answers' last tokens neither
        scores = 4 * width * config.num_hidden_layers * visible
        return float(passes * (blocks + 2 * head.numel() * sum(answers) + scores).mean())


def prepare(folder: Path, source: str, tokenizer: str, config: PreTrainedConfig, count: int, max_length: int) -> Work:
    """Write the model and the pairs, texts that fit into `max_length` as they are, in both orders."""
    from dpo_lightning.data.datamodule import PreferenceDataModule, as_text

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    names = AutoTokenizer.from_pretrained(tokenizer)
    data = PreferenceDataModule(source, max_length=max_length, truncation="keep_end", bad_rows=1.0, val_fraction=0.01)
    data.compile(names, max_length)
    table = data.tables["train"].shuffle(seed=0)
    rows = as_text(table.select(range(min(2 * count, len(table)))), names)
    write(folder / "candidates.jsonl", rows)
    # Once more, as texts of their own: what was cut may have become a token longer.
    data = PreferenceDataModule(
        str(folder / "candidates.jsonl"), max_length=max_length, truncation="drop", bad_rows=1.0, val_fraction=0.01
    )
    data.compile(names, max_length)
    kept = np.sort(np.concatenate([np.asarray(table["row"]) for table in data.tables.values()]))
    if len(kept) < count:
        sys.exit(f"{source}: {count} pairs are needed, but only {len(kept)} fit; ask for fewer steps or pairs")
    chosen = [rows[number] for number in kept[:count]]
    write(folder / "rows.jsonl", chosen)
    write(folder / "ordered.jsonl", [chosen[place] for place in Order(count, seed=0)(0)])
    write(folder / "validation.jsonl", [rows[kept[-1]]])
    data = PreferenceDataModule(
        str(folder / "rows.jsonl"), val_source=str(folder / "validation.jsonl"), max_length=max_length
    )
    data.compile(names, max_length)
    table = data.tables["train"]
    if len(table) != count:
        sys.exit(f"{count - len(table)} of the {count} pairs were dropped on the second reading")
    return Work(*(np.asarray(table[f"{name}_tokens"]) for name in ("prompt", "chosen", "rejected")))


def write(file: Path, rows: Sequence[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def working(*cases: Case) -> Iterator[list[Worker]]:
    workers = []
    try:
        for case in cases:
            workers.append(Worker(case))
            workers[-1].report()  # the first step, and all before it, is not measured
        yield workers
    finally:
        for worker in workers:
            worker.end()


def fastest(case: Case) -> Case:
    """TRL's micro-batch that takes least time for a step of as many pairs."""
    found = {}
    for micro in MICRO:
        if micro <= case.pairs:
            with working(replace(case, micro=micro, steps=2)) as [worker]:
                found[micro] = worker.step()["seconds"]
                print(f"  {case.side}: micro-batches of {micro}: {found[micro]:.2f} s a step", flush=True)
    return replace(case, micro=min(found, key=found.__getitem__))


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def meet(cases: Sequence[Case], work: Work, config: PreTrainedConfig) -> None:
    """Let the sides step in turn and print a line for each, and their ratio."""
    steps, pairs = cases[0].steps - 2, cases[0].pairs
    counted_work, timed_work = work.of_steps(1, 2, pairs), work.of_steps(2, steps + 2, pairs)
    with working(*cases) as workers:
        counted = [worker.step("count") for worker in workers]
        rounds = []
        for number in range(steps):
            rounds.append([worker.step() for worker in workers])
            print(f"  step {number + 1} of {steps}: {[round(r['seconds'], 2) for r in rounds[-1]]} s", flush=True)
    for side, case in enumerate(cases):
        seconds, last = [r[side]["seconds"] for r in rounds], rounds[-1][side]
        passes = 3 if case.side in ("cached", "best") else 4
        flops, floor = counted[side]["flops"] / pairs, counted_work.floor(config, passes)
        print(
            f"| {case.side} | {spread(seconds)} | {pairs / median(seconds):.2f} | "
            f"{pairs * timed_work.tokens / median(seconds):.0f} | {last['peak']:.2f} | {flops / 1e9:.0f} | "
            f"{flops / floor:.2f} | {last['products'] / median(seconds):.0%} |",
            flush=True,
        )
    ratios, cpu = ([second[name] / first[name] for first, second in rounds] for name in ("seconds", "cpu"))
    apart = max(abs(first["loss"] - second["loss"]) for first, second in rounds)
    memory = rounds[-1][0]["peak"] / rounds[-1][1]["peak"]
    first, second = (case.side for case in cases)
    print(
        f"{second} / {first}: time {spread(ratios)}, CPU time {spread(cpu)}; {first} / {second}: memory {memory:.2f}; "
        f"losses differ by {apart:.1e} at most",
        flush=True,
    )


def compare(
    source: str = "",
    tokenizer: str = "",
    case: str = "hh",
    model: Literal["gpt2", "llama-1b"] = "gpt2",
    pairs: int = 8,
    steps: int = 5,
    max_length: int = 512,
    half: bool = False,
    cuda: bool = False,
    meetings: list[str] | None = None,
    trl_micro: int | None = None,
    worker: str | None = None,
) -> None:
    """Print a table: medians and spread over the steps, in turn.

    Args:
        source: whatever `data.source` takes.
        tokenizer: folder or hub id.
        case: what the table is headed with.
        model: shape of the model, with random weights.
        pairs: of a step.
        steps: that are measured, after two that are not.
        max_length: of prompt + one answer + EOS.
        half: bf16 under autocast, else fp32.
        cuda: on a GPU.
        meetings: which sides meet, as `ours-trl`, `cached-best`, `ours-padded`. Default: all.
        trl_micro: the micro-batch of TRL at its best. Default: the fastest of 1, 2, 4 and 8, tried first.
        worker: one side, for this script itself.
    """
    if worker is not None:
        work(Case(**json.loads(worker)))
        return
    names = meetings or ["-".join(sides) for sides in MEETINGS]
    config: PreTrainedConfig = GPT2Config(n_positions=max(1024, max_length))
    if model == "llama-1b":  # of Llama 3.2
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            max_position_embeddings=max(4096, max_length),
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=True,
        )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        work_needed = prepare(Path(folder), source, tokenizer, config, pairs * (steps + 2), max_length)
        precision = "bf16" if half else "fp32"
        print(
            f"{case}: {model}, {precision}, {pairs} pairs a step, max_length {max_length}, "
            f"{work_needed.tokens:.0f} tokens a pair with its prompt once, {torch.get_num_threads()} threads\n"
            "| side | s a step | pairs/s | useful tokens/s | peak GB | GFLOP a pair | / floor | products alone |\n"
            "|---|---|---|---|---|---|---|---|"
        )
        base = Case("ours", folder, tokenizer, pairs, pairs, steps + 2, max_length, half, cuda)
        for name in names:
            first, second = (replace(base, side=side) for side in name.split("-"))
            if second.side == "best":
                second = fastest(second) if trl_micro is None else replace(second, micro=trl_micro)
                print(f"  TRL at its best: micro-batches of {second.micro} pairs")
            meet((first, second), work_needed, config)


if __name__ == "__main__":
    auto_cli(compare, as_positional=False)
