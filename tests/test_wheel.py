"""The wheel has all that the package needs and nothing else, and what it ships works where the repository is not."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from dpo_lightning.data import world

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dpo_lightning"

PROMPT = "What does an electrician do?"

#: Loads the built-in model and pairs, and says from where and what.
USER = f"""
import json
import torch
import dpo_lightning
from dpo_lightning.data.sources import read
from dpo_lightning.models.checkpoint import load_policy, load_tokenizer

policy, tokenizer = load_policy("world:base"), load_tokenizer("world:base")
with torch.no_grad():
    logits = policy.model(tokenizer({PROMPT!r}, return_tensors="pt").input_ids).logits
pairs = {{name: len(rows) for name, rows in read("world:pairs").items()}}
print(json.dumps([dpo_lightning.__file__, pairs, tokenizer.decode(logits[0, -1].topk(5).indices)]))
"""


@pytest.fixture(scope="module")
def unzipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel has in it, built from a copy of the sources without the network."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        place,
    ]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "unzipped")
    return place / "unzipped"


def files(folder: Path) -> dict[str, bytes]:
    """Path below the folder -> content."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_the_wheel_has_every_file_of_the_package_as_it_is_and_no_other(unzipped: Path) -> None:
    shipped, own = files(unzipped / PACKAGE.name), files(PACKAGE)
    assert sorted(shipped) == sorted(own)
    assert {name for name in own if shipped[name] != own[name]} == set()
    names = (
        "facts.yaml",
        "pairs.jsonl.gz",
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    assert {f"assets/world/{name}" for name in names} <= shipped.keys()
    other = [path.name for path in unzipped.iterdir() if path.name != PACKAGE.name]
    assert len(other) == 1 and other[0].endswith(".dist-info")


def test_the_unzipped_wheel_loads_its_own_model_and_pairs_anywhere(unzipped: Path, tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment = os.environ | offline | {"PYTHONPATH": str(unzipped)}
    command = [sys.executable, "-c", USER]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    place, pairs, likeliest = json.loads(done.stdout.strip().splitlines()[-1])
    assert Path(place).is_relative_to(unzipped)
    assert pairs == Counter(row["split"] for row in world.pairs())
    tokenizer = AutoTokenizer.from_pretrained(world.FOLDER)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(world.FOLDER)(**tokenizer(PROMPT, return_tensors="pt")).logits
    assert likeliest == tokenizer.decode(logits[0, -1].topk(5).indices)


def test_the_assets_are_small() -> None:
    assert sum(map(len, files(PACKAGE / "assets").values())) <= 4_000_000


def test_the_shipped_weights_are_those_of_a_gpt2_and_all_finite() -> None:
    """All that its config asks for, and no other."""
    config = AutoConfig.from_pretrained(world.FOLDER)
    assert config.architectures == ["GPT2LMHeadModel"]
    weights = load_file(world.FOLDER / "model.safetensors")
    assert all(weight.isfinite().all() and weight.is_floating_point() for weight in weights.values())
    expected = GPT2LMHeadModel(config).state_dict()
    missing = expected.keys() - weights.keys()
    assert weights.keys() <= expected.keys() and missing <= {"lm_head.weight"}  # which is the embedding
    assert {name: weight.shape for name, weight in weights.items()} == {name: expected[name].shape for name in weights}
