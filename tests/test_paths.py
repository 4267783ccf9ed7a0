"""Paths as people type them."""

from pathlib import Path

import pytest

from dpo_lightning.errors import InputError
from dpo_lightning.paths import path_of
from tests.conftest import RunCli


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/runs") == tmp_path / "runs"


@pytest.mark.parametrize(
    ("text", "why"), [("a" * 300, "too long"), ("a\0b", "null"), ("~nobody-of-this-name/x", "home directory")]
)
def test_names_that_cannot_be_get_a_sentence(text: str, why: str) -> None:
    with pytest.raises(InputError, match=rf"there can be no file or folder of this name \(.*{why}") as raised:
        path_of(text)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("option", ["model.checkpoint", "model.tokenizer", "data.source", "data.chat_template"])
def test_a_fit_with_such_a_name_ends_with_that_sentence(option: str, run_cli: RunCli) -> None:
    done = run_cli("fit", "--model.checkpoint", "world:base", "--data.source", "world:pairs", f"--{option}", "a" * 300)
    assert done.status == 2 and "there can be no file or folder of this name" in done.err[-1]
