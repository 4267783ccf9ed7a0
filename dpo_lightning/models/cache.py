"""The reference's log-probabilities on disk: computed once for a model, a set of pairs and a precision.

A table is a folder whose name is a hash of its content's origin: the reference's weights, the token ids and the
precision. It has `header.json`, which says the same in words, and `logps.npy`, a log-probability for every answer
token, memory-mapped: pair by pair in the order of the split, the chosen answer before the rejected one. No layout,
no batch and no row number enters, so that any run on the same pairs finds it, whatever its loss, batches and ranks.

Legend: P pairs  N answer tokens of all pairs
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from xxhash import xxh3_128

from dpo_lightning.errors import InputError
from dpo_lightning.models.policy import Policy

#: Raise it when the same model and tokens give log-probabilities that differ by more than rounding, or a table has
#: another form.
VERSION = 1

HEADER, VALUES = "header.json", "logps.npy"

#: Bytes that a file's header takes at most, and that are left to others.
SPARE = 2**20

#: What a config says that has no part in a forward.
ASIDE = ("_name_or_path", "transformers_version", "architectures", "use_cache", "dtype")


@dataclass(frozen=True)
class Key:
    """What a table is of.

    Args:
        model: hash of the reference's weights and configuration.
        tokens: hash of all pairs' token ids, in their order.
        precision: Lightning's name for it, and the type of the weights.
        pairs: P.
        values: N.
        version: of the way it is computed.
    """

    model: str
    tokens: str
    precision: str
    pairs: int
    values: int
    version: int = VERSION

    @property
    def name(self) -> str:
        """The folder's name."""
        return xxh3_128(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def digest_of(config: PreTrainedConfig, tensors: Mapping[str, Tensor], adapter: Mapping[str, Any] | None = None) -> str:
    """A hash of a model: its configuration and its weights, bit by bit, with their names and types.

    Args:
        config: of the model.
        tensors: its weights.
        adapter: configuration of the adapter that is part of it.
    """
    said = {name: value for name, value in config.to_dict().items() if name not in ASIDE}
    if adapter is not None:
        said["adapter"] = dict(adapter)
    digest = xxh3_128(json.dumps(said, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def adapter_digest(policy: Policy) -> str:
    """A hash of what a policy's adapter is an adapter of, and of the adapter's own configuration.

    Of the weights it knows the signs, which are the same in every precision.
    """
    signs = {name: tensor.signbit() for name, tensor in policy.starting_tensors().items()}
    return digest_of(policy.model.config, signs, policy.adapter.config)


class LogpTable:
    """A table that is whole, and is what it says.

    Attributes:
        values: `[N]` memory-mapped.
    """

    def __init__(self, folder: Path, values: np.ndarray) -> None:
        self.folder = folder
        self.values = values

    @classmethod
    def open(cls, folder: Path, key: Key) -> Self:
        """Map a table that is there.

        Raises:
            InputError: if it is not what `key` says, or not as it was written; the difference is named.
        """
        cure = "delete this folder, so that it is computed again"
        try:
            header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
            found, wanted = header["key"], asdict(key)
            differing = [name for name in wanted if found.get(name) != wanted[name]]
            values = np.load(folder / VALUES, mmap_mode="r")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{folder}: no table of log-probabilities can be read here ({error}); {cure}") from error
        if differing:
            said = "; ".join(f"{name} {found.get(name)!r}, this run needs {wanted[name]!r}" for name in differing)
            raise InputError(f"{folder}: the table is of another reference, data or precision: {said}; {cure}")
        if values.shape != (key.values,):
            raise InputError(f"{folder}: {VALUES} holds {values.shape} values, expected ({key.values},); {cure}")
        if xxh3_128(values.data).hexdigest() != header.get("checksum"):
            raise InputError(f"{folder}: {VALUES} is not as it was written: its checksum differs; {cure}")
        return cls(folder, values)


class TableWriter:
    """Fills a table beside its place, and puts it there when it is whole.

    Args:
        folder: its place.
        key: what it is of.
        dtype: of the values.

    Raises:
        InputError: if there is no room, or nothing may be written there.
    """

    def __init__(self, folder: Path, key: Key, dtype: np.dtype) -> None:
        self.folder, self.key = folder, key
        needed = key.values * dtype.itemsize
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(folder.parent).free) < needed + SPARE:
                raise InputError(
                    f"{folder.parent}: {needed / 2**20:,.1f} MB are needed for the reference's log-probabilities, and "
                    f"{free / 2**20:,.1f} MB are free; make room, or set model.reference.directory"
                )
            self.place = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            self.values = np.lib.format.open_memmap(self.place / VALUES, "w+", dtype, (key.values,))
        except OSError as error:
            raise unwritable(folder.parent, error) from error
        self.values[:] = np.nan  # what is never written shows

    def write(self, start: int, values: np.ndarray) -> None:
        """Put some pairs' values at their place."""
        self.values[start : start + len(values)] = values

    def finish(self, about: Mapping[str, Any]) -> None:
        """Make the table appear, whole; where another run was quicker, its table stays.

        Args:
            about: what a reader of the header may want to know beside the key.

        Raises:
            InputError: if it cannot be written.
        """
        try:
            self.values.flush()
            header = {"key": asdict(self.key), "checksum": xxh3_128(self.values.data).hexdigest(), **about}
            (self.place / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
            self.place.chmod(0o755)  # a temporary directory can be read by its owner only
            with suppress(FileExistsError, NotADirectoryError):
                os.rename(self.place, self.folder)
        except OSError as error:
            if not (self.folder / HEADER).exists():
                raise unwritable(self.folder.parent, error) from error
        finally:
            self.give_up()

    def give_up(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.place, ignore_errors=True)


def sweep_up(folder: Path) -> None:
    """Remove what killed runs have left of a table; under its lock, so that nobody is at work on it."""
    for part in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(part, ignore_errors=True)


def unwritable(place: Path, error: OSError) -> InputError:
    """The error for a directory that takes no table."""
    return InputError(
        f"{place}: the reference's log-probabilities cannot be written there ({error.strerror}); set "
        "model.reference.directory to a place with room and permission"
    )
