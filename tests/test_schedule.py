"""The learning rates are those of transformers' schedules, to the bit, without what importing these costs."""

import subprocess
import sys

import pytest
import torch
from transformers import get_scheduler

from dpo_lightning.training.schedule import Schedule, schedule

NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (7, 5), (0, 1)])
def test_each_steps_rate_is_transformers_own(name: Schedule, warmup: int, total: int) -> None:
    rates = []
    for make in (schedule, lambda name, *given: get_scheduler(NAMES[name], *given)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
        scheduler = make(name, optimizer, warmup, total)
        rates.append([])
        for _ in range(total + 3):
            rates[-1].append(scheduler.get_last_lr())
            optimizer.step()
            scheduler.step()
    assert rates[0] == rates[1]


@pytest.mark.e2e
def test_the_trainers_modules_import_neither_peft_nor_transformers_trainer() -> None:
    """Each is half a second that a run without an adapter would wait for."""
    code = "import sys, dpo_lightning.training.cli; print(*{'peft', 'transformers.trainer_utils'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
