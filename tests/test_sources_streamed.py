"""What is streamed is what is in the file, from any row on; where it breaks off, that is said when it is reached."""

import json
from itertools import islice
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from dpo_lightning.data.sources import each_row, is_stream, read
from dpo_lightning.errors import InputError
from tests.test_sources import ROWS, WRITERS, compress, write_jsonl


@pytest.mark.parametrize(
    ("suffix", "gzipped"),
    [*((suffix, False) for suffix in WRITERS), (".jsonl", True), (".json", True), (".csv", True)],
)
def test_a_stream_has_the_rows_of_the_file_in_their_order_from_any_of_them_on(
    suffix: str, gzipped: bool, tmp_path: Path
) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, ROWS)
    splits = read(str(compress(path) if gzipped else path), streaming=True)
    assert list(splits) == ["train"] and is_stream(splits["train"])
    for start in range(len(ROWS)):
        assert list(splits["train"].skip(start)) == ROWS[start:]


@pytest.mark.parametrize("saved", [False, True])
def test_a_folder_and_the_built_in_world_stream_too(saved: bool, tmp_path: Path) -> None:
    if saved:
        DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])}).save_to_disk(tmp_path)
    else:
        write_jsonl(tmp_path / "train.jsonl", ROWS)
        write_jsonl(tmp_path / "test.jsonl", ROWS[:2])
    streamed = read(str(tmp_path), streaming=True)
    assert all(map(is_stream, streamed.values()))
    assert {name: list(split) for name, split in streamed.items()} == {"train": ROWS, "test": ROWS[:2]}
    world = read("world:pairs", streaming=True)["validation"]
    assert is_stream(world) and list(world.take(3)) == read("world:pairs")["validation"].select(range(3)).to_list()


@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    "broken", [b"not json\n", b'{"prompt": "a", "chosen', b"\xff\xfe\n"], ids=["words", "end", "bytes"]
)
def test_a_stream_that_breaks_in_its_midst_is_an_error_that_names_it_once_it_is_read_so_far(
    broken: bytes, gzipped: bool, tmp_path: Path
) -> None:
    """A few megabytes in, so that its beginning can be read."""
    path = tmp_path / "rows.jsonl"
    line = (json.dumps({"prompt": "a" * 100_000, "chosen": "b", "rejected": "c"}) + "\n").encode()
    path.write_bytes(line * 250 + broken)
    rows = read(str(compress(path) if gzipped else path), streaming=True)["train"]
    found = each_row(rows, str(path))
    assert len(list(islice(found, 50))) == 50
    with pytest.raises(InputError, match=r"rows\.jsonl.*cannot be read"):
        list(found)


def test_a_gzip_file_that_is_cut_off_is_an_error_of_the_stream_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS * 1000)
    zipped = compress(path)
    zipped.write_bytes(zipped.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"rows\.jsonl\.gz"):
        list(each_row(read(str(zipped), streaming=True)["train"], str(zipped)))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_an_empty_file_is_an_error_that_names_it_before_anything_is_streamed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("prompt,chosen,rejected\n" if name.endswith("csv") else "")
    with pytest.raises(InputError, match=rf"{name}: the data set is empty"):
        read(str(tmp_path / name), streaming=True)
