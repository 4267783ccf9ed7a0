"""What is read is what was written, whatever it was written as; what cannot be read is named."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError

from dpo_lightning.data.sources import read
from dpo_lightning.data.splits import choose_split, own_validation
from dpo_lightning.errors import InputError

Row = dict[str, str]

COLUMNS = ("prompt", "chosen", "rejected")

#: Texts that readers like to take for something else, or to mend.
ROWS: list[Row] = [
    dict(zip(COLUMNS, cells, strict=True))
    for cells in [
        ("5", "None", "NA"),
        ("1.0", "true", "null"),
        ("2024-01-31", "nan", "-0"),
        (" a ", 'b, "c"\n\nd', "'e'\t"),
        ("漢字", "😀", "e\u0301\u2028"),
    ]
]


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps(rows))


def write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[Row]) -> None:
    Dataset.from_list(rows).to_parquet(path)


Write = Callable[[Path, list[Row]], None]
WRITERS: dict[str, Write] = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".parquet": write_parquet,
}


def compress(path: Path) -> Path:
    """The file gzipped, in its place."""
    zipped = path.with_name(path.name + ".gz")
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return zipped


@pytest.mark.parametrize(
    ("suffix", "gzipped"),
    [*((suffix, False) for suffix in WRITERS), (".jsonl", True), (".json", True), (".csv", True)],
)
def test_a_file_is_read_as_it_was_written(suffix: str, gzipped: bool, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, ROWS)
    splits = read(str(compress(path) if gzipped else path))
    assert list(splits) == ["train"]
    assert splits["train"].to_list() == ROWS


def test_line_ends_inside_a_cell_are_kept(tmp_path: Path) -> None:
    rows = [{"prompt": "a\r\nb", "chosen": "c\rd", "rejected": "e\0f"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read(str(tmp_path / "rows.jsonl"))["train"].to_list() == rows


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_folder_has_a_split_for_each_file_and_the_same_text_as_the_file(suffix: str, tmp_path: Path) -> None:
    WRITERS[suffix](tmp_path / f"train{suffix}", ROWS)
    WRITERS[suffix](tmp_path / f"test{suffix}", ROWS[:2])
    splits = read(str(tmp_path))
    assert {name: split.to_list() for name, split in splits.items()} == {"train": ROWS, "test": ROWS[:2]}


def test_folders_of_save_to_disk_are_read(tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "valid": rows.select([1])}).save_to_disk(tmp_path / "many")
    assert {name: split.to_list() for name, split in read(str(tmp_path / "one")).items()} == {"train": ROWS}
    many = {name: split.to_list() for name, split in read(str(tmp_path / "many")).items()}
    assert many == {"train": ROWS, "valid": [ROWS[1]]}


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert len(read("~/rows.jsonl")["train"]) == len(ROWS)


@pytest.mark.parametrize("name", ["rows.jsonl", "data/rows.csv.gz", "rows.parquet"])
def test_a_missing_file_is_an_error_that_names_it_and_asks_no_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=f"{name}: no such file"):
        read(name)


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.gz", "rows.jsonl.zip"])
def test_an_unknown_suffix_is_an_error_that_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a")
    with pytest.raises(InputError, match=r"\.jsonl, \.json, \.csv, \.parquet") as error:
        read(str(tmp_path / name))
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", ""),
        ("rows.jsonl", "\n\n"),
        ("rows.json", "[]"),
        ("rows.csv", "prompt,chosen,rejected\n"),
    ],
)
@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gz"])
def test_a_file_without_rows_is_an_error_that_says_so(name: str, content: str, gzipped: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=f"{name}.*empty"):
        read(str(compress(path) if gzipped else path))


def test_a_parquet_file_without_rows_is_an_error_that_says_so(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).select([]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"rows\.parquet.*empty"):
        read(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.parquet"])
def test_a_file_of_no_bytes_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=name):
        read(str(tmp_path / name))


@pytest.mark.parametrize(
    "line",
    ["not json", '{"prompt": "a", "chosen', '{"prompt": "a" "chosen": "b"}', '{"prompt": "\\ud800"}', '{"prompt": \n'],
    ids=["words", "unclosed", "comma", "surrogate", "half"],
)
def test_a_line_that_is_no_json_is_an_error_that_names_file_and_row(line: str, tmp_path: Path) -> None:
    good = [json.dumps(row) + "\n" for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join([*good[:3], line + "\n", *good[3:]]))
    with pytest.raises(InputError, match=r"rows\.jsonl.*row 3\b"):
        read(str(tmp_path / "rows.jsonl"))


def test_the_row_of_a_bad_line_counts_from_the_start_of_a_large_file(tmp_path: Path) -> None:
    """`datasets` reads ten million bytes at a time, and counts from there."""
    line = json.dumps({"prompt": "a" * 1_000_000, "chosen": "b", "rejected": "c"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(line * 13 + "not json\n")
    with pytest.raises(InputError, match=r"rows\.jsonl.*row 13\b"):
        read(str(tmp_path / "rows.jsonl"))


def test_a_csv_row_with_too_many_cells_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\na,b,c\na,b,c,d,e\n")
    with pytest.raises(InputError, match=r"rows\.csv"):
        read(str(tmp_path / "rows.csv"))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.parquet.gz"])
def test_a_parquet_file_that_is_none_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"hello"))
    with pytest.raises(InputError, match=name):
        read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.bin", "x"),
        ("train.jsonl", '{"prompt"\n'),
        ("state.json", "{}"),  # looks like save_to_disk, and is not
        ("dataset_dict.json", '{"splits": ["train"]}'),
    ],
)
def test_a_folder_that_cannot_be_read_is_an_error_that_names_it(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as error:
        read(str(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_an_empty_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read(str(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "cause",
    [ConnectionError("no route"), DatasetNotFoundError("no such data set"), ValueError("Config name is missing")],
    ids=lambda cause: type(cause).__name__,
)
def test_a_hub_id_that_cannot_be_loaded_is_an_error_with_its_name_and_the_cause(
    cause: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise cause

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match="nobody/nothing") as error:
        read("nobody/nothing")
    assert str(cause) in str(error.value)


def test_a_hub_id_gives_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, streaming: {"Dahoas/rm-static": splits}[name])
    assert {name: len(split) for name, split in read("Dahoas/rm-static").items()} == {"train": 5, "test": 1}


def test_a_split_that_is_not_there_is_an_error_that_lists_those_that_are() -> None:
    splits = {name: Dataset.from_list([{"prompt": name}]) for name in ("train", "holdout")}
    assert choose_split(splits, "holdout", "rows", "data.val_split")[0] == {"prompt": "holdout"}
    with pytest.raises(InputError, match=r"rows.*'test'.*train, holdout.*data\.val_split"):
        choose_split(splits, "test", "rows", "data.val_split")


@pytest.mark.parametrize(
    ("names", "best"),
    [
        (["train"], None),
        (["train", "holdout"], None),
        (["eval", "test", "train"], "test"),
        (["test", "val"], "val"),
        (["val", "valid"], "valid"),
        (["test", "valid", "validation"], "validation"),
    ],
)
def test_validation_comes_before_test(names: list[str], best: str | None) -> None:
    rows = Dataset.from_list(ROWS)
    assert own_validation(dict.fromkeys(names, rows)) == best
