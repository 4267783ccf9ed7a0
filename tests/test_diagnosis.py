"""What is said of a run, and only then: each mark of over-optimisation is needed."""

import pytest

from dpo_lightning.training.diagnosis import over_optimised, truly_worse

Figures = dict[str, float]


def validation(accuracy: float, margin: float, chosen: float) -> Figures:
    return {"rewards/accuracies": accuracy, "rewards/margins": margin, "logps/chosen": chosen, "loss": 0.4}


BEFORE = validation(0.80, 2.0, -20.0)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (validation(0.80, 3.0, -22.0), True),
        (validation(0.70, 9.0, -60.0), True),
        (validation(0.83, 3.0, -22.0), False),  # it tells the answers apart better
        (validation(0.80, 2.1, -22.0), False),  # it does not move away
        (validation(0.80, 3.0, -20.5), False),  # the chosen answers are as likely as before
        (validation(0.80, 3.0, -15.0), False),
    ],
)
def test_margins_that_grow_alone_while_chosen_answers_become_less_likely_are_over_optimisation(
    now: Figures, said: bool
) -> None:
    assert (over_optimised([BEFORE, now]) is not None) is said


@pytest.mark.parametrize(("chosen", "said"), [(-29.0, False), (-31.0, True)])
def test_chosen_answers_that_lose_half_of_their_log_probability_are_over_optimisation_whatever_the_accuracy(
    chosen: float, said: bool
) -> None:
    sentence = over_optimised([BEFORE, validation(0.9, 2.0, -21.0), validation(0.95, 4.0, chosen)])
    assert (sentence is not None) is said
    assert sentence is None or ("-20.0 to -31.0 nats" in sentence and "raise beta" in sentence)


def test_long_answers_may_lose_a_few_nats() -> None:
    """A twentieth of their log-probability, as healthy runs do."""
    before, now = validation(0.65, 0.5, -400.0), validation(0.65, 0.8, -415.0)
    assert over_optimised([before, now]) is None
    assert over_optimised([before, now | {"logps/chosen": -425.0}]) is not None


def test_the_sentence_has_the_figures_and_a_cure() -> None:
    sentence = over_optimised([BEFORE, validation(0.79, 3.0, -22.5)])
    assert sentence is not None and "\n" not in sentence
    for text in ("2.00 to 3.00", "0.800 to 0.790", "2.5 nats", "raise beta"):
        assert text in sentence


def test_the_best_validation_is_what_counts_not_the_last() -> None:
    slow = [validation(0.80, 2.0 + 0.2 * n, -20.0 - 0.5 * n) for n in range(6)]
    assert [over_optimised(slow[: n + 1]) is not None for n in range(6)] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_said_before_there_is_something_to_compare(count: int) -> None:
    assert over_optimised([validation(0.1, 99.0, -999.0)] * count) is None


WORSE = {"true_reward": 0.3, "true_reward/reference": 0.45, "win_rate/high": 0.4, "kl": 18.04, "kl/low": 17.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, True),
        ({"true_reward": 0.45}, False),
        ({"true_reward": 0.8}, False),
        ({"win_rate/high": 0.51}, False),  # by chance
        ({"kl": 0.0, "kl/low": 0.0}, False),  # it is the reference
    ],
)
def test_a_policy_that_is_truly_worse_than_its_reference_is_told_so(change: Figures, said: bool) -> None:
    sentence = truly_worse(WORSE | change)
    assert (sentence is not None) is said
    assert sentence is None or ("0.300" in sentence and "0.450" in sentence and "18.0 nats" in sentence)


def test_nobody_knows_without_an_oracle() -> None:
    assert truly_worse({"kl": 50.0, "tokens/policy": 5.0}) is None
