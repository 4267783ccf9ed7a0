"""What a run's own figures say of it, in words: pure functions of validation and test figures."""

import math
from collections.abc import Mapping, Sequence

Figures = Mapping[str, float]

#: By how many nats, and by what share of their log-probability, the chosen answers must have become less likely, and by
#: what share the margins must have grown, while the accuracy has gained no more than this.
FALLEN, SHARE_FALLEN, GROWN, GAINED = 1.0, 0.05, 0.2, 0.005

#: Share of their log-probability that the chosen answers may lose between the first validation and any later one.
DISPLACED = 0.5


#: Share of pairs from which on displacement, or saturation, is said to be the rule.
MOST = 0.9

#: Above so much of the loss that the run started with, the validation loss says that something is wrong.
RISEN = 1.1


def diagnose(
    history: Sequence[Figures], start_loss: float | None = None, starts_as_reference: bool = True
) -> dict[str, str]:
    """What the validations so far say is wrong with a run: fault -> a sentence with its cure.

    Args:
        history: the figures of every validation so far, the latest last.
        start_loss: of the policy against itself, where there is a reference and all pairs start alike.
        starts_as_reference: whether the policy started from the reference; else its rewards are not 0 at the start.
    """
    if not math.isfinite(history[-1]["loss"]):
        return {"not finite": f"the validation loss is {history[-1]['loss']}; lower the learning rate"}
    sentences = {
        "over-optimisation": over_optimised(history),
        "worse than chance": worse_than_chance(history[-1]) if starts_as_reference else None,
        "loss above its start": risen(history[-1], start_loss),
        "likelihood displacement": displaced(history) if starts_as_reference else None,
        "saturation": saturated(history[-1]),
    }
    return {fault: sentence for fault, sentence in sentences.items() if sentence is not None}


def worse_than_chance(now: Figures) -> str | None:
    """Whether the accuracy is below 1/2 by more than the validation's size explains, two standard errors."""
    if "rewards/accuracies" not in now or now["rewards/accuracies"] + 1 / math.sqrt(now["pairs"]) >= 0.5:
        return None
    return (
        f"the validation accuracy is {now['rewards/accuracies']:.3f}, so the rejected answer has the higher reward "
        "more often than not: the learning rate is too high, or chosen and rejected are swapped"
    )


def risen(now: Figures, start_loss: float | None) -> str | None:
    """Whether the validation loss is well above what it was for the policy against itself."""
    if start_loss is None or start_loss <= 0 or now["loss"] <= RISEN * start_loss:
        return None
    accuracy = f", though the accuracy is {now['rewards/accuracies']:.3f}" if "rewards/accuracies" in now else ""
    return (
        f"the validation loss is {now['loss']:.3f}, above the {start_loss:.3f} of a policy that has learned nothing"
        f"{accuracy}: margins are large where they are wrong, too; lower the learning rate (1e-6 to 1e-5 is usual for "
        "a pretrained model), raise beta or stop earlier"
    )


def displaced(history: Sequence[Figures]) -> str | None:
    """Whether nearly all chosen answers have become less likely than the reference has them.

    Likelihood displacement: Razin et al. 2024, arXiv:2410.08847.
    """
    share = history[-1].get("displacement", 0.0)
    if share <= MOST:
        return None
    return (
        f"in {share:.0%} of the pairs the chosen answer, too, has become less likely than under the reference; what it "
        "lost has gone to answers that nobody has rated (Razin et al. 2024, arXiv:2410.08847); lower the learning "
        "rate, raise beta, or add an SFT term (sft_weight)"
    )


def saturated(now: Figures) -> str | None:
    """Whether margins are so large that hardly a pair has a gradient left."""
    share = now.get("rewards/saturation", 0.0)
    if share <= MOST:
        return None
    return (
        f"in {share:.0%} of the pairs the margin is so large that below 1% of the gradient is left (sigma of minus the "
        "margin, Rafailov et al. 2023, section 4); more steps teach little, a smaller beta would move further"
    )


def over_optimised(history: Sequence[Figures]) -> str | None:
    """Whether the latest validation bears the marks of over-optimisation; if so, a sentence that says it.

    Either the policy goes on to move away from the reference, and margins grow, while it tells good answers from bad
    ones no better than before and the chosen answers become less likely, too (Rafailov et al. 2024, arXiv:2406.02900,
    where the true reward falls then); or, whatever the accuracy, the chosen answers have become less likely by far.

    Args:
        history: the figures of every validation so far, the latest last.
    """
    if len(history) < 2 or "rewards/accuracies" not in history[-1]:
        return None
    *earlier, now = history
    cure = "raise beta, lower the learning rate or stop earlier"
    first, last = earlier[0]["logps/chosen"], now["logps/chosen"]
    if first - last > max(FALLEN, DISPLACED * abs(first)):
        return (
            f"the log-probability of the chosen answers went from {first:.1f} to {last:.1f} nats "
            f"since the first validation, so what they lost has gone to answers that nobody has rated (Rafailov et al. "
            f"2024, arXiv:2406.02900); {cure}"
        )
    best = max(earlier, key=lambda figures: figures["rewards/accuracies"])
    fallen = best["logps/chosen"] - now["logps/chosen"]
    grown = now["rewards/margins"] > (1 + GROWN) * best["rewards/margins"]
    nearer = "kl_of_pairs" in now and now["kl_of_pairs"] <= best["kl_of_pairs"]
    gained = now["rewards/accuracies"] - best["rewards/accuracies"]
    if fallen < max(FALLEN, SHARE_FALLEN * abs(best["logps/chosen"])) or not grown or nearer or gained > GAINED:
        return None
    kl = ""
    if "kl_of_pairs" in now:
        kl = f", {now['kl_of_pairs']:.1f} nats from the reference where it was {best['kl_of_pairs']:.1f}"
    return (
        f"margins grew from {best['rewards/margins']:.2f} to {now['rewards/margins']:.2f} while the "
        f"accuracy went from {best['rewards/accuracies']:.3f} to {now['rewards/accuracies']:.3f} and chosen answers "
        f"became less likely by {fallen:.1f} nats{kl} (Rafailov et al. 2024, arXiv:2406.02900); {cure}"
    )


def truly_worse(found: Figures) -> str | None:
    """Whether sampled answers are truly worse than the reference's, beyond chance; if so, a sentence that says it.

    Args:
        found: the figures of `test`.
    """
    if "true_reward" not in found or found["true_reward"] >= found["true_reward/reference"]:
        return None
    if found["win_rate/high"] >= 0.5 or found["kl/low"] <= 0:
        return None
    return (
        f"the policy's answers have a lower true reward ({found['true_reward']:.3f}) than the "
        f"reference's ({found['true_reward/reference']:.3f}), {found['kl']:.1f} nats away from it, whatever the "
        "validation accuracy says; raise beta, lower the learning rate or stop earlier"
    )
