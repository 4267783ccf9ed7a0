"""What the options say of devices and nodes, against what was started: looked at before anything is read or written."""

import os

from jsonargparse import Namespace
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from dpo_lightning.errors import InputError

#: Strategies of Lightning's that spread weights in ways in which a run here cannot be validated, saved and exported.
OTHER_SHARDING = ("fsdp_", "deepspeed", "FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")

#: What a launcher says of the processes that it started: of all nodes, of each, and how many nodes.
TORCHRUN = ("torchrun", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
SLURM = ("SLURM", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES")


def check_strategy(strategy: str | Namespace) -> None:
    """Raises InputError for a strategy that spreads weights in another way than `fsdp` does.

    Args:
        strategy: a name, or options with a `class_path`.
    """
    path = strategy if isinstance(strategy, str) else strategy.class_path
    name = path.rpartition(".")[2]
    if name.startswith(OTHER_SHARDING):
        raise InputError(
            f"trainer.strategy {name} spreads weights in a way that cannot be gathered here for checkpoints and the "
            "export; use trainer.strategy fsdp"
        )


def check_world(devices: int, nodes: int) -> None:
    """Raises InputError unless as many processes were started as the options speak of.

    Lightning itself does not look where it does not start them, and each would train for itself.

    Args:
        devices: of each node.
        nodes: their number.
    """
    launcher, *names = TORCHRUN if TorchElasticEnvironment.detect() else SLURM
    if launcher == "SLURM" and not SLURMEnvironment.detect():
        return
    environment = os.environ  # not the one of this module's import: datasets puts a copy in its place
    wanted = (devices * nodes, devices, nodes)
    found = [int(environment.get(name, number)) for name, number in zip(names, wanted, strict=True)]
    if (*found,) != wanted:
        started = ", ".join(
            f"{name} {number}" for name, number in zip(names, found, strict=True) if name in environment
        )
        raise InputError(
            f"trainer.devices {devices} on each of trainer.num_nodes {nodes} are {devices * nodes} processes, but "
            f"{launcher} has started {found[0]} ({started}); set trainer.devices and trainer.num_nodes to what is "
            "started, or start as many"
        )
