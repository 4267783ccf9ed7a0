"""From a hub id or a folder in Hugging Face format to a policy."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    find_adapter_config_file,
)

from dpo_lightning.data import world
from dpo_lightning.data.packing import LayoutChoice
from dpo_lightning.errors import InputError
from dpo_lightning.models.adapters import LoRA, add_adapter, check_peft, load_adapter
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reach import answers, is_cached
from dpo_lightning.paths import path_of

WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def located(name: str) -> str:
    """The folder of the built-in model for `world:base`; any other name as it is.

    Raises:
        InputError: if the name is of the built-in world, but not the model's.
    """
    if not name.startswith(world.SCHEME):
        return name
    if name != world.BASE:
        raise InputError(f"{name}: the built-in world has only the model {world.BASE}")
    return str(world.FOLDER)


def is_hub_id(name: str) -> bool:
    """Whether a model's name can only be one of the hub.

    Raises:
        InputError: if there can be no such name.
    """
    return not path_of(located(name)).exists() and not looks_like_path(name)


def base_of(name: str) -> str | None:
    """The model that a folder or hub id holds an adapter of; None where it holds a model.

    Raises:
        InputError: if there can be no such name, or its adapter's configuration cannot be read.
    """
    if not path_of(name).is_dir() and looks_like_path(name):
        return None
    local = not path_of(name).is_dir() and is_cached(name) and not answers(name)
    try:
        if find_adapter_config_file(name, local_files_only=local) is None:
            return None
    except (OSError, ValueError) as error:  # no name of a repository
        raise InputError(unreachable(name, "model", error)) from error
    check_peft(name)
    from peft import PeftConfig

    try:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{name}: its adapter_config.json cannot be read ({error}); save the adapter again") from error
    if not base:
        raise InputError(
            f"{name}: its adapter_config.json names no base_model_name_or_path; write the model's name in it"
        )
    return base


def load_config(checkpoint: str) -> PreTrainedConfig:
    """The model's configuration, of an adapter that of its base; of a folder, checks that the weights are there too.

    Raises:
        InputError: if there is no such checkpoint, or a folder lacks config or weights.
    """
    checkpoint = located(checkpoint)
    if (base := base_of(checkpoint)) is not None:
        return load_config(base)
    path = path_of(checkpoint)
    if path.is_dir():
        check_folder(path)
    elif path.exists() or looks_like_path(checkpoint):
        raise InputError(f"{checkpoint}: no such folder; a checkpoint is a folder in Hugging Face format or a hub id")
    try:
        return AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise InputError(unreachable(checkpoint, "model", error)) from error


def check_folder(path: Path) -> None:
    """Raises InputError unless a folder has a config and weights whose headers can be read."""
    if not (path / "config.json").exists():
        raise InputError(f"{path}: the folder has no config.json; expected a model in Hugging Face format")
    if not any((path / name).exists() for name in WEIGHT_FILES):
        raise InputError(f"{path}: the folder has no weights; expected {SAFE_WEIGHTS_NAME} beside config.json")
    for file in path.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: the weights cannot be read ({error}); copy or download them again") from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        InputError: if there is none.
    """
    name = located(name)
    path = path_of(name)
    if not path.exists() and looks_like_path(name):
        raise InputError(f"{name}: no such folder; model.tokenizer takes a folder in Hugging Face format or a hub id")
    if path.is_dir() and not any(path.glob("token*")) and not (path / "vocab.json").exists():
        if (base := base_of(name)) is not None:
            return load_tokenizer(base)
        raise InputError(
            f"{name}: the folder has no tokenizer; expected tokenizer.json, or give model.tokenizer another"
        )
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(unreachable(name, "tokenizer", error)) from error


def load_policy(
    checkpoint: str,
    *,
    layout: LayoutChoice = "auto",
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    lora: LoRA | None = None,
) -> Policy:
    """A policy with the checkpoint's weights in torch's default dtype and all dropout at 0.

    Args:
        checkpoint: folder or hub id.
        layout: see `Policy`.
        attn_implementation: of transformers; None takes its default.
        gradient_checkpointing: compute the decoder's activations again in backward, for memory.
        lora: the adapter to train in place of the model; a checkpoint that is an adapter is trained as it is.

    Raises:
        InputError: if the checkpoint cannot be loaded, lacks weights, or cannot run the layout, or two adapters are
            asked for.
    """
    named, checkpoint = checkpoint, located(checkpoint)
    base = base_of(checkpoint)
    if base is not None and lora is not None:
        raise InputError(f"{named} is an adapter, which is trained further; remove model.lora, or give it a model")
    model, rates = load_model(checkpoint if base is None else located(base), attn_implementation)
    adapter = None
    if base is not None:
        adapter = load_adapter(model, base, checkpoint)
        silence_layers(model)
    elif lora is not None:
        adapter = add_adapter(model, named, lora)
    if gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the name that every transformers 5 knows it by
            model.gradient_checkpointing_enable({"use_reentrant": False})
    # Checkpointing works in training mode only, and Lightning leaves a module in the mode that it finds.
    policy = Policy(model.eval(), layout, rates, named, adapter)
    return policy.train()


def load_model(checkpoint: str, attn_implementation: str | None) -> tuple[PreTrainedModel, dict[str, float]]:
    """A causal language model without noise, and the rates of dropout that its config had.

    Raises:
        InputError: if it cannot be loaded, or lacks weights.
    """
    config = load_config(checkpoint)
    rates = silence_noise(config)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            config=config,
            dtype=torch.get_default_dtype(),
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InputError(unreachable(checkpoint, "causal language model", error)) from error
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise InputError(
            f"{checkpoint}: its weights lack {len(names)} tensors of {type(model).__name__}, {names[0]} for one; they "
            "would be random; give a complete checkpoint"
        )
    silence_layers(model)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                # The same function in one kernel: written out in five it takes a fifth of a step of GPT-2, and a third
                # of its activations.
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model, rates


def silence_layers(model: nn.Module) -> None:
    """Turn off all dropout that a model's layers do, an adapter's too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def silence_noise(config: PreTrainedConfig) -> dict[str, float]:
    """Set every rate of dropout, and of experts' jitter, of a config to 0; returns what they were.

    DPO compares two models: noise in either is noise in every reward.
    """
    noise = [name for name in vars(config) if re.search("drop|jitter", name)]
    rates = {name: rate for name in noise if isinstance(rate := getattr(config, name), float) and rate}
    for name in rates:
        setattr(config, name, 0.0)
    return rates


@contextmanager
def noise_restored(policy: Policy) -> Iterator[None]:
    """Within, the config says what it said before `silence_noise`, so that it is saved so."""
    for name, value in policy.noise_rates.items():
        setattr(policy.model.config, name, value)
    try:
        yield
    finally:
        for name in policy.noise_rates:
            setattr(policy.model.config, name, 0.0)


def context_length(config: PreTrainedConfig) -> int | None:
    """Longest sequence the model can read, None where it has no limit (ALiBi, state-space models)."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(length := getattr(config, name, None), int) and length > 0:
            return length
    return None


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path: a hub id is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def unreachable(name: str, what: str, error: Exception) -> str:
    cause = " ".join(str(error).split())
    return f"{name}: no {what} could be loaded from it: {cause}; check the name and the network, or give a folder"
