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

    def watching(name: str) -> Callable[..., object]:
        own = getattr(DPOModule, name)

        def method(self: DPOModule, *args: object) -> object:
            nonlocal inside, steps
            steps += name == "training_step"
            reports = self._ends_window(self.trainer.global_step + 1)
            inside = name == "training_step" or not reports
            try:
                return own(self, *args)
            finally:
                inside = False

        return method

    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    for name in ("training_step", "on_before_optimizer_step", "on_train_batch_end"):
        monkeypatch.setattr(DPOModule, name, watching(name))
    words = ["--trainer.max_steps", 3, "--trainer.log_every_n_steps", 2]
    words += ["--model.loss", loss, "--model.loss.wpo", "true" if loss == "Sigmoid" else "false"]
    done = run_cli("fit", *toy_words, *words)
    assert done.status == 0, done.err
    assert steps == 3 and asked == []
