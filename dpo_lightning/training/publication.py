"""What is said of an exported model to others: its card, and its way to the hub."""

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from dpo_lightning.errors import InputError
from dpo_lightning.models.card import Provenance, is_on_hub, license_of, metadata
from dpo_lightning.models.hub import check_access, push
from dpo_lightning.objective.preference import PreferenceLoss
from dpo_lightning.training.callbacks import LAST

#: What the first lines of a run's config.yaml begin with: the words that began it, or one that it goes on from, follow.
COMMAND = "# Made by: "

#: Options whose values nobody else may see.
SECRET = re.compile(r"--\S*(token|key|password|secret)\S*", re.IGNORECASE)


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

    def check(self, config: Mapping[str, Any], adapter: bool) -> "Publication":
        """With the repository's full name, once it is certain that the export may go there.

        Args:
            config: the run's options.
            adapter: whether an adapter alone is exported.

        Raises:
            InputError: if it may not, or would be of no use there.
        """
        if self.push_to_hub is None:
            return self
        base = str(config["model"]["checkpoint"])
        if adapter and not is_on_hub(base):
            raise InputError(
                f"push_to_hub: an adapter alone is of no use without its base model, and {base} is not on the hub; "
                "export the merged model"
            )

        def about() -> str:
            known = Provenance("model", config, "", True, license=self.license_of(base))
            return f"---\n{metadata(known, adapter).to_yaml()}\n---\n"

        return replace(self, push_to_hub=check_access(self.push_to_hub, self.private, about))

    def license_of(self, base: str) -> dict[str, str]:
        """What a card tells of the licence; the hub is only asked for the base model's where it is needed anyway."""
        return {"license": self.license} if self.license else license_of(base, ask=self.push_to_hub is not None)

    def push(self, export: Path, run: Path) -> str:
        """Upload an export, and returns its address.

        Args:
            export: the folder.
            run: the directory of the run that it is of.
        """
        print(f"Pushing {export} to {self.push_to_hub} ...", flush=True)
        name = f"{run.parent.name}-{run.name}"
        logs = {f"{name}/{file.name}": file for file in run.glob("events.out.tfevents*")} if self.push_logs else {}
        if self.push_logs and not logs:
            print("No logs are pushed: the run has none of TensorBoard's files.")
        again = ["hf", "upload", self.push_to_hub, str(export)]
        if (run / LAST).exists():
            again = ["python", "-m", "dpo_lightning", "export", "--ckpt_path", str(run / LAST)]
            again += ["--output_dir", str(export), "--push_to_hub", self.push_to_hub]
        return push(export, self.push_to_hub, f"{run.parent.name}, {run.name}", shlex.join(again), logs)


#: The options' names.
NAMES = frozenset(field.name for field in fields(Publication))

#: Those that count only where something is pushed.
OF_A_PUSH = frozenset({"private", "push_logs"})


def begun_by(before: Path | None) -> str:
    """First lines of a run's config.yaml: the words that began it; values of secret options are left out.

    Args:
        before: config.yaml of the run that it goes on from.
    """
    start = ["python", "-m", "dpo_lightning"]
    if TorchElasticEnvironment.detect():
        nodes, here = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
        start = ["torchrun", "--nnodes", nodes, "--nproc_per_node", here, "-m", "dpo_lightning"]
    earlier = [] if before is None else commands_of(before)
    return "".join(f"{COMMAND}{json.dumps(words)}\n" for words in [*earlier, [*start, *without_secrets(sys.argv[1:])]])


def without_secrets(words: Sequence[str]) -> list[str]:
    """Words of a command line with stars in place of the values of secret options.

    >>> without_secrets(["fit", "--logger.api_key", "abc", "--wandb_token=abc", "--data.source", "x"])
    ['fit', '--logger.api_key', '***', '--wandb_token=***', '--data.source', 'x']
    """
    found: list[str] = []
    for word in words:
        key, equals, _ = word.partition("=")
        if equals and SECRET.fullmatch(key):
            found.append(f"{key}=***")
        else:
            found.append("***" if found and SECRET.fullmatch(found[-1]) and "=" not in found[-1] else word)
    return found


def commands_of(config: Path) -> list[list[str]]:
    """The words that made the run of a config.yaml, the first run's first; empty where it does not say."""
    if not config.exists():
        return []
    found = []
    with config.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith(COMMAND):
                break
            found.append(json.loads(line.removeprefix(COMMAND)))
    return found


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
    return Provenance(
        title=(publication.push_to_hub or run.parent.name).rpartition("/")[2],
        config=config,
        objective=str(loss),
        pairwise=loss.pairwise,
        figures=figures,
        steps=steps,
        ranks=ranks,
        commands=[shlex.join(words) for words in commands_of(run / "config.yaml")],
        license=publication.license_of(str(config["model"]["checkpoint"])),
        repository=publication.push_to_hub,
    )
