"""`export`: the policy of a training checkpoint as a Hugging Face folder, also of a run that was killed."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser

from dpo_lightning.data.chat import use_template
from dpo_lightning.errors import InputError
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.models.cache import adapter_digest
from dpo_lightning.models.card import CURVES
from dpo_lightning.models.checkpoint import load_policy, load_tokenizer
from dpo_lightning.models.export import export
from dpo_lightning.training.callbacks import run_of
from dpo_lightning.training.curves import draw_curves, read_metrics
from dpo_lightning.training.publication import NAMES, Publication, loss_of, provenance_of


def export_checkpoint(
    ckpt_path: Path, output_dir: Path, adapter_only: bool = False, publication: Publication = Publication()
) -> None:
    """Export the policy of a training checkpoint as a Hugging Face folder, and push it to the hub if asked to.

    Args:
        ckpt_path: checkpoints/last.ckpt in a run's directory.
        output_dir: the folder to write; an older one of the same name is replaced.
        adapter_only: write the adapter alone, in peft's format, where one was trained.
        publication: where else the export goes.
    """
    run = run_of(ckpt_path.resolve())
    config = read_run(run, ckpt_path)
    model = config["model"]
    checkpoint = torch.load(ckpt_path, weights_only=True, map_location="cpu", mmap=True)
    state = checkpoint["state_dict"]
    weights = {name.removeprefix("policy."): value for name, value in state.items() if name.startswith("policy.")}
    lora = None if model.get("lora") is None else LoRA(**model["lora"])
    policy = load_policy(model["checkpoint"], layout="padded", lora=lora)
    if adapter_only and policy.adapter is None:
        raise InputError(f"{ckpt_path}: no adapter was trained; leave out --adapter_only")
    publication = publication.check(config, adapter_only or (lora is not None and not lora.merge))
    policy.to(next(iter(weights.values())).dtype)
    if policy.adapter is not None and adapter_digest(policy) != checkpoint.get("adapter_of"):
        raise InputError(
            f"{ckpt_path}: its adapter is of another model than {model['checkpoint']} is now; put back what it was"
        )
    policy.load_state_dict(weights, strict=policy.adapter is None)
    tokenizer = load_tokenizer(model.get("tokenizer") or model["checkpoint"])
    if (template := config["data"].get("chat_template")) is not None:
        use_template(tokenizer, template)
    loss, metrics = loss_of(config), run / "metrics.csv"
    with tempfile.TemporaryDirectory() as place:
        picture = Path(place) / CURVES
        if metrics.exists():
            draw_curves(metrics, picture, f"{run.parent.name}, {run.name}: {loss}")
        export(
            policy,
            tokenizer,
            output_dir,
            provenance_of(
                run, config, loss, last_validation(metrics), publication, steps=checkpoint.get("global_step")
            ),
            curves=picture,
            adapter_only=adapter_only or (lora is not None and not lora.merge),
        )
    print(f"Written to {output_dir}")
    if publication.push_to_hub is not None:
        print(f"On the hub: {publication.push(output_dir, run)}")


def read_run(run: Path, ckpt_path: Path) -> dict[str, Any]:
    """The resolved options of the run that a checkpoint is of."""
    if not ckpt_path.is_file():
        raise InputError(f"{ckpt_path}: no such checkpoint; ckpt_path takes the last.ckpt of a run")
    config = run / "config.yaml"
    if not config.exists():
        raise InputError(f"{config}: is missing; a checkpoint is exported from its place in the run's directory")
    return yaml.safe_load(config.read_text(encoding="utf-8"))


def last_validation(metrics: Path) -> dict[str, float]:
    """The last value of each validation figure, as `val/...`."""
    series = read_metrics(metrics) if metrics.exists() else {}
    return {tag: values[-1] for tag, (_, values) in series.items() if tag.startswith("val/")}


def main() -> None:
    """Run the verb of the command line."""
    parser = ArgumentParser(prog="python -m dpo_lightning export")
    parser.add_function_arguments(export_checkpoint, skip={"publication"})
    parser.add_class_arguments(Publication)
    given = vars(parser.parse_args(sys.argv[2:]))
    publication = Publication(**{name: given.pop(name) for name in NAMES})
    if publication.push_to_hub is None and (publication.private is not None or publication.push_logs):
        raise InputError("private or push_logs is given, but nothing is pushed; set push_to_hub, or remove it")
    export_checkpoint(**given, publication=publication)
