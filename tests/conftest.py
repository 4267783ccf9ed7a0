"""What all tests share: a cache of their own, a toy model with pairs, and the command line called in this process."""

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
from huggingface_hub import constants

from dpo_lightning.__main__ import main
from tests.families import tiny_model
from tests.hub_server import TOKEN, Hub, hub_server
from tests.toy import make_toy

# The models are tiny: a second thread costs more than it brings, and much more on a busy machine.
torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"

RunCli = Callable[..., SimpleNamespace]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="../shared is absent")
    for item in items:
        if "realdata" in item.keywords and not SHARED.exists():
            item.add_marker(skip)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `pairs.jsonl` (60 rows)."""
    return make_toy(tmp_path_factory.mktemp("toy"), pairs=60)


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> RunCli:
    """Calls `python -m dpo_lightning WORDS` in this process: exit status, stdout and the lines of stderr."""

    def run(*words: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["dpo_lightning", *map(str, words)])
        capfd.readouterr()
        for name in ("lightning", "lightning.pytorch", "lightning.fabric", "datasets"):
            for handler in logging.getLogger(name).handlers:
                if type(handler) is logging.StreamHandler:  # made for the stderr of whichever test came first
                    handler.stream = sys.stderr
        try:
            status = main()
        except SystemExit as stop:
            status = stop.code
        out, err = capfd.readouterr()
        return SimpleNamespace(status=status, out=out, err=err.strip().splitlines())

    return run


@pytest.fixture
def toy_words(toy: Path, tmp_path: Path) -> list[str]:
    """Options of a small run on the toy, on the CPU, under `tmp_path / runs`."""
    options = {
        "model.checkpoint": toy / "model",
        "model.optimizer.lr": 1e-3,
        "data.source": toy / "pairs.jsonl",
        "data.val_fraction": 0.2,
        "data.batch_size": 4,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": tmp_path / "runs",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a tiny model of a family, with options, and gives its folder; the same one for the same question."""

    def folder(family: str, **options: object) -> Path:
        path = root / (family + "".join(f"-{name}-{value}" for name, value in options.items()))
        if not path.exists():
            tiny_model(family, **options).save_pretrained(path)
        return path

    root = tmp_path_factory.mktemp("models")
    return folder


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub that this process's client speaks to, whose user is `somebody`."""
    with hub_server() as found:
        found.tokens[TOKEN] = "somebody"
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.address + "".join(template[1:]))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("dpo_lightning.models.hub.WAIT", 0.01)
        yield found
