"""A policy whose weights, gradients and optimizer state are spread over all devices (FSDP, Zhao et al. 2023).

PyTorch's second FSDP (`fully_shard`) rather than its first: it shards a module in place, parameter by parameter, so
that what is validated and exported after training is what was trained; frozen and trained weights stay apart; and it
runs on CPUs with gloo, so that what is tested is what runs. Each device keeps 1/N of every weight, as a DTensor, and
has a decoder block whole only while that block computes.
"""

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from dpo_lightning.models.layers import blocks
from dpo_lightning.models.policy import Policy


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    """Spread a policy over the devices of a mesh: each decoder block by itself, then what is left.

    Afterwards all devices must call it equally often. What is left (embeddings, head, last norm) is whole during
    `forward` and `extend`, the policy's two ways in, and is given up in between, like any block.
    """
    for block in blocks(policy.model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(policy, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(policy, "extend")


def gathered(collection: object, keep: bool) -> object:
    """The same collection with every sharded tensor whole, on the CPU; all devices must call it together.

    A parameter that stands in it twice, as tied weights do, is one tensor there too.

    Args:
        collection: a tensor, or mappings and sequences of such, as `state_dict(keep_vars=True)` gives them.
        keep: whether this device wants them; for the others the sharded ones are empty.
    """
    known: dict[int, Tensor] = {}

    def whole(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.detach()
        if id(tensor) not in known:
            full = tensor.detach().full_tensor()
            known[id(tensor)] = full.cpu() if keep else full.new_empty(0)
        return known[id(tensor)]

    return apply_to_collection(collection, Tensor, whole)


def like(value: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, which every device has, sharded as `example` is; as it is where that is whole."""
    if not isinstance(example, DTensor):
        return value
    value = value.to(example.device, example.dtype)
    return distribute_tensor(value, example.device_mesh, example.placements, src_data_rank=None)


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, over all devices."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
