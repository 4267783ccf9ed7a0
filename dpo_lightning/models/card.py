"""The model card of an export: where the model comes from, how it was trained, how good it is, and how to use it."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, HTTPError

from dpo_lightning.data import world

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
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{ place }}")
tokenizer = AutoTokenizer.from_pretrained("{{ place }}")
{{ prompt }}
answer = model.generate(**prompt, max_new_tokens={{ longest }}, do_sample=True)[0, prompt["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
```
{{ adapter }}
## Recipe

| what | |
|---|---|
{{ recipe }}

{{ command }}## Validation

| figure | value |
|---|---|
{{ rows }}
{{ curves }}
## Licence

{{ license }}
"""

ADAPTER = "\nThis is an adapter: it needs `peft`, and transformers loads its base model too.\n"

PLAIN = """prompt = tokenizer("What does an electrician do?", return_tensors="pt")"""

TEMPLATED = """messages = [{"role": "user", "content": "What does an electrician do?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""


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
        command: the words that began the run; None where nobody knows any more.
        license: as the hub writes it. Default: the base model's, where its card says.
        repository: where on the hub it will be; None where it stays a folder.
    """

    title: str
    config: Mapping[str, Any]
    objective: str
    pairwise: bool
    figures: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    ranks: int | None = None
    command: str | None = None
    license: str | None = None
    repository: str | None = None

    @property
    def base_model(self) -> str:
        """What training started from."""
        return str(self.config["model"]["checkpoint"])

    @property
    def datasets(self) -> list[str]:
        """What it was trained on."""
        source = self.config["data"]["source"]
        return [source] if isinstance(source, str) else list(source)


def is_on_hub(name: str) -> bool:
    """Whether a model or data set that was used is one of the hub's, so that a card may link to it."""
    return not Path(name).expanduser().exists() and not name.startswith(world.SCHEME) and name.count("/") <= 1


def license_of(base_model: str) -> str | None:
    """The licence that a base model's own card names, as the hub writes it; None where it says nothing."""
    if base_model.startswith(world.SCHEME):
        return OWN_LICENSE
    folder = Path(base_model).expanduser()
    try:
        if folder.is_dir():
            return ModelCard.load(folder / "README.md").data.license
        return ModelCard.load(base_model).data.license
    except (OSError, ValueError, HTTPError, HFValidationError):
        return None


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


def card(provenance: Provenance, *, longest: int, templated: bool, curves: bool, adapter: bool) -> ModelCard:
    """The card, with the figures as the hub's `model-index`.

    Args:
        provenance: what it tells of.
        longest: tokens of an answer, in the example.
        templated: whether the tokenizer has a chat template.
        curves: whether the picture of the curves is beside it.
        adapter: whether an adapter alone was written.
    """
    base, sources, figures = provenance.base_model, provenance.datasets, sorted(provenance.figures.items())
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="preferences",
            dataset_name=", ".join(Path(source).name for source in sources),
            metric_type=name,
            metric_value=round(value, 6),
        )
        for name, value in figures
    ]
    license_name = provenance.license or license_of(base)
    data = ModelCardData(
        base_model=base if is_on_hub(base) else None,
        datasets=[source for source in sources if is_on_hub(source)] or None,
        library_name="peft" if adapter else "transformers",
        license=license_name,
        pipeline_tag="text-generation",
        tags=["dpo_lightning", "dpo" if provenance.pairwise else "sft"],
        model_name=provenance.title,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_str=CARD,
        title=provenance.title,
        base_model=link(base),
        method=PREFERENCES if provenance.pairwise else "supervised fine-tuning",
        objective=f"`{provenance.objective}`",
        data=f" on {', '.join(link(source, 'datasets/') for source in sources)}",
        place=provenance.repository or "path/to/this/folder",
        longest=longest,
        prompt=TEMPLATED if templated else PLAIN,
        adapter="\nThis is an adapter: it needs `peft`, and transformers loads its base model too.\n"
        if adapter
        else "",
        recipe="\n".join(f"| {name} | {value} |" for name, value in recipe(provenance)),
        command=command(provenance.command),
        rows="\n".join(f"| `{name}` | {value:.4f} |" for name, value in figures) or "| none | |",
        curves=f"\n![Curves of the run]({CURVES})\n" if curves else "",
        license=license_name or f"That of the base model, {link(base)}, holds for what is made of it too.",
    )


def command(words: str | None) -> str:
    """How to make the model again; of paths of one machine the last part."""
    again = "every option is in `config.yaml`: `python -m dpo_lightning fit --config config.yaml` makes it again.\n\n"
    if words is None:
        return again[0].upper() + again[1:]
    shown = shlex.join(without_folders(word) for word in shlex.split(words))
    return f"It was made by\n\n```bash\n{shown}\n```\n\nand {again}"


def without_folders(word: str) -> str:
    """A word of a command line, an absolute path in it by its last part alone.

    >>> without_folders("/home/me/pairs.jsonl"), without_folders("--data.source=~/pairs.jsonl"), without_folders("a/b")
    ('pairs.jsonl', '--data.source=pairs.jsonl', 'a/b')
    """
    key, equals, value = word.rpartition("=")
    return f"{key}{equals}{Path(value).name}" if value.startswith(("/", "~")) else word
