"""Before the first step: what memory the run needs is said, and its largest batch is tried."""

from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dpo_lightning.data.packing import PreferenceBatch
from dpo_lightning.errors import InputError
from dpo_lightning.models.layers import blocks
from dpo_lightning.models.policy import toy_pairs
from dpo_lightning.models.reference import FrozenModel
from dpo_lightning.training.footprint import Tried, fixed_plan, held_by, try_batch, with_available
from dpo_lightning.training.memory import Means, MemoryPlan
from dpo_lightning.training.module import DPOModule


class MemoryCheck(Callback):
    """Says what memory a run needs, and tries its largest batch, of which nothing is left.

    Attributes:
        plan: what the run needs, once that is known.
        means: what it could do to need less.
    """

    def __init__(self) -> None:
        self.plan: MemoryPlan | None = None
        self.means: Means | None = None
        self.batch: PreferenceBatch | None = None  # to be tried

    def on_train_start(self, trainer: Trainer, pl_module: DPOModule) -> None:
        """Say what is needed whatever the batch."""
        self.batch = batch = trainer.datamodule.largest_batch()
        self.means = means_of(trainer, pl_module, batch)
        settle_reference(trainer, pl_module)
        plan = fixed_plan(
            pl_module.policy, pl_module.reference, trainer.optimizers, pl_module.optimizer, trainer.strategy.model
        )
        self.plan = with_available(plan, pl_module.device, trainer.num_devices)
        rank_zero_info("\n".join([f"Memory of {pl_module.device}, in GB (10^9 bytes):", *self.plan.rows()]))
        if self.plan.is_lacking:
            rank_zero_info(f"Warning: memory: {self.shortage()}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: DPOModule, batch: object, batch_idx: int) -> None:
        """Try the largest batch before the first, when policy and reference are known to agree.

        Raises:
            InputError: if it does not fit, on any rank.
        """
        largest, self.batch = self.batch, None
        if largest is None or not pl_module.try_longest:
            return
        was_lacking = self.plan.is_lacking
        self._try(trainer, pl_module, largest)
        rank_zero_info("\n".join(self.plan.last_rows()))
        if self.plan.is_lacking and not was_lacking:
            rank_zero_info(f"Warning: memory: {self.shortage()}")

    def _try(self, trainer: Trainer, module: DPOModule, batch: PreferenceBatch) -> None:
        """Raises InputError if the batch does not fit, on any rank; else the plan knows what it takes."""
        tried = tried_batch(trainer, module, batch, self.plan)
        said = f"{batch.num_pairs:,} pair{'s'[: batch.num_pairs > 1]}, {batch.tokens.numel():,} tokens"
        if trainer.datamodule.streaming:
            said += ": the first, lengths of a stream are not known"
        self.plan = self.plan.after(tried.activations, tried.peak, said)
        fault = None
        if tried.fault is not None:
            fault = InputError(
                f"the largest batch ({said}) was tried before the first step and does not fit: {tried.fault}; "
                f"{self.shortage()}"
            )
        # On one rank alone the others would wait for it; of sharded weights they wait already, for its share.
        if fault is not None and module.device_mesh is not None:
            raise fault
        if not trainer.strategy.reduce_boolean_decision(fault is None, all=True):
            advice = self.means.advice(self.plan)
            raise fault or InputError(f"the largest batch of another rank does not fit; {advice}")

    def shortage(self) -> str:
        """What is needed, what there is, and what to change; empty where there is no plan yet."""
        return "" if self.plan is None else f"{self.plan.shortage()}; {self.means.advice(self.plan)}"


def settle_reference(trainer: Trainer, module: DPOModule) -> None:
    """Let a frozen model cast its matrices for good, if it may in the run's precision: it is counted as it will be."""
    if isinstance(module.reference, FrozenModel):
        with trainer.precision_plugin.train_step_context():
            module.reference.settle(module.policy.lay_out(toy_pairs(module.policy)[0]))


def tried_batch(trainer: Trainer, module: DPOModule, batch: PreferenceBatch, plan: MemoryPlan) -> Tried:
    """What a step does with a batch, but for what it leaves."""
    precision = trainer.precision_plugin
    batch = precision.convert_input(batch).to(module.device)

    def step() -> Tensor:
        with precision.train_step_context():
            return module.mean_over_pairs(module.score(batch).losses, batch)

    trained = [parameter for parameter in module.policy.parameters() if parameter.requires_grad]
    known = [*held_by(module), *(value for value in vars(batch).values() if isinstance(value, Tensor))]
    return try_batch(step, trained, known, plan, module.device, sharded=module.device_mesh is not None)


def means_of(trainer: Trainer, module: DPOModule, batch: PreferenceBatch) -> Means:
    """What a run could do to need less memory, with its largest batch."""
    policy, reference = module.policy, module.reference
    copied = isinstance(reference, FrozenModel) and reference.is_fixed
    checkpointed = module.gradient_checkpointing or not policy.model.supports_gradient_checkpointing
    return Means(
        batch_size=trainer.datamodule.batch_size,
        accumulate=None if module.loss.whole_step else trainer.accumulate_grad_batches,
        pairs=batch.num_pairs,
        longest=int(batch.positions.max()) + 1,
        layers=0 if checkpointed else len(blocks(policy.model)),
        adapter=policy.adapter is None,
        table=copied and not trainer.datamodule.streaming,
        copy=copied and reference.is_start,
        half=trainer.precision in ("32-true", "64-true"),
        devices=trainer.world_size if module.device.type == "cuda" and module.device_mesh is None else 0,
    )
