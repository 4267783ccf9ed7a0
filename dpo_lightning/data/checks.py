"""Options of the data and of Lightning's that cannot be meant together."""

from lightning import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from dpo_lightning.errors import InputError


def check_windows(trainer: Trainer) -> None:
    """Raises InputError where Lightning would cut an optimizer step's micro-batches short or change their number.

    The mean over a step's pairs is taken over all pairs that were planned for it.
    """
    limit, accumulate = trainer.limit_train_batches, trainer.accumulate_grad_batches
    if isinstance(limit, int) and limit % accumulate and not trainer.fast_dev_run:
        raise InputError(
            f"trainer.limit_train_batches {limit} is no multiple of trainer.accumulate_grad_batches {accumulate}: the "
            "last step would be cut short; change one of them, or set data.max_train_pairs"
        )
    if any(isinstance(c, GradientAccumulationScheduler) and len(c.scheduling) > 1 for c in trainer.callbacks):
        raise InputError("GradientAccumulationScheduler changes the pairs of a step in the middle of a run; remove it")


def check_same_plan(before: dict[str, int], now: dict[str, int]) -> None:
    """Raises InputError unless a resumed run goes through the same pairs in the same steps."""
    changed = [f"{name} {before[name]}, now {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        raise InputError(
            f"the checkpoint was written with {'; '.join(changed)}: it cannot say which pairs come next; resume with "
            "what it was written with, or start a run from its exported model"
        )


def check_endless(trainer: Trainer) -> None:
    """Raises InputError for options of Lightning's that need an epoch's length, which is not known of a stream."""
    limit = trainer.limit_train_batches
    if (isinstance(limit, int) or limit != 1.0) and not trainer.fast_dev_run:
        raise InputError(
            f"trainer.limit_train_batches is {limit}: of a stream every epoch would have the "
            "same first batches; set data.max_train_pairs or trainer.max_steps"
        )
    interval = trainer.val_check_interval
    if isinstance(interval, float) and interval != 1.0:
        raise InputError(
            f"trainer.val_check_interval is {interval}, a share of an epoch, whose length is not known of a stream; "
            "give a number of batches"
        )


def check_weights(weights: list[float] | None, sources: list[str]) -> None:
    """Raises InputError unless there is a weight above 0 for each of several sources."""
    if weights is None:
        return
    if len(weights) != len(sources) or len(sources) < 2:
        raise InputError(
            f"data.weights has {len(weights)} numbers for {len(sources)} sources; give a list of sources and a weight "
            "for each"
        )
    if not all(0 < weight < float("inf") for weight in weights):
        raise InputError(f"data.weights must be above 0, got {weights}; leave out a source that is not wanted")


def check_streaming(
    streaming: bool, sources: list[str], val_fraction: float | None, num_workers: int, shuffle_buffer: int | None
) -> None:
    """Raises InputError for options that a stream cannot have, or that only a stream has."""
    if streaming and len({*sources}) < len(sources):
        raise InputError(
            "data.source lists the same source twice, and data.streaming is true; list it once, with a weight"
        )
    if not streaming and shuffle_buffer is not None:
        raise InputError("data.shuffle_buffer is of streams, and data.streaming is false; remove it")
    if streaming and val_fraction is not None:
        raise InputError(
            "data.val_fraction needs all prompts, which a stream has not; set data.val_source or val_split"
        )
    if streaming and num_workers:
        raise InputError("data.num_workers must be 0 with data.streaming: one process reads a stream in its order")
