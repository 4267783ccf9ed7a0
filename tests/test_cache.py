"""A table of log-probabilities is whole and of what it says, or it is refused with the difference named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config

from dpo_lightning.errors import InputError
from dpo_lightning.models import cache
from dpo_lightning.models.cache import HEADER, VALUES, Key, LogpTable, TableWriter, digest_of

KEY = Key(model="m", tokens="t", precision="32-true, torch.float32", pairs=3, values=7)
NUMBERS = -np.arange(7, dtype=np.float32)


def written(folder: Path, key: Key = KEY) -> Path:
    """A table in two parts, the second one first."""
    place = folder / key.name
    writer = TableWriter(place, key, np.dtype("float32"))
    writer.write(4, NUMBERS[4:])
    writer.write(0, NUMBERS[:4])
    writer.finish({"computed_by": "a test"})
    return place


def test_what_was_written_is_read(tmp_path: Path) -> None:
    place = written(tmp_path)
    assert np.array_equal(LogpTable.open(place, KEY).values, NUMBERS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [KEY.name]  # nothing else is left there


@pytest.mark.parametrize("name", ["model", "tokens", "precision", "pairs", "values", "version"])
def test_a_key_has_another_name_whatever_differs(name: str) -> None:
    value = getattr(KEY, name)
    assert replace(KEY, **{name: value + 1 if isinstance(value, int) else f"{value}x"}).name != KEY.name


def test_a_model_has_another_digest_whatever_of_it_differs() -> None:
    config, tensors = GPT2Config(n_layer=1), {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    digest = digest_of(config, tensors)
    assert digest == digest_of(GPT2Config(n_layer=1), {"b": torch.zeros(4), "a": torch.ones(2, 3)})
    nudged = torch.ones(2, 3)
    nudged[1, 2] += 2**-23
    others = [
        {**tensors, "a": nudged},
        {**tensors, "a": torch.ones(3, 2)},
        {**tensors, "a": torch.ones(2, 3, dtype=torch.bfloat16)},
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"]},
    ]
    assert len({digest, *(digest_of(config, other) for other in others)}) == 6
    assert digest_of(GPT2Config(n_layer=1, activation_function="relu"), tensors) != digest


def spoil_header(place: Path, **values: object) -> None:
    header = json.loads((place / HEADER).read_text())
    header["key"] |= values
    (place / HEADER).write_text(json.dumps(header))


def cut(place: Path) -> None:
    data = (place / VALUES).read_bytes()
    (place / VALUES).write_bytes(data[:-4])


def flip(place: Path) -> None:
    data = bytearray((place / VALUES).read_bytes())
    data[-1] ^= 1
    (place / VALUES).write_bytes(data)


#: What happens to a table -> what the refusal says.
SPOILED = {
    "foreign model": (lambda place: spoil_header(place, model="other"), "model 'other', this run needs 'm'"),
    "foreign tokens": (lambda place: spoil_header(place, tokens="other"), "tokens 'other', this run needs 't'"),
    "precision": (lambda place: spoil_header(place, precision="bf16-mixed"), "precision 'bf16-mixed'"),
    "older": (lambda place: spoil_header(place, version=0), "version 0, this run needs 1"),
    "cut": (cut, "no table"),
    "fewer": (lambda place: np.save(place / VALUES, NUMBERS[:5]), r"\(5,\) values, expected \(7,\)"),
    "flipped bit": (flip, "checksum"),
    "other values": (lambda place: np.save(place / VALUES, NUMBERS + 1), "checksum"),
    "no header": (lambda place: (place / HEADER).unlink(), "no table"),
    "no values": (lambda place: (place / VALUES).unlink(), "no table"),
    "no JSON": (lambda place: (place / HEADER).write_text("{"), "no table"),
    "other JSON": (lambda place: (place / HEADER).write_text("[1]"), "no table"),
    "a file in its place": (lambda place: (shutil.rmtree(place), place.touch()), "no table"),
    "code": (lambda place: np.save(place / VALUES, np.array([print]), allow_pickle=True), "no table"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_table_that_does_not_fit_is_refused_with_the_difference_named(case: str, tmp_path: Path) -> None:
    place = written(tmp_path)
    spoil, said = SPOILED[case]
    spoil(place)
    with pytest.raises(InputError, match=f"(?s){place}.*{said}.*delete this folder"):
        LogpTable.open(place, KEY)


def test_a_table_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path / KEY.name, KEY, np.dtype("float32"))
    writer.write(0, NUMBERS)
    assert not (tmp_path / KEY.name).exists()
    writer.give_up()
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_make_the_same_table_the_first_stays(tmp_path: Path) -> None:
    first, second = (TableWriter(tmp_path / KEY.name, KEY, np.dtype("float32")) for _ in range(2))
    first.write(0, NUMBERS)
    second.write(0, NUMBERS + 1)
    first.finish({})
    second.finish({})
    assert np.array_equal(LogpTable.open(tmp_path / KEY.name, KEY).values, NUMBERS)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_value_that_was_not_written_shows(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path / KEY.name, KEY, np.dtype("float32"))
    writer.write(0, NUMBERS[:6])
    writer.finish({})
    assert np.isnan(LogpTable.open(tmp_path / KEY.name, KEY).values[6])


def test_a_place_that_takes_no_table_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written there .*set model\.reference\.directory"):
        TableWriter(tmp_path / "file" / KEY.name, KEY, np.dtype("float32"))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(InputError, match=r"0\.0 MB are needed .* 1\.0 MB are free"):
        TableWriter(tmp_path / KEY.name, KEY, np.dtype("float32"))
    assert not any(path.is_dir() for path in tmp_path.iterdir())
