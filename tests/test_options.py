"""Keys and classes are checked with the name of the file that gave them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpo_lightning.errors import InputError
from dpo_lightning.training.options import Given, check_classes, check_keys, given_options


class Base(ABC):
    @abstractmethod
    def run(self) -> None: ...


@dataclass(frozen=True)
class Narrow(Base):
    beta: float = 0.1

    def run(self) -> None: ...


@dataclass(frozen=True)
class Wide(Base):
    beta: float = 0.1
    extra: float = 0.0

    def run(self) -> None: ...


OWNERS: dict[str, tuple[type, type | None]] = {"model.loss": (Base, Wide)}


def test_config_files_and_words_become_dotted_keys_in_order(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("model: {loss: {class_path: Wide, init_args: {beta: 0.5}}}\n")
    words = ["--config", str(config), "--model.loss.beta=0.3", "--data.source", "[a, b]"]
    assert given_options(words) == [
        Given(str(config), "model.loss.class_path", "Wide"),
        Given(str(config), "model.loss.init_args.beta", 0.5),
        Given("the command line", "model.loss.beta", 0.3),
        Given("the command line", "data.source", ["a", "b"]),
    ]


@pytest.mark.parametrize("text", ["- a\n- b\n", "model: {checkpoint: a", "just words"])
def test_a_config_that_is_no_mapping_is_an_error_with_its_name(tmp_path: Path, text: str) -> None:
    config = tmp_path / "broken.yaml"
    config.write_text(text)
    with pytest.raises(InputError, match=r"broken\.yaml"):
        given_options(["--config", str(config)])


def test_an_unknown_key_is_an_error_with_its_file_and_the_nearest_key() -> None:
    known = {"model", "model.loss", "model.loss.help", "data", "data.batch_size"}
    check_keys([Given("x.yaml", "model.loss.init_args.beta", 1), Given("x.yaml", "data.batch_size", 1)], known)
    with pytest.raises(InputError, match=r"x\.yaml: unknown key data\.batchsize; did you mean data\.batch_size"):
        check_keys([Given("x.yaml", "data.batchsize", 1)], known)
    with pytest.raises(InputError, match="unknown key model"):
        check_keys([Given("x.yaml", "model", 1)], known)


@pytest.mark.parametrize("key", ["model.loss", "model.loss.class_path"])
def test_a_field_that_the_later_class_does_not_have_is_an_error(key: str) -> None:
    given = [Given("x.yaml", "model.loss.init_args.extra", 0.2), Given("the command line", key, "Narrow")]
    with pytest.raises(InputError, match=r"x\.yaml: model\.loss\.extra is given, but model\.loss is Narrow"):
        check_classes(given, OWNERS)
    check_classes([Given("x.yaml", "model.loss.init_args.beta", 0.2), *given[1:]], OWNERS)


def test_classes_are_found_by_bare_name_and_by_import_path_and_else_listed() -> None:
    check_classes([Given("w", "model.loss", f"{__name__}.Narrow"), Given("w", "model.loss.beta", 1)], OWNERS)
    with pytest.raises(InputError, match="neither one of Narrow, Wide nor the import path"):
        check_classes([Given("w", "model.loss", "Nope")], OWNERS)
    with pytest.raises(InputError, match="nor the import path"):
        check_classes([Given("w", "model.loss", "no.such.module.Loss")], OWNERS)


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    config = tmp_path / "twice.yaml"
    config.write_text("data:\n  batch_size: 8\n  batch_size: 4\n")
    with pytest.raises(InputError, match=r"twice\.yaml.*batch_size stands twice"):
        given_options(["--config", str(config)])
