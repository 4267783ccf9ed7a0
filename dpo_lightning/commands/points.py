"""A point of a sweep: the options that it sets, its config, and its folder's name."""

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_lightning.training.cli import CLASS_OPTIONS

#: Dotted option of `fit` -> its value.
Point = dict[str, Any]


def merged(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Configs as one, later ones winning key by key."""
    result: dict[str, Any] = {}
    for config in configs:
        for key, value in config.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged([result[key], value]) if both else copy.deepcopy(value)
    return result


def configured(config: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """A config with a point's options in it. A class that a point names replaces the config's, with all its fields.

    >>> configured({"model": {"loss": {"class_path": "Sigmoid", "init_args": {"beta": 0.1}}}}, {"model.loss": "SFT"})
    {'model': {'loss': {'class_path': 'SFT'}}}
    """
    result = merged([config])
    for key, value in sorted(point.items(), key=lambda item: item[0].count(".")):  # a class before its fields
        value = copy.deepcopy(value)
        owner = next((name for name in CLASS_OPTIONS if key == name or key.startswith(f"{name}.")), None)
        if owner is None:
            result = merged([result, nested(key, value)])
        elif key in (owner, f"{owner}.class_path"):
            put(result, owner.split("."), {"class_path": value} if isinstance(value, str) else value)
        else:
            field = key.removeprefix(f"{owner}.").removeprefix("init_args.")
            put(result, [*owner.split("."), "init_args", *field.split(".")], value)
            default = CLASS_OPTIONS[owner][1]
            at(result, owner.split(".")).setdefault("class_path", default.__name__ if default else None)
    return result


def nested(key: str, value: Any) -> dict[str, Any]:
    """A dotted key as mappings.

    >>> nested("trainer.max_steps", 5)
    {'trainer': {'max_steps': 5}}
    """
    for word in reversed(key.split(".")):
        value = {word: value}
    return value


def at(config: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The mapping at a nested key, made where there is none; a class's bare name becomes its `class_path`."""
    for word in words:
        inner = config.get(word)
        if not isinstance(inner, dict):
            inner = config[word] = {"class_path": inner} if isinstance(inner, str) else {}
        config = inner
    return config


def put(config: dict[str, Any], words: Sequence[str], value: Any) -> None:
    """Set a nested key."""
    at(config, words[:-1])[words[-1]] = value


def label_of(point: Point) -> str:
    """What a point sets, shortly: the last words of its options.

    >>> label_of({"model.loss": "Sigmoid", "model.loss.beta": 0.1})
    'loss=Sigmoid,beta=0.1'
    """
    return ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items())


def name_of(point: Point) -> str:
    """A folder's name for a point: its label, and a hash of all of it, since labels may coincide.

    >>> name_of({"model.loss": "Sigmoid", "model.loss.beta": 0.1})
    'loss=Sigmoid,beta=0.1-2ca0c8fc'
    """
    return f"{re.sub(r'[^a-zA-Z0-9=,._+-]', '_', label_of(point))[:80]}-{digest_of(point)}"


def digest_of(value: Any) -> str:
    """A short hash of anything that YAML can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
