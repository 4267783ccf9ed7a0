"""Where the hub cannot be reached, what is in the cache is taken, and the rest is told at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from dpo_lightning.data import world
from dpo_lightning.errors import InputError
from dpo_lightning.models.reach import answers, check_reachable, is_cached
from tests.hub_server import Hub


def asked(home: Path, code: str) -> subprocess.CompletedProcess:
    """Python in a new process, which has a cache, and a hub that does not answer."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_a_model_of_the_cache_is_had_without_asking_again_and_again(tmp_path: Path) -> None:
    model = tmp_path / "hub" / "models--somebody--policy"
    AutoConfig.from_pretrained(world.FOLDER).save_pretrained(model / "snapshots" / "1")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("1")
    done = asked(
        tmp_path,
        "from dpo_lightning.models.checkpoint import load_config\n"
        "from dpo_lightning.ui.voice import reference_of\n"
        "print(load_config('somebody/policy').model_type, reference_of('somebody/policy'))",
    )
    assert done.stdout.split() == ["gpt2", "somebody/policy"], done.stderr
    assert "Retrying" not in done.stderr


def test_a_model_that_is_nowhere_gets_a_sentence_at_once(tmp_path: Path) -> None:
    done = asked(
        tmp_path,
        "from dpo_lightning.models.reach import check_reachable\n"
        "from dpo_lightning.ui.voice import reference_of\n"
        "print(reference_of('somebody/none'))\n"
        "check_reachable('somebody/none')",
    )
    assert done.stdout.strip() == "somebody/none"
    assert "the hub, which may have a model of this name, cannot be reached" in done.stderr.splitlines()[-1]
    assert "Retrying" not in done.stderr


def test_a_hub_that_says_no_has_answered(served: Hub) -> None:
    assert answers("somebody/none") and not is_cached("somebody/none")
    check_reachable("somebody/none")


def test_what_is_no_name_is_left_to_who_loads_it() -> None:
    assert not is_cached("no name of a repository/at/all")
    with pytest.raises(InputError):
        from dpo_lightning.models.checkpoint import load_config

        load_config("no name of/a repository")
