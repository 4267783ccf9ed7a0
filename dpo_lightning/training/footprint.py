"""The bytes behind a memory plan: counted of what stays, asked of the machine, and measured of the largest batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dpo_lightning.models.adapters import START
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.recomputation import telling
from dpo_lightning.models.reference import AdapterOff, Reference
from dpo_lightning.training.memory import GB, MemoryPlan, in_gb

#: What allocators say where they raise no exception of their own for it.
SAID = ("can't allocate memory", "not enough memory", "ALLOC_FAILED")

#: Characters of that which are passed on.
LONGEST = 200

#: Rows and columns of the matrix on which an optimizer is asked for its state.
SIDE = 64

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


# What is counted


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The memory behind some tensors: where it is -> its bytes; once where several tensors share it."""
    found = [local(tensor.detach()).untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def held_by(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def is_kept(name: str, reference: Reference | None) -> bool:
    """Whether a tensor of the policy's is there for its reference alone: the adapter that training began with."""
    return isinstance(reference, AdapterOff) and f".{START}." in name


def fixed_plan(
    policy: Policy, reference: Reference | None, optimizers: Sequence[Optimizer], make: MakeOptimizer, wrapper: object
) -> MemoryPlan:
    """The plan as far as it needs no batch, and without what there is.

    Args:
        policy: that is trained.
        reference: of it.
        optimizers: with the state that they have so far, which after a checkpoint is all of it.
        make: makes another such optimizer.
        wrapper: the module that the strategy trains, which under DDP has copies of all gradients.
    """
    named = [*policy.named_parameters(), *policy.named_buffers()]
    weights = storages(tensor for name, tensor in named if not is_kept(name, reference))
    compared = storages(tensor for name, tensor in named if is_kept(name, reference))
    compared |= storages([] if reference is None else held_by(reference))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    gradients = sum(local(parameter.detach()).nbytes for parameter in trained)
    copied = isinstance(wrapper, DistributedDataParallel) and not wrapper.gradient_as_bucket_view
    remarks = {} if reference is None else {"reference": type(reference).__name__}
    state = sum(storages(state_of(optimizers)).values())
    coming = 0
    remarks["optimizer state"] = type(optimizers[0]).__name__
    if not state:
        expected = expected_state(trained, make)
        coming = expected or 0
        if expected is None:
            remarks["optimizer state"] += ", whose state is not known"
    return MemoryPlan(
        weights=sum(weights.values()),
        gradients=gradients,
        optimizer=state + coming,
        reference=sum(size for place, size in compared.items() if place not in weights),
        buckets=gradients if copied else 0,
        coming=coming,
        remarks=tuple(remarks.items()),
    )


def state_of(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """The tensors that optimizers remember."""
    values = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return [value for value in values if isinstance(value, Tensor)]


def expected_state(trained: Sequence[nn.Parameter], make: MakeOptimizer) -> int | None:
    """Bytes of state that an optimizer will have after its first step: asked of another one, on a small matrix.

    Returns:
        None where that one takes no step.
    """
    found: dict[tuple[torch.dtype, torch.device], tuple[float, int]] = {}
    total = 0.0
    for parameter in trained:
        own = local(parameter.detach())
        kind = own.dtype, own.device
        if kind not in found:
            small = nn.Parameter(torch.zeros(SIDE, SIDE, dtype=own.dtype, device=own.device))
            small.grad = torch.zeros_like(small)
            try:
                optimizer = make([small])
                optimizer.step()
            except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError):
                return None  # it wants a closure, or something that only the whole model has
            tensors = state_of([optimizer])
            large = sum(tensor.nbytes for tensor in tensors if tensor.numel() > 1)
            found[kind] = large / small.numel(), sum(tensor.nbytes for tensor in tensors if tensor.numel() == 1)
        for_each_element, beside = found[kind]
        total += for_each_element * own.numel() + beside
    return round(total)


# What there is


def with_available(plan: MemoryPlan, device: torch.device, processes: int) -> MemoryPlan:
    """The plan with what there is for this process, what it has loaded included.

    Args:
        plan: what it needs.
        device: that it computes on.
        processes: of this machine that share its memory, where the device is the CPU.
    """
    said = ""
    available: int | None = None
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        available = free + torch.cuda.memory_reserved(device)
        said = f"of {whole / GB:.3f}: what is free, and what is loaded"
    elif device.type == "cpu" and (free := free_memory()) is not None:
        loaded = plan.weights + plan.reference + plan.buckets + plan.optimizer - plan.coming
        available = free // processes + loaded
        said = "what is free, and what is loaded" + (f"; for each of {processes} processes" if processes > 1 else "")
    return replace(plan, available=available, remarks=(*plan.remarks, ("there is", said)))


def free_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this machine can still give, or the container that the process is in; swap is not counted.

    Args:
        proc: where Linux tells of processes.
        cgroups: and of the limits of containers.

    Returns:
        None where neither says.
    """
    found = []
    if (file := proc / "meminfo").exists():
        lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    if (file := proc / "self" / "cgroup").exists():
        for line in file.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                found += left_in(cgroups, path, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                found += left_in(cgroups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return min(found, default=None)


def left_in(root: Path, path: str, limit: str, usage: str) -> list[int]:
    """What is left in a control group and in those that it is in; what was read of files counts as free.

    Args:
        root: where control groups are.
        path: of the group, under it.
        limit: the file with the most that it may take.
        usage: the file with what it takes.
    """
    found = []
    place = root / path.lstrip("/")
    for folder in (place, *place.parents):
        if not folder.is_relative_to(root):
            break
        if not (folder / limit).exists() or not (folder / usage).exists():
            continue
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        if most == "max":
            continue
        if (folder / "memory.stat").exists():
            lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # In the first version of control groups the whole group's are the ones called total.
            used -= sum(
                int(lines.get(f"total_{name}", lines.get(name, 0))) for name in ("active_file", "inactive_file")
            )
        found.append(max(int(most) - used, 0))
    return found


# What is tried


@dataclass(frozen=True)
class Tried:
    """What came of the largest batch.

    Args:
        activations: bytes that were kept for backward, as far as it came.
        peak: most that was allocated; None where the device does not count.
        fault: what was said when there was no more memory; None where it was enough.
    """

    activations: int
    peak: int | None
    fault: str | None


class KeptForBackward:
    """Counts what autograd keeps of a forward, each piece of memory once.

    Args:
        known: what is in memory anyway.
        room: most bytes that there can be; None where that is not known.
    """

    def __init__(self, known: Iterable[Tensor], room: int | None) -> None:
        self.known = {local(tensor.detach()).untyped_storage()._cdata for tensor in known}
        self.room = room
        self.size = 0
        self.found: dict[int, torch.UntypedStorage] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within, what is kept is counted.

        Raises:
            MemoryError: where it is more than there can be: a CPU's allocator would not say so, and the system would
                end the process.
        """
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor), telling(self._keep):
            yield

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = local(tensor.detach()).untyped_storage()
        if storage._cdata not in self.known and storage._cdata not in self.found:
            self.found[storage._cdata] = storage  # held, so that its place is not taken by another
            self.size += storage.nbytes()
            if self.room is not None and self.size > self.room:
                raise MemoryError(f"it keeps more than the {in_gb(max(self.room, 0))} that are left for it")
        return tensor.detach()  # a node that kept what it gave itself would keep itself

    def close(self) -> int:
        """The bytes that are kept now: what was gathered of sharded weights is gone again."""
        self.size = sum(storage.nbytes() for storage in self.found.values())
        self.found.clear()
        return self.size


def try_batch(
    step: Callable[[], Tensor],
    trained: Sequence[nn.Parameter],
    known: Sequence[Tensor],
    plan: MemoryPlan,
    device: torch.device,
    sharded: bool,
) -> Tried:
    """Go forward and backward once, and leave nothing behind.

    Gradients are not put where a step puts them, so that nothing that waits for them there (DDP, an optimizer within
    backward) hears of it. Sharded weights know no other way; there all devices must do this together.

    Args:
        step: gives the loss.
        trained: parameters that take gradients.
        known: tensors that are in memory anyway.
        plan: without this batch.
        device: that it is computed on.
        sharded: whether the weights are spread over devices.
    """
    cuda = device.type == "cuda"
    # A device's own allocator says when there is no more; and gathered weights, which come and go, are not activations.
    kept = KeptForBackward(known, None if cuda or sharded else plan.room)
    fault: str | None = None
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng([device] if cuda else []):
        try:
            reserved = torch.empty(plan.coming, dtype=torch.uint8, device=device)
            with kept.counting():
                loss = step()
            kept.close()
            if sharded:
                loss.backward()
            else:
                torch.autograd.grad(loss, trained, allow_unused=True)
            del loss, reserved
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            fault = one_line(error)
            kept.found.clear()
    for parameter in trained if sharded else ():
        parameter.grad = None
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    if cuda:
        torch.cuda.empty_cache()  # so that steps find the memory as it was
    return Tried(kept.size, peak, fault)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no more memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(said in str(error) for said in SAID)


def one_line(error: BaseException) -> str:
    """What an allocator says, without the list of its settings that follows."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."
