"""What is said of an exported model to others: its card, and its way to the hub."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from dpo_lightning.errors import InputError
from dpo_lightning.models.card import Provenance
from dpo_lightning.models.hub import check_access, push
from dpo_lightning.objective.preference import PreferenceLoss

#: What the first line of a run's config.yaml begins with, before the words that began the run.
COMMAND = "# Made by: "


@dataclass(frozen=True)
class Publication:
    """Where an exported model goes.

    Args:
        push_to_hub: the repository on the Hugging Face Hub that the export goes to, as USER/NAME; it is created if need
            be, and updated if it is there.
        private: whether only its owner may see the repository, if it is created; null is the owner's default.
        push_logs: upload TensorBoard's files too; the hub shows their curves.
        license: of the exported model, as the hub writes it, such as apache-2.0. Default: the base model's.
    """

    push_to_hub: str | None = None
    private: bool | None = None
    push_logs: bool = False
    license: str | None = None

    def check(self) -> "Publication":
        """With the repository's full name, once it is certain that the export may go there.

        Raises:
            InputError: if it may not, or an option is given that is of no use without a repository.
        """
        if self.push_to_hub is None:
            for name, given in (("private", self.private is not None), ("push_logs", self.push_logs)):
                if given:
                    raise InputError(f"{name} is given, but nothing is pushed; set push_to_hub, or remove it")
            return self
        return Publication(check_access(self.push_to_hub, self.private), self.private, self.push_logs, self.license)

    def push(self, export: Path, run: Path) -> str:
        """Upload an export, and returns its address.

        Args:
            export: the folder.
            run: the directory of the run that it is of.
        """
        print(f"Pushing {export} to {self.push_to_hub} ...", flush=True)
        logs = sorted(run.glob("events.out.tfevents*")) if self.push_logs else []
        return push(export, self.push_to_hub, f"{run.parent.name}, {run.name}", logs)


#: The options' names.
NAMES = frozenset(field.name for field in fields(Publication))


def command_line() -> str:
    """The words that began this process, as a shell would take them."""
    return shlex.join(["python", "-m", "dpo_lightning", *sys.argv[1:]])


def command_of(config: Path) -> str | None:
    """The words that began the run of a config.yaml; None where it does not say."""
    with config.open(encoding="utf-8") as lines:
        first = lines.readline().strip()
    return first.removeprefix(COMMAND) if first.startswith(COMMAND) else None


def loss_of(config: Mapping[str, Any]) -> PreferenceLoss:
    """The objective of a resolved config."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=PreferenceLoss)
    return parser.instantiate(parser.parse_object({"loss": config["model"]["loss"]})).loss


def provenance_of(
    run: Path,
    config: Mapping[str, Any],
    loss: PreferenceLoss,
    figures: Mapping[str, float],
    publication: Publication,
    *,
    steps: int | None,
    ranks: int | None = None,
) -> Provenance:
    """What the card of a run's export tells.

    Args:
        run: its directory.
        config: its options, resolved.
        loss: its objective.
        figures: its last validation figures.
        publication: where the export goes.
        steps: optimizer steps that it has done.
        ranks: devices that trained it at once.
    """
    file = run / "config.yaml"
    return Provenance(
        title=(publication.push_to_hub or run.parent.name).rpartition("/")[2],
        config=config,
        objective=str(loss),
        pairwise=loss.pairwise,
        figures=figures,
        steps=steps,
        ranks=ranks,
        command=command_of(file) if file.exists() else None,
        license=publication.license,
        repository=publication.push_to_hub,
    )
