"""Before the first step policy and reference must agree, as they run: precision, layout, strategy and all.

They are the same model then, so the loss must be what it is for a policy against itself, whatever the loss, and every
reward 0. A reference that is not where the policy starts is the commonest silent fault of DPO runs: the loss falls all
the same, towards something else.
"""

import math

import torch

from dpo_lightning.data.packing import PreferenceBatch
from dpo_lightning.errors import InputError
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import HALF, SINGLE, Reference
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.preference import PreferenceLoss, State, call

#: What the mean loss may differ by, as a share of it, or absolutely where it is below 1.
SINGLE_LOSS, HALF_LOSS = 1e-3, 3e-3


@torch.no_grad()
def check_start(
    loss: PreferenceLoss, state: State, policy: Policy, reference: Reference, batch: PreferenceBatch
) -> float:
    """Compare the loss of policy and reference on a batch with that of the policy against itself.

    Args:
        loss: the objective, with what it remembers, `state`.
        policy: as it starts.
        reference: what says that it is the same model.
        batch: any of the training batches.

    Returns:
        the mean loss where the run starts.

    Raises:
        InputError: if they differ, with the causes that were found.
    """
    own = policy.logps(batch, loss.statistics)
    try:
        other = reference.logps(batch)
    except (IndexError, RuntimeError, ValueError) as error:
        causes = reference.differences(policy)
        if not causes:
            raise
        raise InputError(
            f"before the first step policy and reference differ: {'; '.join(causes)}; the reference cannot score a "
            f"batch ({error}); mend the cause"
        ) from error
    wanted, found = (call(loss, own, model, state).mean().item() for model in (own, other))
    apart = ((own.logps - other.logps).abs() / own.lengths.clamp(min=1)).max().item()  # nats a token
    allowed, loss_allowed = (HALF, HALF_LOSS) if is_half(policy, batch) else (SINGLE, SINGLE_LOSS)
    # What can be told apart without numbers is told apart exactly: half precision hides much.
    causes = reference.differences(policy)
    # A loss that is no number though the log-probabilities are is told of after its first step, with its rows.
    same = abs(found - wanted) <= loss_allowed * max(1.0, abs(wanted)) or not math.isfinite(wanted)
    if apart <= allowed and same and not causes:
        return wanted
    causes = [
        *noise(own, policy.logps(batch), "policy"),
        *noise(other, reference.logps(batch), "reference"),
        *causes,
    ]
    raise InputError(
        f"before the first step policy and reference differ: the loss is {found:.6g} and should be {wanted:.6g}, "
        f"log-probabilities differ by up to {apart:.2g} nats a token ({allowed:g} allowed); "
        f"{'; '.join(causes) or 'no cause was found'}; declare another model with model.reference FrozenModel and its "
        "checkpoint, or mend the cause"
    )


def noise(first: PairLogps, second: PairLogps, whose: str) -> list[str]:
    """What is wrong if a model answers the same question twice in two ways, or with what is no number."""
    if not first.token_logps.isfinite().all():
        return [f"the {whose}'s log-probabilities are not finite"]
    if torch.equal(first.token_logps, second.token_logps):
        return []
    return [f"the {whose} differs from one forward to the next: dropout or other noise is on"]


def is_half(policy: Policy, batch: PreferenceBatch) -> bool:
    """Whether the policy computes in half precision, by its weights or under autocast."""
    autocast = torch.is_autocast_enabled(batch.tokens.device.type)
    return autocast or torch.finfo(policy.model.dtype).bits < 32
