"""What a run's own figures say of it, in words: pure functions of validation and test figures."""

from collections.abc import Mapping, Sequence

Figures = Mapping[str, float]

#: By how many nats, and by what share of their log-probability, the chosen answers must have become less likely, and by
#: what share the margins must have grown, while the accuracy has gained no more than this.
FALLEN, SHARE_FALLEN, GROWN, GAINED = 1.0, 0.05, 0.2, 0.005

#: Share of their log-probability that the chosen answers may lose between the first validation and any later one.
DISPLACED = 0.5


def over_optimised(history: Sequence[Figures]) -> str | None:
    """Whether the latest validation bears the marks of over-optimisation; if so, a sentence that says it.

    Either the policy goes on to move away from the reference, and margins grow, while it tells good answers from bad
    ones no better than before and the chosen answers become less likely, too (Rafailov et al. 2024, arXiv:2406.02900,
    where the true reward falls then); or, whatever the accuracy, the chosen answers have become less likely by far.

    Args:
        history: the figures of every validation so far, the latest last.
    """
    if len(history) < 2:
        return None
    *earlier, now = history
    cure = "raise beta, lower the learning rate or stop earlier"
    first, last = earlier[0]["logps/chosen"], now["logps/chosen"]
    if first - last > max(FALLEN, DISPLACED * abs(first)):
        return (
            f"over-optimisation: the log-probability of the chosen answers went from {first:.1f} to {last:.1f} nats "
            f"since the first validation, so what they lost has gone to answers that nobody has rated; {cure}"
        )
    best = max(earlier, key=lambda figures: figures["rewards/accuracies"])
    fallen = best["logps/chosen"] - now["logps/chosen"]
    grown = now["rewards/margins"] > (1 + GROWN) * best["rewards/margins"]
    gained = now["rewards/accuracies"] - best["rewards/accuracies"]
    if fallen < max(FALLEN, SHARE_FALLEN * abs(best["logps/chosen"])) or not grown or gained > GAINED:
        return None
    return (
        f"over-optimisation: margins grew from {best['rewards/margins']:.2f} to {now['rewards/margins']:.2f} while the "
        f"accuracy went from {best['rewards/accuracies']:.3f} to {now['rewards/accuracies']:.3f} and chosen answers "
        f"became less likely by {fallen:.1f} nats; {cure}"
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
        f"over-optimisation: the policy's answers have a lower true reward ({found['true_reward']:.3f}) than the "
        f"reference's ({found['true_reward/reference']:.3f}), {found['kl']:.1f} nats away from it, whatever the "
        "validation accuracy says; raise beta, lower the learning rate or stop earlier"
    )
