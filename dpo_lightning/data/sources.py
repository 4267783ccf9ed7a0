"""Where rows come from: a hub dataset, a local folder or a local file, through `datasets`."""

import gzip
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
import pandas
import pyarrow
from datasets import Dataset, Features, IterableDataset, Value
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from dpo_lightning.data import world
from dpo_lightning.errors import InputError
from dpo_lightning.paths import path_of

#: File suffix -> builder of `datasets`. Text stays text: a CSV cell "5" or "None" is a string.
BUILDERS: dict[str, tuple[str, dict[str, object]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".parquet": ("parquet", {}),
}

#: The same for files that `datasets` unzips; Parquet compresses by itself.
ZIPPED = {f"{suffix}.gz": builder for suffix, builder in BUILDERS.items() if suffix != ".parquet"}

#: A table of rows, or a stream of them.
Rows = Dataset | IterableDataset


def read(source: str, streaming: bool = False) -> dict[str, Rows]:
    """All splits of a source by name; a single file has the one split `train`.

    Args:
        source: a hub id, a folder (of data files, or written by `save_to_disk`), a .jsonl, .json, .csv or .parquet
            file, which may be gzipped, or `world:pairs` or `world:text` of the built-in world.
        streaming: read rows only when they are asked for.

    Raises:
        InputError: if it does not exist, cannot be reached or parsed, or is empty.
    """
    path = path_of(source)
    if source.startswith(world.SCHEME):
        splits = read_world(source)
    elif path.is_file():
        splits = read_file(path, streaming)
    elif path.is_dir():
        splits = read_folder(path, streaming)
    elif looks_like_hub_id(source):
        splits = read_hub(source, streaming)
    else:
        raise InputError(f"{source}: no such file or folder; data.source takes a path that exists or a hub id")
    if not any(first_rows(split, source, 1) for split in splits.values()):
        raise InputError(f"{source}: the data set is empty; a row needs a prompt and two answers")
    if streaming:
        splits = {name: rows if is_stream(rows) else rows.to_iterable_dataset() for name, rows in splits.items()}
    return splits


def is_stream(rows: Rows) -> bool:
    return isinstance(rows, IterableDataset)


def first_rows(rows: Rows, source: str, count: int) -> list[dict[str, object]]:
    """The first rows of a split; `source` names it in the error.

    Raises:
        InputError: if a stream cannot be read.
    """
    return list(islice(each_row(rows, source), count))


def each_row(rows: Rows, source: str) -> Iterator[dict[str, object]]:
    """The rows of a split, one after another.

    Raises:
        InputError: if a stream cannot be read.
    """
    try:
        yield from rows
    except StopIteration:  # what the JSON builder makes of a file of 0 bytes
        return
    except (DatasetGenerationError, pyarrow.ArrowInvalid, ValueError, OSError, EOFError, RuntimeError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{source}: cannot be read: {cause}; mend it, or check the network") from error


def read_world(source: str) -> dict[str, Dataset]:
    """The splits of the built-in world: its pairs, or the text that its base model was trained on."""
    known = {world.PAIRS: world.pairs, world.TEXT: world.corpus}
    rows = known.get(source)
    if rows is None:
        raise InputError(f"{source}: the data of the built-in world is {' and '.join(known)}; choose one of them")
    splits: dict[str, list[dict[str, str]]] = {}
    for row in rows():
        splits.setdefault(row.pop("split"), []).append(row)
    return {name: Dataset.from_list(rows) for name, rows in splits.items()}


def looks_like_hub_id(source: str) -> bool:
    """Whether a name that is no path here may be `name` or `owner/name` on the hub."""
    path = Path(source)
    beside_others = path.parent != Path(".") and path.parent.is_dir()
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source)) and builder(path) is None and not beside_others


def builder(path: Path) -> tuple[str, dict[str, object]] | None:
    """The builder for a file, by its suffix; None for an unknown one."""
    return BUILDERS.get(path.suffix) or ZIPPED.get("".join(path.suffixes[-2:]))


def read_file(path: Path, streaming: bool) -> dict[str, Rows]:
    found = builder(path)
    if found is None:
        raise InputError(f"{path}: unknown kind of file; expected {', '.join(BUILDERS | ZIPPED)}")
    name, options = found
    try:
        options = options | text_columns(path) if name == "csv" else options
        rows = datasets.load_dataset(name, data_files=str(path), split="train", streaming=streaming, **options)
        return {"train": rows}
    except StopIteration:
        return {"train": Dataset.from_dict({})}  # what the JSON builder makes of a file of 0 bytes
    except (DatasetGenerationError, ValueError, OSError, EOFError) as error:
        if NO_ROWS in str(error):
            return {"train": Dataset.from_dict({})}
        cause = (first_bad_line(path) if name == "json" else "") or " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{path}: cannot be read as {name}: {cause}; rows count from 0; mend or remove it") from error


#: What `datasets` says of a file that can be read and has no rows.
NO_ROWS = "corresponds to no data"


def text_columns(path: Path) -> dict[str, object]:
    """The option of the CSV builder by which every column is text."""
    return {"features": Features(dict.fromkeys(pandas.read_csv(path, nrows=0).columns, Value("string")))}


def first_bad_line(path: Path) -> str:
    """The first line that is no JSON and why; `datasets` counts rows from the start of a ten-megabyte block."""
    if path.name.removesuffix(".gz").endswith(".json"):
        return ""
    row = -1
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for line in filter(bytes.strip, file):
                row += 1
                json.dumps(json.loads(line.decode("utf-8", "surrogateescape")), ensure_ascii=False).encode()
    except ValueError as error:
        return f"{error} in row {row}"
    except (OSError, EOFError) as error:  # it is not what its suffix says
        return str(error)
    return ""


def read_folder(path: Path, streaming: bool) -> dict[str, Rows]:
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(str(path))
            return {"train": saved} if isinstance(saved, Dataset) else dict(saved)
        tables = sorted([*path.rglob("*.csv"), *path.rglob("*.csv.gz")])
        options = BUILDERS[".csv"][1] | text_columns(tables[0]) if tables else {}
        return dict(datasets.load_dataset(str(path), streaming=streaming, **options))
    except (DatasetGenerationError, DatasetNotFoundError, ValueError, OSError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{path}: no data set could be read from this folder: {cause}") from error


def read_hub(name: str, streaming: bool) -> dict[str, Rows]:
    try:
        return dict(datasets.load_dataset(name, streaming=streaming))
    except (DatasetGenerationError, DatasetNotFoundError, ValueError, OSError) as error:
        cause = " ".join(str(error).split())
        raise InputError(
            f"{name}: neither a local path nor a data set that could be loaded from the hub: {cause}; check the name, "
            "the network and your access (`hf auth login`), or give a local file"
        ) from error
