"""What memory a run needs, against what there is: said before its first step, and tried with its largest batch.

What stays is counted: weights, gradients, the optimizer's state, the reference. What comes and goes with a batch is
measured: the one with the most tokens goes forward and backward once before any is trained on, with room kept for the
state that the optimizer does not have yet. So a run that does not fit ends in its first seconds and says what would
help. Nothing is left of the try: no gradient, no random number, no figure.

Buffers within a kernel and chunks of logits that are computed again (`objective/logps.py`) are not in the plan; on a
GPU the peak of the try has them.

Legend: B pairs
"""

from dataclasses import dataclass, replace

GB = 1e9


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one process needs on its device.

    Args:
        weights: the policy's, what is not trained too.
        gradients: of what is trained.
        optimizer: the optimizer's state, once it has one.
        reference: what is in memory for the reference alone.
        buckets: copies of the gradients through which DDP adds them up.
        coming: the part of `optimizer` that is not in memory yet.
        available: what there is, what is loaded included; None where that is not known.
        activations: what is kept of the largest batch until its backward; None as long as it was not tried.
        peak: most that was allocated in the try; None where the device does not count.
        remarks: row of the table -> what is said behind its figure.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    buckets: int = 0
    coming: int = 0
    available: int | None = None
    activations: int | None = None
    peak: int | None = None
    remarks: tuple[tuple[str, str], ...] = ()

    @property
    def fixed(self) -> int:
        """What is needed whatever the batch."""
        return self.weights + self.gradients + self.buckets + self.optimizer + self.reference

    @property
    def total(self) -> int:
        """What is needed, as far as is known: by the measured peak where that is more than what was counted."""
        return max(self.fixed + (self.activations or 0), self.peak or 0)

    @property
    def is_lacking(self) -> bool:
        """Whether more is needed than there is."""
        return self.available is not None and self.total > self.available

    @property
    def room(self) -> int | None:
        """What a batch may take beside all that stays; None where that is not known."""
        return None if self.available is None else self.available - self.fixed

    def after(self, activations: int, peak: int | None, said: str) -> "MemoryPlan":
        """The plan after the largest batch was tried, with what is said of that."""
        remarks = (*self.remarks, ("largest batch", said))
        return replace(self, activations=activations, peak=peak, remarks=remarks)

    def rows(self) -> list[str]:
        """The table of what stays, a line each."""
        figures = {"weights": self.weights, "gradients": self.gradients}
        figures |= {"DDP's buckets": self.buckets} if self.buckets else {}
        figures |= {"optimizer state": self.optimizer, "reference": self.reference}
        lines = [self._row(name, size) for name, size in figures.items()]
        return [*lines, self._row("there is", self.available)]

    def last_rows(self) -> list[str]:
        """The table's rows that are known after the try."""
        lines = [self._row("largest batch", self.activations)]
        lines += [] if self.peak is None else [self._row("peak, measured", self.peak)]
        return [*lines, self._row("total", self.total)]

    def _row(self, name: str, size: int | None) -> str:
        figure = "not known" if size is None else f"{size / GB:.3f}"
        return f"  {name:16} {figure:>10}  {dict(self.remarks).get(name, '')}".rstrip()

    def shortage(self) -> str:
        """What is needed and what there is, in words."""
        parts = {"weights": self.weights, "gradients": self.gradients + self.buckets}
        parts |= {"optimizer state": self.optimizer, "reference": self.reference}
        words = [f"{name} {in_gb(size)}" for name, size in parts.items() if size]
        if self.activations is not None:
            words.append(f"largest batch {in_gb(self.activations)}")
        there = "what there is is not known" if self.available is None else f"there is {in_gb(self.available)}"
        return f"at least {in_gb(self.total)} are needed ({', '.join(words)}), {there}"


@dataclass(frozen=True)
class Means:
    """What a run could do to need less memory, and does not do yet.

    Args:
        batch_size: data.batch_size.
        accumulate: trainer.accumulate_grad_batches; None where a step must be one batch.
        pairs: B of the largest batch.
        longest: tokens of its longest sequence.
        layers: of the model, each of which could be computed again in backward; 0 where they are, or cannot be.
        adapter: whether an adapter could be trained in place of the model.
        table: whether the reference could be a table of log-probabilities.
        copy: whether the reference is a copy of the policy, of which an adapter needs none.
        half: whether the forward could be in half precision.
        devices: over which the models could be spread; 0 where they are, or where that would help nothing.
    """

    batch_size: int
    accumulate: int | None
    pairs: int
    longest: int
    layers: int
    adapter: bool
    table: bool
    copy: bool
    half: bool
    devices: int

    def advice(self, plan: MemoryPlan) -> str:
        """What to change, what helps most first."""
        kept = plan.activations or 0
        found: list[tuple[float, str]] = []
        if self.pairs > 1:
            size = max(size for size in range(1, self.pairs) if self.batch_size % size == 0)
            saved = kept * (1 - size / self.pairs)
            same = ""
            if self.accumulate is not None:
                micro = self.accumulate * self.batch_size // size
                same = f" and raise trainer.accumulate_grad_batches to {micro} for the same steps"
            found.append((saved, f"lower data.batch_size to {size}{same}{less(saved)}"))
        if self.longest > 2:
            text = f"lower data.max_length below {self.longest:,}, the longest sequence of that batch"
            found.append((kept / 4, text))
        if self.layers > 1:
            saved = kept * (1 - 1 / self.layers)
            found.append((saved, f"set model.gradient_checkpointing true{less(saved)}"))
        if self.table:
            text = f"set model.reference CachedLogps{less(plan.reference)}"
            found.append((plan.reference, text))
        if self.adapter:
            saved = plan.gradients + plan.buckets + plan.optimizer + (plan.reference if self.copy else 0)
            found.append((saved, f"train an adapter, model.lora.r 16{less(saved)}"))
        if self.half:
            found.append((kept / 2, f"set trainer.precision bf16-mixed{less(kept / 2)}"))
        if self.devices:
            devices = max(self.devices, 2)
            saved = plan.fixed * (1 - 1 / devices)
            found.append((saved, f"set trainer.strategy fsdp, on {devices} devices{less(saved)}"))
        texts = [text for _, text in sorted(found, key=lambda pair: -pair[0])]
        return "; or ".join(texts) or "take a smaller model or a larger device"


def in_gb(size: float) -> str:
    """Bytes in words."""
    return f"{size / GB:.3f} GB"


def less(size: float) -> str:
    """What would be saved, in words; empty where that is not known."""
    return f" (about {in_gb(size)} less)" if size else ""
