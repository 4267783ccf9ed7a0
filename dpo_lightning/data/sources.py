"""Where rows come from: a hub dataset, a local folder or a local file, through `datasets`."""

import gzip
import json
import re
from pathlib import Path

import datasets
import pandas
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from dpo_lightning.data import world
from dpo_lightning.errors import InputError

#: File suffix -> builder of `datasets`. Text stays text: a CSV cell "5" or "None" is a string.
BUILDERS: dict[str, tuple[str, dict[str, object]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".parquet": ("parquet", {}),
}

#: The same for files that `datasets` unzips; Parquet compresses by itself.
ZIPPED = {f"{suffix}.gz": builder for suffix, builder in BUILDERS.items() if suffix != ".parquet"}

#: Names that a source's own validation split goes by, the best first.
VALIDATION_SPLITS = ("validation", "valid", "val", "test", "eval")


def read(source: str) -> dict[str, Dataset]:
    """All splits of a source by name; a single file has the one split `train`.

    Args:
        source: a hub id, a folder (of data files, or written by `save_to_disk`), a .jsonl, .json, .csv or .parquet
            file, which may be gzipped, or `world:pairs` or `world:text` of the built-in world.

    Raises:
        InputError: if it does not exist, cannot be reached or parsed, or is empty.
    """
    path = Path(source).expanduser()
    if source.startswith(world.SCHEME):
        splits = read_world(source)
    elif path.is_file():
        splits = read_file(path)
    elif path.is_dir():
        splits = read_folder(path)
    elif looks_like_hub_id(source):
        splits = read_hub(source)
    else:
        raise InputError(f"{source}: no such file or folder; data.source takes a path that exists or a hub id")
    if not any(len(split) for split in splits.values()):
        raise InputError(f"{source}: the data set is empty; a row needs a prompt and two answers")
    return splits


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


def read_file(path: Path) -> dict[str, Dataset]:
    found = builder(path)
    if found is None:
        raise InputError(f"{path}: unknown kind of file; expected {', '.join(BUILDERS | ZIPPED)}")
    name, options = found
    try:
        options = options | text_columns(path) if name == "csv" else options
        return {"train": datasets.load_dataset(name, data_files=str(path), split="train", **options)}
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


def read_folder(path: Path) -> dict[str, Dataset]:
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(str(path))
            return {"train": saved} if isinstance(saved, Dataset) else dict(saved)
        tables = sorted([*path.rglob("*.csv"), *path.rglob("*.csv.gz")])
        options = BUILDERS[".csv"][1] | text_columns(tables[0]) if tables else {}
        return dict(datasets.load_dataset(str(path), **options))
    except (DatasetGenerationError, DatasetNotFoundError, ValueError, OSError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{path}: no data set could be read from this folder: {cause}") from error


def read_hub(name: str) -> dict[str, Dataset]:
    try:
        return dict(datasets.load_dataset(name))
    except (DatasetGenerationError, DatasetNotFoundError, ValueError, OSError) as error:
        cause = " ".join(str(error).split())
        raise InputError(
            f"{name}: neither a local path nor a data set that could be loaded from the hub: {cause}; check the name, "
            "the network and your access (`hf auth login`), or give a local file"
        ) from error


def choose_split(splits: dict[str, Dataset], name: str, source: str, option: str) -> Dataset:
    """A split by name; the error lists those that there are.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in splits:
        raise InputError(f"{source}: has no split {name!r}, only {', '.join(splits)}; set {option}")
    return splits[name]


def own_validation(splits: dict[str, Dataset]) -> str | None:
    """The name of the source's own validation split, or None."""
    return next((name for name in VALIDATION_SPLITS if name in splits), None)
