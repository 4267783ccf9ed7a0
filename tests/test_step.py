"""What a training step does not do: wait for the device."""

from collections.abc import Callable

import pytest
import torch

from dpo_lightning.training.module import DPOModule
from tests.conftest import RunCli

#: Whatever gives a number of Python's for a tensor must wait until the tensor is known.
WAITING = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "cpu", "numpy")


@pytest.mark.parametrize("loss", ["Sigmoid", "BCO", "AOT"])
def test_a_step_never_asks_a_tensor_for_its_value(
    run_cli: RunCli, toy_words: list[str], monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Between two reports nothing on the host depends on the device, so that it can run ahead."""
    asked: list[str] = []
    steps = 0
    inside = False

    def watched(name: str) -> Callable[..., object]:
        own = getattr(torch.Tensor, name)

        def method(self: torch.Tensor, *args: object, **kwargs: object) -> object:
            if inside:
                asked.append(name)
            return own(self, *args, **kwargs)

        return method

    step = DPOModule.training_step

    def training_step(self: DPOModule, batch: object, batch_idx: int) -> torch.Tensor:
        nonlocal inside, steps
        inside, steps = True, steps + 1
        try:
            return step(self, batch, batch_idx)
        finally:
            inside = False

    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    monkeypatch.setattr(DPOModule, "training_step", training_step)
    words = [
        "--trainer.max_steps",
        3,
        "--model.loss",
        loss,
        "--model.loss.wpo",
        "true" if loss == "Sigmoid" else "false",
    ]
    done = run_cli("fit", *toy_words, *words)
    assert done.status == 0, done.err
    assert steps == 3 and asked == []
