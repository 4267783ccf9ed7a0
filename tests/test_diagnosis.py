"""What is said of a run, and only then: a made-up history for every fault, and a healthy one for none."""

import json
import math
from pathlib import Path

import pytest

from dpo_lightning.training import cli
from dpo_lightning.training.curves import read_metrics
from dpo_lightning.training.diagnosis import diagnose, over_optimised, truly_worse
from tests.conftest import RunCli

Figures = dict[str, float]

LN2 = math.log(2)


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


#: Two validations of a run that goes well, on 1,000 pairs.
HEALTHY: list[Figures] = [
    {
        "loss": 0.66,
        "rewards/accuracies": 0.62,
        "rewards/margins": 0.10,
        "rewards/saturation": 0.0,
        "logps/chosen": -80.0,
        "displacement": 0.45,
        "pairs": 1000.0,
    },
    {
        "loss": 0.61,
        "rewards/accuracies": 0.69,
        "rewards/margins": 0.30,
        "rewards/saturation": 0.02,
        "logps/chosen": -80.5,
        "displacement": 0.55,
        "pairs": 1000.0,
    },
]


def now(**changes: float) -> list[Figures]:
    """The healthy history with other figures in its latest validation; a figure's name has _ for /."""
    names = {name.replace("/", "_"): name for name in HEALTHY[-1]}
    return [*HEALTHY[:-1], HEALTHY[-1] | {names[name]: value for name, value in changes.items()}]


def test_a_healthy_run_is_told_nothing() -> None:
    for length in (1, 2):
        assert diagnose(HEALTHY[:length], LN2) == {}
    assert diagnose(HEALTHY) == {}


def test_a_loss_without_rewards_and_reference_is_told_nothing() -> None:
    plain = [{"loss": loss, "logps/chosen": chosen, "pairs": 50.0} for loss, chosen in ((3.0, -90.0), (9.0, -300.0))]
    assert diagnose(plain) == {}


#: fault -> changes of the latest validation that show it and no other, and what its sentence says, cure included
FAULTS: dict[str, tuple[Figures, tuple[str, ...]]] = {
    "over-optimisation": (
        {"rewards_accuracies": 0.62, "logps_chosen": -85.0},
        ("0.10 to 0.30", "0.620 to 0.620", "5.0 nats", "raise beta"),
    ),
    "worse than chance": ({"rewards_accuracies": 0.3}, ("0.300", "learning rate is too high", "swapped")),
    "loss above its start": ({"loss": 0.9}, ("0.900", "above the 0.693", "0.690", "lower the learning rate")),
    "likelihood displacement": ({"displacement": 0.95}, ("95%", "arXiv:2410.08847", "sft_weight")),
    "saturation": ({"rewards_saturation": 0.97}, ("97%", "below 1% of the gradient", "smaller beta")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_told_by_its_figures_alone_with_a_cure(fault: str) -> None:
    changes, said = FAULTS[fault]
    found = diagnose(now(**changes), LN2)
    assert list(found) == [fault]
    assert "\n" not in found[fault]
    for text in said:
        assert text in found[fault]


def test_faults_come_together() -> None:
    changes = {name: value for fault, (changes, _) in FAULTS.items() for name, value in changes.items()}
    assert diagnose(now(**changes), LN2).keys() == FAULTS.keys()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"over-optimisation"}))
def test_the_latest_validation_decides_be_it_the_first(fault: str, first: bool) -> None:
    """Also of a run that has come back from a fault."""
    (_, bad), (_, good) = now(**FAULTS[fault][0]), HEALTHY
    assert list(diagnose([bad] if first else [good, bad], LN2)) == [fault]
    assert fault not in diagnose([bad, good], LN2)


@pytest.mark.parametrize(
    ("fault", "name", "last_good", "first_bad"),
    [
        # Two standard errors of a share of 1/2 among n are 1 / sqrt(n): 0.1 and 0.01.
        ("worse than chance", "rewards_accuracies", 0.4001, 0.3999),
        ("loss above its start", "loss", 1.0999 * LN2, 1.1001 * LN2),
        ("likelihood displacement", "displacement", 0.9, 0.9001),
        ("saturation", "rewards_saturation", 0.9, 0.9001),
    ],
)
def test_where_a_fault_begins(fault: str, name: str, last_good: float, first_bad: float) -> None:
    assert fault not in diagnose(now(pairs=100.0, **{name: last_good}), LN2)
    assert fault in diagnose(now(pairs=100.0, **{name: first_bad}), LN2)


