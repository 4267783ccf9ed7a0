"""The command that trains a model on votes, as it was trained before."""

import shlex
from pathlib import Path

from dpo_lightning.data import world
from dpo_lightning.models.checkpoint import located
from dpo_lightning.paths import path_of
from dpo_lightning.ui.voice import beta_of, config_file, option

#: Learning rate of the built-in model, which is so small that the default of a fit would teach it nothing.
WORLD_RATE = 1e-3

#: What a run's options said of its own data and models, and what they are where votes are trained on.
OTHERWISE = {
    ("model", "tokenizer"): None,
    ("model", "reference"): None,
    ("data", "weights"): None,
    ("data", "train_split"): "train",
    ("data", "val_split"): None,
    ("data", "val_source"): None,
    ("data", "format"): None,
    ("data", "chat_template"): None,
    ("data", "streaming"): False,
    ("data", "shuffle_buffer"): None,
    ("data", "max_train_pairs"): None,
    ("data", "max_val_pairs"): None,
    ("data", "oracle"): None,
}

#: Share of the prompts to validate on.
VAL_FRACTION = 0.2

#: Prompts that a fit needs, one to train and one to validate on.
FEWEST = 2


def training_command(policy: str, votes: Path, runs: Path) -> str:
    """A fit of a policy on votes, with all options of the run that exported it, as far as its config.yaml says.

    Args:
        policy: folder or hub id; it is also the reference of the new run.
        votes: the source.
        runs: the folder that the run's folder goes into.
    """
    words = ["python", "-m", "dpo_lightning", "fit"]
    given: dict[str, object] = {"model.checkpoint": policy}
    if option(policy, "model", "checkpoint") and option(policy, "data", "source"):
        words += ["--config", str(config_file(policy))]
        for keys, value in OTHERWISE.items():
            if option(policy, *keys) not in (value, None):
                given[".".join(keys)] = value
        adapter = (path_of(located(policy)) / "adapter_config.json").exists()
        if adapter and option(policy, "model", "lora") is not None:
            given["model.lora"] = None  # the adapter itself is trained further
    else:
        given["model.loss.beta"] = f"{beta_of(policy):g}"
        if policy == world.BASE:
            given["model.optimizer.lr"] = WORLD_RATE
    given |= {"data.source": votes, "data.val_fraction": VAL_FRACTION, "trainer.default_root_dir": runs / "votes"}
    for key, value in given.items():
        words += [f"--{key}", {None: "null", False: "false"}.get(value, str(value))]
    return shlex.join(words)
