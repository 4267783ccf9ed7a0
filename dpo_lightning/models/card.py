"""The model card of an export: where the model comes from, how it was trained, how good it is, and how to use it."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from dpo_lightning.data import world
from dpo_lightning.models.checkpoint import looks_like_path

PREFERENCES = "preference training ([Rafailov et al. 2023](https://arxiv.org/abs/2305.18290))"

#: The picture that a card shows, beside it.
CURVES = "reward_curves.png"

#: What the package itself has, its built-in model too, is under.
OWN_LICENSE = "mit"

CARD = """---
{{ card_data }}
---

# {{ title }}

{{ base_model }} after {{ method }} with {{ objective }}{{ data }}, trained with dpo_lightning.

## Use

```python
{{ program }}
```

## Recipe

| what | |
|---|---|
{{ recipe }}

{{ command }}## Validation

On {{ validated }}:

| figure | value |
|---|---|
{{ rows }}
{{ curves }}
## Licence

{{ license }}
"""

MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")"""

#: An adapter, whose base model is named.
ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")"""

PLAIN = """prompt = tokenizer("What does an electrician do?", return_tensors="pt")"""

TEMPLATED = """messages = [{"role": "user", "content": "What does an electrician do?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""

ANSWER = """found = model.generate(**prompt, max_new_tokens={longest}, do_sample=True)
print(tokenizer.decode(found[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))"""

#: Last parts of the names of data files, which no data set of the hub has.
DATA_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".arrow", ".txt")

#: Options of a run that are of use to nobody else.
NOT_FOR_OTHERS = {"push_to_hub", "private", "push_logs", "ckpt_path"}

#: What a license of the hub is told by.
LICENSE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Provenance:
    """Where an exported model comes from, for its card.

    Attributes:
        title: of the card.
        config: the run's options, nested, as in its config.yaml.
        objective: the loss, in words.
        pairwise: whether the loss compares two answers.
        figures: last validation figures.
        steps: optimizer steps that it was trained for.
        ranks: devices that trained it at once, on all nodes; None where nobody knows any more.
        commands: those that made it, the first run's first; empty where nobody knows any more.
        license: what the hub tells a licence by, `license` and perhaps `license_name` and `license_link`.
        repository: where on the hub it will be; None where it stays a folder.
    """

    title: str
    config: Mapping[str, Any]
    objective: str
    pairwise: bool
    figures: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    ranks: int | None = None
    commands: Sequence[str] = ()
    license: Mapping[str, str] = field(default_factory=dict)
    repository: str | None = None

    @property
    def base_model(self) -> str:
        """What training started from."""
        return str(self.config["model"]["checkpoint"])

    @property
    def datasets(self) -> list[str]:
        """What it was trained on."""
        return listed(self.config["data"]["source"])

    @property
    def validated_on(self) -> list[str]:
        """What its figures are of."""
        return listed(self.config["data"].get("val_source") or self.config["data"]["source"])


def listed(source: str | Sequence[str]) -> list[str]:
    """One source or several, as a list."""
    return [source] if isinstance(source, str) else list(source)


def is_on_hub(name: str) -> bool:
    """Whether a model or data set that was used can be one of the hub's, so that a card may link to it.

    >>> is_on_hub("gpt2"), is_on_hub("data/train.jsonl"), is_on_hub("./model"), is_on_hub("my model")
    (True, False, False, False)
    """
    if Path(name).expanduser().exists() or looks_like_path(name) or name.endswith(DATA_FILES):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith(world.SCHEME)


def license_of(base_model: str, ask: bool) -> dict[str, str]:
    """The licence that a base model's own card names, as the hub writes it; empty where it says nothing.

    Args:
        base_model: folder, hub id or the built-in one.
        ask: whether the hub may be asked; else it counts what is in the cache.
    """
    if base_model.startswith(world.SCHEME):
        return {"license": OWN_LICENSE}
    folder = Path(base_model).expanduser()
    try:
        if folder.is_dir():
            found: Any = folder / "README.md"
        elif ask:
            found = base_model
        else:
            found = try_to_load_from_cache(base_model, "README.md")
        told = ModelCard.load(found).data.to_dict() if isinstance(found, str | Path) else {}
    # A base model's card is somebody else's: whatever is wrong with it, a trained policy is written all the same.
    except (OSError, ValueError, TypeError, yaml.YAMLError, HTTPError):
        return {}
    return {name: str(told[name]) for name in LICENSE if told.get(name)}


def recipe(provenance: Provenance) -> Iterator[tuple[str, str]]:
    """What the run was made of, by name and value, as far as it is known."""
    model, data, trainer = (provenance.config.get(group) or {} for group in ("model", "data", "trainer"))
    optimizer = model.get("optimizer") or {}
    options = optimizer.get("init_args") or {}
    yield "loss", f"`{provenance.objective}`"
    if provenance.pairwise and (reference := model.get("reference")):
        yield "reference", f"`{class_name(reference)}`"
    if (lora := model.get("lora")) is not None:
        yield "LoRA", ", ".join(f"{name} {value}" for name, value in lora.items() if value is not None)
    rate = f", learning rate {options['lr']:g}" if isinstance(options.get("lr"), int | float) else ""
    if optimizer:
        yield "optimizer", f"{class_name(optimizer)}{rate}"
    if (schedule := model.get("lr_scheduler")) is not None:
        yield "schedule", f"{schedule}, warm-up {model.get('warmup_steps', 0):g}"
    if (batch := data.get("batch_size")) is not None:
        parts = (batch, trainer.get("accumulate_grad_batches") or 1, provenance.ranks or 1)
        pairs = parts[0] * parts[1] * parts[2]
        known = "" if provenance.ranks else " a device"
        yield "batch", f"{pairs} pairs{known} ({parts[0]} x {parts[1]} accumulated{ranks_of(provenance)})"
    if provenance.steps is not None:
        yield "optimizer steps", f"{provenance.steps:,}"
    if trainer.get("precision") is not None:
        yield "precision", str(trainer["precision"])
    if trainer.get("gradient_clip_val") is not None:
        yield "gradient clipping", f"{trainer['gradient_clip_val']:g}"
    if data.get("max_length") is not None:
        yield "max_length", f"{data['max_length']:,} tokens"
    if (seed := provenance.config.get("seed_everything")) is not None:
        yield "seed", str(seed)


def ranks_of(provenance: Provenance) -> str:
    return f" x {provenance.ranks} devices" if provenance.ranks else ""


def class_name(chosen: Any) -> str:
    """The bare name of a class in a config."""
    path = chosen.get("class_path", "") if isinstance(chosen, Mapping) else str(chosen)
    return path.rpartition(".")[2]


def link(name: str, kind: str = "") -> str:
    """A name as it stands in a card: linked where the hub has it, and of a local path its last part alone."""
    if name.startswith(world.SCHEME):
        return f"dpo_lightning's built-in `{name}`"
    return f"[{name}](https://huggingface.co/{kind}{name})" if is_on_hub(name) else f"`{Path(name).name}`"


def metadata(provenance: Provenance, adapter: bool) -> ModelCardData:
    """What the hub reads of a card, figures as its `model-index`."""
    base, validated = provenance.base_model, provenance.validated_on
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=validated[0] if is_on_hub(validated[0]) else "preferences",
            dataset_name=", ".join(source if is_on_hub(source) else Path(source).name for source in validated),
            dataset_split=provenance.config["data"].get("val_split"),
            metric_type=name,
            metric_value=round(value, 6),
        )
        for name, value in sorted(provenance.figures.items())
    ]
    return ModelCardData(
        base_model=base if is_on_hub(base) else None,
        datasets=[source for source in provenance.datasets if is_on_hub(source)] or None,
        library_name="peft" if adapter else "transformers",
        **provenance.license,
        pipeline_tag="text-generation",
        tags=["dpo_lightning", "dpo" if provenance.pairwise else "sft"],
        model_name=provenance.title,
        eval_results=results or None,
    )


def card(provenance: Provenance, *, longest: int, templated: bool, curves: bool, adapter: bool) -> ModelCard:
    """The card of an export.

    Args:
        provenance: what it tells of.
        longest: tokens of an answer, in the example.
        templated: whether the tokenizer has a chat template.
        curves: whether the picture of the curves is beside it.
        adapter: whether an adapter alone was written.
    """
    base, figures = provenance.base_model, sorted(provenance.figures.items())
    place = provenance.repository or "path/to/this/folder"
    load = (ADAPTER if adapter else MODEL).format(
        place=place, base=base if is_on_hub(base) else "path/to/the/base/model"
    )
    split = provenance.config["data"].get("val_split")
    return ModelCard.from_template(
        metadata(provenance, adapter),
        template_str=CARD,
        title=provenance.title,
        base_model=link(base),
        method=PREFERENCES if provenance.pairwise else "supervised fine-tuning",
        objective=f"`{provenance.objective}`",
        data=f" on {linked(provenance.datasets)}",
        program="\n".join((load, TEMPLATED if templated else PLAIN, ANSWER.format(longest=longest))),
        recipe="\n".join(f"| {name} | {cell(value)} |" for name, value in recipe(provenance)),
        command=commands(provenance.commands),
        validated=linked(provenance.validated_on) + (f", its `{split}`" if split else ""),
        rows="\n".join(f"| `{name}` | {value:.4f} |" for name, value in figures) or "| none | |",
        curves=f"\n![Curves of the run]({CURVES})\n" if curves else "",
        license=licensed(provenance),
    )


def linked(sources: Sequence[str]) -> str:
    """Sources as they stand in a card."""
    return ", ".join(link(source, "datasets/") for source in sources)


def cell(text: str) -> str:
    """Text in a table, in which a bar would begin another cell.

    >>> cell("c_attn|c_fc")
    'c_attn\\\\|c_fc'
    """
    return text.replace("|", "\\|")


def licensed(provenance: Provenance) -> str:
    """What a card says of the licence."""
    known = provenance.license
    if not known:
        return f"That of the base model, {link(provenance.base_model)}, holds for what is made of it too."
    name = known.get("license_name") or known["license"]
    return f"[{name}]({known['license_link']})" if "license_link" in known else name


def commands(words: Sequence[str]) -> str:
    """How to make the model again; of paths of one machine the last part."""
    again = "every option is in `config.yaml`: `python -m dpo_lightning fit --config config.yaml` makes it again.\n\n"
    if not words:
        return again[0].upper() + again[1:]
    shown = "\n".join(shlex.join(without_folders(word) for word in shlex.split(command)) for command in words)
    return f"It was made by\n\n```bash\n{shown}\n```\n\nand {again}"


def without_folders(word: str) -> str:
    """A word of a command line, an absolute path in it by its last part alone.

    >>> without_folders("/home/me/pairs.jsonl"), without_folders("--data.source=~/pairs.jsonl"), without_folders("a/b")
    ('pairs.jsonl', '--data.source=pairs.jsonl', 'a/b')
    """
    key, equals, value = word.rpartition("=")
    return f"{key}{equals}{Path(value).name}" if value.startswith(("/", "~")) else word


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's options as others may run them: from the beginning, into a place of their own, to no hub."""
    found = {name: value for name, value in config.items() if name not in NOT_FOR_OTHERS}
    return {**found, "trainer": {**(config.get("trainer") or {}), "default_root_dir": None}}
