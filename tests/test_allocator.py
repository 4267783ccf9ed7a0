"""Memory that a step has freed is not given back."""

import subprocess
import sys

import pytest

#: Resident MB after a tensor of 400 MB was freed, over that before it was made.
MEASURE = """
import re, sys, torch
from dpo_lightning.training.allocator import keep_freed_memory
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resident()
made = torch.ones(100, 2**20)
del made
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("word", "least", "most"), [("keep", 380, 450), ("leave", -50, 50)])
def test_what_was_freed_stays_with_the_process(word: str, least: float, most: float) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, word], capture_output=True, text=True, check=True)
    assert least < float(done.stdout) < most
