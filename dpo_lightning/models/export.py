"""A policy as a Hugging Face folder: weights, tokenizer, generation config and a model card."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpo_lightning.models.checkpoint import noise_restored
from dpo_lightning.models.policy import Policy

PREFERENCES = "preference training ([Rafailov et al. 2023](https://arxiv.org/abs/2305.18290))"

CARD = """---
{{ card_data }}
---

# {{ title }}

{{ base_model }} after {{ method }} with {{ objective }}, trained with dpo_lightning.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## Validation

| figure | value |
|---|---|
{{ rows }}

The recipe, with every option, is in `config.yaml`.
"""


def export(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    base_model: str,
    datasets: list[str],
    title: str,
    objective: str,
    pairwise: bool,
    figures: Mapping[str, float],
    config: Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
    adapter_only: bool = False,
) -> None:
    """Write the folder whole or not at all; an older one of the same name is replaced.

    A policy with an adapter is written as the model that computes the same, unless only the adapter is asked for.

    Args:
        policy: what is exported, in the precision it was trained in.
        tokenizer: saved with its chat template, if it has one.
        directory: the folder.
        base_model: what training started from, for the card.
        datasets: what it was trained on, for the card.
        title: of the card.
        objective: the loss, for the card.
        pairwise: whether the loss compares two answers, for the card.
        figures: last validation figures, for the card.
        config: the run's config.yaml, copied beside.
        adapter_only: write the policy's adapter alone, in peft's format.
        weights: state of the policy's model, where it has only a part of them itself.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as name:
        # A directory of its own below, since a temporary one can be read by its owner only.
        folder = Path(name) / directory.name
        if policy.adapter is not None and adapter_only:
            policy.adapter.save(folder, weights)
        else:
            with noise_restored(policy):
                merged = weights if policy.adapter is None else policy.adapter.merged(weights)
                policy.model.save_pretrained(folder, state_dict=merged)
        tokenizer.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):  # written for their owner alone
            shutil.copymode(next(folder.glob("*.json")), file)
        card(title, base_model, datasets, objective, pairwise, figures).save(folder / "README.md")
        if config is not None and config.exists():
            shutil.copy(config, folder / "config.yaml")
        if directory.exists():
            directory.rename(Path(name) / "previous")
        folder.rename(directory)


def card(
    title: str, base_model: str, datasets: list[str], objective: str, pairwise: bool, figures: Mapping[str, float]
) -> ModelCard:
    """The model card, with the figures as the hub's model-index."""
    local = Path(base_model).exists()
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="preferences",
            dataset_name=", ".join(Path(source).name for source in datasets),
            metric_type=name,
            metric_value=round(value, 6),
        )
        for name, value in sorted(figures.items())
    ]
    data = ModelCardData(
        base_model=None if local else base_model,
        datasets=[source for source in datasets if not Path(source).exists()] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dpo_lightning", "dpo" if pairwise else "sft"],
        model_name=title,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_str=CARD,
        title=title,
        base_model=Path(base_model).name if local else f"[{base_model}](https://huggingface.co/{base_model})",
        objective=objective,
        method=PREFERENCES if pairwise else "supervised fine-tuning",
        rows="\n".join(f"| `{name}` | {value:.4f} |" for name, value in sorted(figures.items())) or "| none | |",
    )
