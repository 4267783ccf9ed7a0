"""What config files and the command line say, looked at before jsonargparse merges them.

Merging is silent about two things that a person must hear of: an unknown key is reported without its file, and a field
of a class that another class replaces later (`--model.loss SFT` over a config's `beta`) is dropped.
"""

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from dpo_lightning.errors import InputError

#: Where an option is from that is in no file.
COMMAND_LINE = "the command line"


@dataclass(frozen=True)
class Given:
    """One option as somebody wrote it: `where` is a file, or the command line."""

    where: str
    key: str
    value: Any


def given_options(args: Sequence[str]) -> list[Given]:
    """Every option of a command line and its config files, in the order in which later ones win.

    Raises:
        InputError: if a config file does not exist or is no mapping in YAML.
    """
    found: list[Given] = []
    for name, value in pairs(args):
        if name in ("-c", "--config"):
            found += flatten(read_config(Path(value)), value)
        elif name.startswith("--"):
            found += flatten({name[2:].removesuffix("+"): parse_value(value)}, COMMAND_LINE)
    return found


def pairs(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`(--key, value)` of a command line, written `--key value` or `--key=value`."""
    words = iter(args)
    for word in words:
        if word.startswith("-"):
            name, equals, value = word.partition("=")
            yield name, value if equals else next(words, "")


def parse_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


class NoDuplicates(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the first would be dropped without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such config file; --config takes a YAML file")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), NoDuplicates)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not YAML: {' '.join(str(error).split())}; mend it") from error
    if not isinstance(config, Mapping):
        raise InputError(f"{path}: is not a mapping of keys in YAML; expected model:, data:, trainer: ...")
    return config


def flatten(config: Mapping[str, Any], where: str, prefix: str = "") -> list[Given]:
    """Nested mappings as dotted keys."""
    found = []
    for name, value in config.items():
        key = f"{prefix}{name}"
        found += flatten(value, where, f"{key}.") if isinstance(value, Mapping) else [Given(where, key, value)]
    return found


def check_keys(given: Iterable[Given], known: set[str]) -> None:
    """Raises InputError, with its file and the nearest key, for a key neither known nor a field of one that is."""
    groups = {key.rpartition(".")[0] for key in known if not key.endswith(".help")}
    keys = {key for key in known if not key.endswith(".help")} - groups
    for option in given:
        if option.key in groups and (option.value is None or isinstance(option.value, str)):
            continue  # `data:` with nothing below, or `--data FILE`, which jsonargparse reads
        words = option.key.split(".")
        if not keys & {".".join(words[:end]) for end in range(1, len(words) + 1)}:
            close = difflib.get_close_matches(option.key, keys, 1)
            cure = f"did you mean {close[0]}?" if close else "--help lists all keys"
            raise InputError(f"{option.where}: unknown key {option.key}; {cure}")


def check_classes(given: Sequence[Given], owners: Mapping[str, tuple[type, type | None]]) -> None:
    """Checks the options whose value is a class with fields of its own, such as `model.loss`.

    Args:
        given: all options, later ones winning.
        owners: option -> its base class, and the class it has where none is named.

    Raises:
        InputError: for a class that does not exist, or a field that the class chosen in the end does not have.
    """
    given = [replace(option, key=option.key.replace(".init_args", "")) for option in given]
    for owner, (base, default) in owners.items():
        chosen = default
        for option in given:
            if option.key in (owner, f"{owner}.class_path"):
                chosen = None if option.value is None else find_class(option, base)
        name = chosen.__name__ if chosen else "null"
        names = set(inspect.signature(chosen).parameters) - {"params"} if chosen else set()
        for option in given:
            field = option.key.removeprefix(f"{owner}.").partition(".")[0]
            if option.key.startswith(f"{owner}.") and field not in names | {"class_path", "help"}:
                raise InputError(
                    f"{option.where}: {owner}.{field} is given, but {owner} is {name}, "
                    f"whose fields are {', '.join(sorted(names)) or '(none)'}; remove it, or choose another class"
                )


def find_class(option: Given, base: type) -> type:
    """The class that an option names: a subclass of `base` by its bare name, or any by its import path."""
    module, _, name = str(option.value).rpartition(".")
    found = (subclass for subclass in subclasses(base) if not inspect.isabstract(subclass))
    known = {subclass.__name__: subclass for subclass in found if not subclass.__name__.startswith("_")}
    try:
        return getattr(import_module(module), name) if module else known[name]
    except (ImportError, AttributeError, KeyError):
        raise InputError(
            f"{option.where}: {option.key.removesuffix('.class_path')} is {option.value}, which is neither one of "
            f"{', '.join(sorted(known))} nor the import path of a class; choose one of them"
        ) from None


def subclasses(base: type) -> Iterator[type]:
    """All classes below `base` that have been imported."""
    for subclass in base.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


#: What a checkpoint has fixed: a resumed run would ignore a change, or go on with something else.
FIXED = {
    "model": ("checkpoint", "tokenizer", "loss", "reference", "lora", "optimizer", "lr_scheduler", "warmup_steps"),
    "data": (
        *("source", "train_split", "val_split", "val_source", "val_fraction", "format", "max_length", "truncation"),
        *("bad_rows", "max_train_pairs", "weights", "chat_template", "streaming", "shuffle_buffer"),
    ),
}


def check_same_run(config: Path, options: Mapping[str, Any]) -> None:
    """Raises InputError if a resumed run is given another model, objective, optimizer or data than it began with.

    Args:
        config: config.yaml of the run that the checkpoint is of; where it is missing nothing can be compared.
        options: those of the new run.
    """
    if not config.exists():
        return
    before = yaml.safe_load(config.read_text(encoding="utf-8"))
    for group, names in FIXED.items():
        for name in names:
            old, new = before.get(group, {}).get(name), options[group].get(name)
            if old != new:
                raise InputError(
                    f"{config}: the run that is resumed has {group}.{name} {old}, now {new} is given, which a resumed "
                    "run would ignore; leave it as it was, or start a run from the exported model"
                )
