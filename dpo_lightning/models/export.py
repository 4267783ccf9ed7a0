"""A policy as a Hugging Face folder: weights, tokenizer, generation config and a model card."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpo_lightning.models.card import CURVES, Provenance, card, published
from dpo_lightning.models.checkpoint import context_length, noise_restored
from dpo_lightning.models.policy import Policy

#: Larger weights are written as several files.
SHARD = "5GB"

#: Tokens of an answer in the card's example, where the model's context has room for them.
LONGEST = 128


def export(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    provenance: Provenance,
    *,
    curves: Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
    adapter_only: bool = False,
) -> None:
    """Write the folder whole or not at all; an older one of the same name is replaced.

    A policy with an adapter is written as the model that computes the same, unless only the adapter is asked for.

    Args:
        policy: what is exported, in the precision it was trained in.
        tokenizer: saved with its chat template, if it has one.
        directory: the folder.
        provenance: what its card tells; its options are written beside, as config.yaml.
        curves: the picture of the run's curves, copied beside and shown in the card.
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
                policy.model.save_pretrained(folder, state_dict=merged, max_shard_size=SHARD)
        tokenizer.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):  # written for their owner alone
            shutil.copymode(next(folder.glob("*.json")), file)
        options = yaml.safe_dump(published(provenance.config), sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(options, encoding="utf-8")
        if curves is not None and curves.exists():
            shutil.copy(curves, folder / CURVES)
        about = card(
            provenance,
            longest=min(LONGEST, (context_length(policy.model.config) or 2 * LONGEST) // 2),
            templated=tokenizer.chat_template is not None,
            curves=(folder / CURVES).exists(),
            adapter=policy.adapter is not None and adapter_only,
        )
        about.save(folder / "README.md")
        if directory.exists():
            directory.rename(Path(name) / "previous")
        folder.rename(directory)
