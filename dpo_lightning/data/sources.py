"""Where rows come from: a hub dataset, a local folder or a local file, through `datasets`."""

import re
from pathlib import Path

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from dpo_lightning.errors import InputError

#: File suffix -> builder of `datasets`. Text stays text: a CSV cell "5" or "None" is a string.
BUILDERS: dict[str, tuple[str, dict[str, object]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"dtype": "str", "keep_default_na": False}),
    ".parquet": ("parquet", {}),
}

#: Names that a source's own validation split goes by, the best first.
VALIDATION_SPLITS = ("validation", "valid", "val", "test", "eval")


def read(source: str) -> dict[str, Dataset]:
    """All splits of a source by name; a single file has the one split `train`.

    Args:
        source: a hub id, a folder (of data files, or written by `save_to_disk`), or a .jsonl, .json, .csv or .parquet
            file, which may be gzipped.

    Raises:
        InputError: if it does not exist, cannot be reached or parsed, or is empty.
    """
    path = Path(source).expanduser()
    if path.is_file():
        splits = read_file(path)
    elif path.is_dir():
        splits = read_folder(path)
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source) and builder(path) is None:
        splits = read_hub(source)
    else:
        raise InputError(f"{source}: no such file or folder; data.source takes a path that exists or a hub id")
    if not any(len(split) for split in splits.values()):
        raise InputError(f"{source}: the data set is empty; a row needs a prompt and two answers")
    return splits


def builder(path: Path) -> tuple[str, dict[str, object]] | None:
    """The builder for a file, by its suffix; None for an unknown one."""
    return BUILDERS.get(Path(path.name.removesuffix(".gz")).suffix)


def read_file(path: Path) -> dict[str, Dataset]:
    found = builder(path)
    if found is None:
        raise InputError(f"{path}: unknown kind of file; expected {', '.join(BUILDERS)}, gzipped or not")
    name, options = found
    try:
        return {"train": datasets.load_dataset(name, data_files=str(path), split="train", **options)}
    except StopIteration:
        return {"train": Dataset.from_dict({})}  # what the JSON builder makes of a file of 0 bytes
    except (DatasetGenerationError, ValueError, OSError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{path}: cannot be read as {name}: {cause}; rows count from 0; mend or remove it") from error


def read_folder(path: Path) -> dict[str, Dataset]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = datasets.load_from_disk(str(path))
        return {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    try:
        return dict(datasets.load_dataset(str(path)))
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
