"""The losses since the last report, looked at only when figures are reported: to look is to wait for the device."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dpo_lightning.data.packing import PreferenceBatch


class LossWindow:
    """The micro-batches since the last report, with their losses, so that a loss that is not finite has a name."""

    def __init__(self) -> None:
        self.parts: list[tuple[PreferenceBatch, Tensor]] = []

    def add(self, batch: PreferenceBatch, losses: Tensor) -> None:
        """Remember a micro-batch and its losses, `[B]`."""
        self.parts.append((batch, losses.detach()))

    def fault(self, step: int, file: Path, named: Callable[[list[int]], list[str]]) -> str | None:
        """What is wrong with the first micro-batch whose losses are not all finite, which is written to `file`.

        Args:
            step: the optimizer step that the last micro-batch is of.
            named: pairs' ids -> their places in words.
            file: a dictionary of the batch's tensors and its `losses`, for `torch.load`.
        """
        finite = torch.stack([losses.isfinite().all() for _, losses in self.parts]).tolist()
        if all(finite):
            return None
        first = finite.index(False)
        batch, losses = self.parts[first]
        file.parent.mkdir(parents=True, exist_ok=True)  # on another node than the first it may not be there
        plain = {"trees": [tuple(tree) for tree in batch.trees], "losses": losses.cpu()}  # loads without trusting it
        torch.save(vars(batch.to("cpu")) | plain, file)
        rows = named(batch.pair_ids[~losses.isfinite()].tolist()[:8])
        return (
            f"the loss is not finite for {', '.join(rows)}, at optimizer step {step} "
            f"or up to {len(finite) - 1 - first} micro-batches before; the batch is in {file}"
        )