def test_a_small_validation_may_be_worse_than_chance_by_chance() -> None:
    """0.47 of 100 pairs is, of 10,000 it is not."""
    assert "worse than chance" not in diagnose(now(pairs=100.0, rewards_accuracies=0.47), LN2)
    assert "worse than chance" in diagnose(now(pairs=10_000.0, rewards_accuracies=0.47), LN2)


@pytest.mark.parametrize("start_loss", [None, 0.0, -0.3])
def test_a_loss_whose_start_is_not_known_or_not_above_0_does_not_rise_above_it(start_loss: float | None) -> None:
    assert diagnose(now(loss=50.0), start_loss) == {}


def test_a_validation_loss_of_3_4_with_an_accuracy_of_0_69_is_explained() -> None:
    """A run that many have had: the loss stood at 0.693 before the first step, the accuracy fell to 0.63 later on."""
    early, late = (
        now(loss=2.1, rewards_margins=1.9)[-1],
        now(loss=3.4, rewards_accuracies=0.63, rewards_margins=2.6)[-1],
    )
    for history, accuracy in (([now(loss=3.4)[-1]], "0.690"), ([early, late], "0.630")):
        found = diagnose(history, 0.693)
        sentence = found["loss above its start"]
        for text in ("3.400", "above the 0.693", f"though the accuracy is {accuracy}", "where they are wrong", "beta"):
            assert text in sentence
        assert "worse than chance" not in found


def test_swapped_answers_are_told_of_1000_pairs() -> None:
    swapped = [validation(0.30, -0.9, -82.0) | {"pairs": 1000.0}]
    assert "chosen and rejected are swapped" in diagnose(swapped, LN2)["worse than chance"]


def test_a_run_is_told_a_fault_once_while_it_goes_on_and_once_at_its_end(
    run_cli: RunCli, toy: Path, toy_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validated four times, on pairs whose answers are swapped."""
    monkeypatch.setattr(cli, "draw_curves", lambda *_: None)
    rows = [json.loads(line) for line in (toy / "pairs.jsonl").read_text().splitlines()]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (tmp_path / "swapped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped))
    place = toy_words.index("--data.val_fraction")
    words = [*toy_words[:place], *toy_words[place + 2 :], "--data.val_source", tmp_path / "swapped.jsonl"]
    done = run_cli("fit", *words, "--trainer.max_epochs", 4, "--model.samples", 0)
    assert done.status == 0, done.err
    steps, accuracies = read_metrics(tmp_path / "runs/version_0/metrics.csv")["val/rewards/accuracies"]
    assert len(steps) == 4 and sum(accuracy < 0.5 - 1 / math.sqrt(60) for accuracy in accuracies) >= 2
    assert "\n".join(done.err).count("Warning: worse than chance: ") == 1
    assert done.out.count("Warning: worse than chance: ") == 1


def test_a_validation_that_is_no_number_is_told_so_and_nothing_else() -> None:
    assert list(diagnose(now(loss=math.nan, rewards_accuracies=math.nan), LN2)) == ["not finite"]


def test_of_a_policy_that_did_not_start_from_its_reference_chance_says_nothing() -> None:
    """Its rewards are not 0 at the start, so neither accuracy nor displacement is that of training."""
    history = now(rewards_accuracies=0.3, displacement=0.99)
    assert {"worse than chance", "likelihood displacement"} <= diagnose(history, LN2).keys()
    assert diagnose(history, LN2, starts_as_reference=False) == {}


def test_growing_margins_without_a_growing_distance_are_no_over_optimisation() -> None:
    """Where the pairs' KL to the reference is known it must have grown, too, and is told."""
    first, last = now(rewards_accuracies=0.62, logps_chosen=-85.0)
    found = over_optimised([first | {"kl_of_pairs": 2.0}, last | {"kl_of_pairs": 6.0}])
    assert found is not None and "6.0 nats from the reference where it was 2.0" in found
    assert over_optimised([first | {"kl_of_pairs": 2.0}, last | {"kl_of_pairs": 2.0}]) is None
