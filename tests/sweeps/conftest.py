"""A config, and processes that take no time."""

from pathlib import Path

import pytest
import yaml

from dpo_lightning.commands import runs as processes
from dpo_lightning.commands import sweep
from tests.sweeps import BASE, Runs


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    found = Runs()
    monkeypatch.setattr(processes, "launch", found)
    monkeypatch.setattr(sweep, "pause", lambda: None)
    return found


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path
