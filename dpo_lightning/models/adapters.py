"""Low-rank adapters, through peft: what is trained is a small part beside the frozen weights.

The adapter's layers are put into the model in place, so that all else goes on to see the model itself.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_peft_available

from dpo_lightning.errors import InputError

if TYPE_CHECKING:  # an extra, and slow to import
    from peft import PeftModel

#: What peft says of an adapter that has no part in a forward.
ASIDE = ("base_model_name_or_path", "inference_mode", "lora_dropout", "revision", "auto_mapping", "peft_version")

#: peft's name for the adapter that is trained, and ours for the one that it was when training began.
TRAINED, START = "default", "start"


@dataclass(frozen=True)
class LoRA:
    """A low-rank update of the model's matrices: `W + alpha / r * B A`.

    Hu et al. 2021, section 4.1 (arXiv:2106.09685). B starts at 0, so that the policy starts as the checkpoint is.

    Args:
        r: rank of the update, at least 1.
        alpha: its scale is alpha / r.
        dropout: share of the adapter's inputs that are set to 0 while training: noise in the policy's rewards.
        target_modules: names of the layers that get one, or a pattern for their whole names; all-linear is every matrix
            but the output head.
        merge: export the model with the update in its weights; false exports the adapter alone, in peft's format.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    merge: bool = True

    def check(self) -> None:
        """Raises InputError for a number that cannot be meant. (jsonargparse would hide an error of making it.)"""
        if self.r < 1:
            raise InputError(f"model.lora.r must be at least 1, got {self.r}")
        if not self.alpha > 0:
            raise InputError(f"model.lora.alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"model.lora.dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class Adapter:
    """The adapter in a policy's model.

    Args:
        wrapped: the model in peft's hands.
        base: name of the model that it is an adapter of.
        new: whether it changes nothing yet; else the weights that it began with are kept beside it.
    """

    wrapped: "PeftModel" = field(repr=False)
    base: str
    new: bool

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within, the model computes what it did when training began."""
        if self.new:
            with self.wrapped.disable_adapter():
                yield
            return
        self.wrapped.set_adapter(START, inference_mode=True)
        try:
            yield
        finally:
            self.wrapped.set_adapter(TRAINED)

    def starting_tensors(self) -> dict[str, Tensor]:
        """The weights that the model began with, by the names that they have in a model without adapters."""
        name = "" if self.new else f".{START}."
        tensors = self.wrapped.get_base_model().state_dict()
        own = {key: value for key, value in tensors.items() if ".lora_" not in key or (name and name in key)}
        return {key.replace(".base_layer.", "."): value for key, value in own.items()}

    @property
    def config(self) -> dict[str, Any]:
        """What a forward through it depends on beside its weights: rank, scale and where it is."""
        said = self.wrapped.peft_config[TRAINED].to_dict()
        kept = {name: value for name, value in said.items() if name not in ASIDE}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in kept.items()}

    def merged(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights of the model without adapters that computes the same, a layer at a time; nothing is changed.

        Args:
            weights: state of the model, where it has only a part of them itself.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        model = self.wrapped.get_base_model()
        state = model.state_dict() if weights is None else weights
        found: dict[str, Tensor] = {}
        replaced: list[str] = []
        for name, module in model.named_modules():
            if not isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
                continue
            prefix = f"{name}."
            replaced.append(prefix)
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            layer = copy.deepcopy(module)
            layer.load_state_dict(own, assign=True)
            if isinstance(layer, BaseTunerLayer):
                layer.merge(safe_merge=True, adapter_names=[TRAINED])  # into a copy of the model's weights
                whole: nn.Module = layer.get_base_layer()
            else:
                whole = layer.modules_to_save[TRAINED]
            found |= {f"{prefix}{key}": value for key, value in whole.state_dict().items()}
        rest = {key: value for key, value in state.items() if not key.startswith(tuple(replaced))}
        return rest | found

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the adapter alone, in peft's format.

        Args:
            folder: to write.
            weights: state of the model, where it has only a part of them itself.
        """
        self.wrapped.peft_config[TRAINED].base_model_name_or_path = self.base
        state = None if weights is None else {f"base_model.model.{name}": value for name, value in weights.items()}
        self.wrapped.save_pretrained(folder, selected_adapters=[TRAINED], state_dict=state)


def add_adapter(model: PreTrainedModel, base: str, lora: LoRA) -> Adapter:
    """Put a new adapter into a model, whose own weights are frozen.

    Raises:
        InputError: if peft is missing, or no layer has such a name.
    """
    check_peft("model.lora")
    from peft import LoraConfig, get_peft_model

    targets = lora.target_modules
    if isinstance(targets, str) and targets.replace("_", "").isalnum():  # a name; peft takes text for a pattern
        targets = [targets]
    options = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of GPT-2's transposed layers, which peft finds and knows
            wrapped = get_peft_model(model, options)
    except ValueError as error:
        leaves = (name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D))
        names = sorted({name.rpartition(".")[2] for name in leaves})
        raise InputError(
            f"model.lora.target_modules {lora.target_modules}: {error}; the model's layers are {', '.join(names)}"
        ) from error
    return Adapter(wrapped, base, new=True)


def load_adapter(model: PreTrainedModel, base: str, name: str) -> Adapter:
    """Put an adapter from disk or the hub into a model, to be trained further, and its present weights beside it.

    Raises:
        InputError: if it is not one of this model.
    """
    check_peft(name)
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    config = PeftConfig.from_pretrained(name)
    bias = config.to_dict().get("bias", "none")
    if config.is_prompt_learning or bias != "none":
        raise InputError(
            f"{name}: an adapter of type {config.peft_type.value} with bias {bias!r} cannot be trained further, only "
            "one of layers without biases; merge it into its model first"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not fit is an error here
            wrapped = PeftModel.from_pretrained(model, name, adapter_name=TRAINED, is_trainable=True)
            wrapped.load_adapter(name, adapter_name=START, is_trainable=False)
        found, wanted = load_peft_weights(name, device="cpu"), get_peft_model_state_dict(wrapped, adapter_name=TRAINED)
        if differing := sorted(found.keys() ^ wanted.keys()):
            raise ValueError(f"{len(differing)} tensors are in one of them only, {differing[0]} for one")
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        cause = " ".join(str(error).split())
        raise InputError(
            f"{name}: the adapter does not fit {base}: {cause[:300]}; give the model that it was trained on as "
            "base_model_name_or_path in its adapter_config.json"
        ) from error
    wrapped.set_adapter(TRAINED)
    return Adapter(wrapped, base, new=False)


def check_peft(what: str) -> None:
    """Raises InputError where peft is not installed."""
    if not is_peft_available():
        raise InputError(f"{what}: adapters need peft; install it with `pip install 'dpo_lightning[lora]'`")
