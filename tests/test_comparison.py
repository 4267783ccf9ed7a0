"""What two models' answers say: figures worked by hand, an interval by its definition, a sane file and terminal."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.training.comparison import Answer, Comparison, as_text, on_one_line, summarise, wilson, write_samples

#: The 97.5% point of the normal distribution.
Z = 1.959964

laws = settings(deadline=None, max_examples=100)


def compared(row: int, logratio: float, tokens: tuple[int, int], ended: tuple[int, int], *figures: dict) -> Comparison:
    """A prompt with answers of both models; `figures` of the policy's and the reference's, or none."""
    own, other = figures or ({}, {})
    policy = Answer(f"policy says {row}", tokens[0], float(ended[0]), own)
    reference = Answer(f"reference says {row}", tokens[1], float(ended[1]), other)
    return Comparison(row, 0, f"prompt {row}", policy, reference, logratio)


#: The policy wins, ties, loses and wins.
FOUR = [
    compared(0, 1.0, (3, 1), (1, 0), {"true_reward": 0.9, "good": 1.0}, {"true_reward": 0.4, "good": 0.0}),
    compared(1, 2.0, (4, 1), (1, 0), {"true_reward": 0.5, "good": 0.0}, {"true_reward": 0.5, "good": 0.0}),
    compared(2, 6.0, (5, 2), (0, 1), {"true_reward": 0.1, "good": 0.0}, {"true_reward": 0.8, "good": 1.0}),
    compared(3, -1.0, (8, 4), (1, 0), {"true_reward": 0.7, "good": 1.0}, {"true_reward": 0.2, "good": 0.0}),
]
WITHOUT_ORACLE = [
    replace(c, policy=replace(c.policy, figures={}), reference=replace(c.reference, figures={})) for c in FOUR
]


def wilson_by_definition(share: float, count: float) -> tuple[float, float]:
    """The shares p from which `share` is 1.96 of p's standard errors away, by bisection."""

    def solve(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            near = abs(share - middle) <= Z * math.sqrt(middle * (1 - middle) / count)
            inside, outside = (middle, outside) if near else (inside, middle)
        return inside

    return solve(share, 0.0), solve(share, 1.0)


# Figures


def test_figures_are_those_worked_by_hand() -> None:
    # Log-ratios 1, 2, 6, -1: mean 2, squared deviations 1 + 0 + 16 + 9, sample variance 26 / 3, of the mean 26 / 12.
    half = Z * math.sqrt(26 / 12)
    # Wins 1, 1/2, 0, 1: 2.5 of 4. Wilson's centre and half width are divided by 1 + z^2/n.
    centre = (0.625 + Z**2 / 8) / (1 + Z**2 / 4)
    width = Z * math.sqrt(0.625 * 0.375 / 4 + Z**2 / 64) / (1 + Z**2 / 4)
    wanted = {
        "kl": 2.0,
        "kl/low": 2.0 - half,
        "kl/high": 2.0 + half,
        "tokens/policy": 5.0,
        "tokens/reference": 2.0,
        "ended/policy": 0.75,
        "ended/reference": 0.25,
        "true_reward": 0.55,
        "true_reward/reference": 0.475,
        "good": 0.5,
        "good/reference": 0.25,
        "win_rate": 0.625,
        "win_rate/low": centre - width,
        "win_rate/high": centre + width,
    }
    found = summarise(FOUR)
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, rel=1e-12)


def test_prompts_are_the_units_of_an_interval_and_their_samples_are_averaged_first() -> None:
    """Two samples of each prompt that say the same leave every figure and interval as one does."""
    three = [FOUR[0], FOUR[2], FOUR[3]]  # no tie
    twice = [replace(c, sample=sample) for c in three for sample in (0, 1)]
    assert summarise(twice) == pytest.approx(summarise(three), rel=1e-12)


def test_samples_that_disagree_narrow_the_interval_as_more_prompts_would() -> None:
    won, _, lost, _ = FOUR

    def interval(*outcomes: str) -> tuple[float, float]:
        every = [
            replace(won if letter == "w" else lost, row=row, sample=sample)
            for row, letters in enumerate(outcomes)
            for sample, letter in enumerate(letters)
        ]
        found = summarise(every)
        return found["win_rate/low"], found["win_rate/high"]

    # Means 1, 1, 1/2, 0: share 5/8, variance 11/64; so much is the spread of (5/8 * 3/8) / (11/64) * 4 = 60/11 cases.
    assert interval("ww", "ww", "wl", "ll") == pytest.approx(wilson_by_definition(5 / 8, 60 / 11), abs=1e-9)
    # Means 1, 1/2, 1/2, 1/2 spread as 20 cases would, but there are 8; and what does not spread is not trusted.
    assert interval("ww", "wl", "lw", "wl") == pytest.approx(wilson_by_definition(5 / 8, 8), abs=1e-9)
    assert interval("wl", "lw", "lw", "wl") == pytest.approx(wilson_by_definition(1 / 2, 4), abs=1e-9)
    assert interval("ww", "ww") == pytest.approx(wilson_by_definition(1, 2), abs=1e-9)


def test_without_an_oracle_nobody_knows_a_reward_or_a_winner() -> None:
    found = summarise(WITHOUT_ORACLE)
    assert found.keys() == {
        *("kl", "kl/low", "kl/high"),
        *("tokens/policy", "tokens/reference", "ended/policy", "ended/reference"),
    }
    assert found == {name: value for name, value in summarise(FOUR).items() if name in found}


@given(
    ratios=st.lists(st.floats(-50, 50), min_size=2, max_size=12),
    rewards=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=12, max_size=12),
    seed=st.integers(0, 99),
)
@laws
def test_figures_do_not_depend_on_the_order_to_the_last_bit(
    ratios: list[float], rewards: list[tuple[float, float]], seed: int
) -> None:
    comparisons = [
        compared(row, ratio, (row + 1, 2), (1, 0), {"true_reward": own}, {"true_reward": other})
        for row, (ratio, (own, other)) in enumerate(zip(ratios, rewards, strict=False))
    ]
    found = summarise(comparisons)
    assert found["kl"] == pytest.approx(np.mean(ratios), rel=1e-9, abs=1e-9)
    error = np.std(ratios, ddof=1) / math.sqrt(len(ratios))
    assert found["kl/high"] - found["kl"] == pytest.approx(Z * error, rel=1e-6, abs=1e-6)
    random.Random(seed).shuffle(comparisons)
    assert summarise(comparisons) == found


@pytest.mark.parametrize(
    ("own", "other", "win"), [(0.3, 0.2, 1.0), (0.2, 0.3, 0.0), (0.3, 0.3, 0.5), (-1.0, -2.0, 1.0), (0.0, -0.0, 0.5)]
)
def test_the_higher_true_reward_wins_and_a_tie_is_half_a_win(own: float, other: float, win: float) -> None:
    assert compared(0, 0.0, (1, 1), (1, 1), {"true_reward": own}, {"true_reward": other}).win == win


@pytest.mark.parametrize("count", [1, 2, 7, 100, 5000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.625, 1.0])
def test_the_interval_of_a_share_solves_wilsons_equation(share: float, count: int) -> None:
    assert wilson(share, count) == pytest.approx(wilson_by_definition(share, count), abs=1e-9)


def test_an_oracles_figure_replaces_none_of_the_comparisons_own() -> None:
    """Whatever a user's oracle calls its figures."""
    taken = {"true_reward": 0.5, "tokens": 70.0, "ended": 80.0, "kl": 90.0}
    found = summarise([compared(0, 1.0, (3, 1), (1, 0), taken, taken)])
    own = {"kl": 1.0, "tokens/policy": 3.0, "tokens/reference": 1.0, "ended/policy": 1.0, "ended/reference": 0.0}
    assert {name: found[name] for name in own} == own


def test_of_several_samples_of_a_prompt_the_first_is_shown() -> None:
    text = as_text([replace(c, sample=sample) for c in FOUR for sample in (0, 1)], shown=4)
    assert "4 prompts, 2 samples of each model" in text
    assert all(text.count(f"policy says {row}") == 1 for row in range(4))


# The file


def test_a_file_of_samples_holds_every_answer_in_a_line_each(tmp_path: Path) -> None:
    hard = 'Zwölf "Boxkämpfer"\n\tjagen\r\n東京 😀\u2028\x1b[31m\\ \0'
    comparisons = [*FOUR, replace(FOUR[0], row=7, prompt=hard, policy=replace(FOUR[0].policy, text=hard, figures={}))]
    write_samples(comparisons, tmp_path / "samples.jsonl")
    content = (tmp_path / "samples.jsonl").read_bytes()
    assert content.endswith(b"\n") and "東京".encode() in content
    rows = [json.loads(line) for line in content[:-1].split(b"\n")]
    found = [Comparison(**row | {whose: Answer(**row[whose]) for whose in ("policy", "reference")}) for row in rows]
    assert found == comparisons


# The terminal


@pytest.mark.parametrize("comparisons", [FOUR, WITHOUT_ORACLE], ids=["oracle", "none"])
def test_the_text_mentions_every_figure(comparisons: list[Comparison]) -> None:
    text = as_text(comparisons)
    columns: dict[str, tuple[float, float]] = {}
    for name, own, other in re.findall(r"^  ([a-z_]+) +(-?\d+\.\d{4}) +(-?\d+\.\d{4})$", text, re.MULTILINE):
        columns[name] = (float(own), float(other))
    found = summarise(comparisons)
    names = {name.partition("/")[0] for name in found} - {"kl", "win_rate"}
    assert columns.keys() == names
    for name, (own, other) in columns.items():
        assert own == pytest.approx(found.get(name, found.get(f"{name}/policy")), abs=5e-5)
        assert other == pytest.approx(found[f"{name}/reference"], abs=5e-5)
    assert "4 prompts" in text
    assert re.search(r"^  kl +2\.0000 nats.* -0\.88 to 4\.88$", text, re.MULTILINE)
    low, high = wilson_by_definition(0.625, 4)
    line = rf"^  win_rate +0\.6250 .*ties as half.* {low:.3f} to {high:.3f}$"
    assert bool(re.search(line, text, re.MULTILINE)) == ("win_rate" in found) == (comparisons is FOUR)


@pytest.mark.parametrize("shown", [0, 1, 3, 9])
def test_the_text_shows_the_answers_to_the_first_few_prompts_and_to_no_more(shown: int) -> None:
    text = as_text(FOUR, shown)
    for row in range(4):
        for words in (f"prompt {row}", f"policy says {row}", f"reference says {row}"):
            assert text.count(words) == (row < shown)
    assert as_text(FOUR) == as_text(FOUR, 3)


@given(prompt=st.text(), own=st.text(max_size=400), other=st.text(max_size=400))
@laws
def test_no_text_can_send_the_terminal_anything_but_lines_of_print(prompt: str, own: str, other: str) -> None:
    calm = compared(0, 1.0, (1, 1), (1, 1))
    wild = replace(
        calm, prompt=prompt, policy=replace(calm.policy, text=own), reference=replace(calm.reference, text=other)
    )
    lines = as_text([wild]).split("\n")
    assert len(lines) == len(as_text([calm]).split("\n"))
    assert all(line.isprintable() and len(line) < 260 for line in lines)


@given(text=st.text(max_size=400), keep_end=st.booleans(), most=st.integers(4, 300))
@laws
def test_any_text_is_one_printable_line_of_a_bounded_length(text: str, keep_end: bool, most: int) -> None:
    line = on_one_line(text, keep_end, most)
    assert line.isprintable() and len(line) <= most
    whole = on_one_line(text, most=10**6)
    if len(whole) <= most:
        assert line == whole
    else:
        assert line == ("..." + whole[len(whole) - most + 3 :] if keep_end else whole[: most - 3] + "...")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Plain text, 東京 and é.", "Plain text, 東京 and é."),
        ("  two\n\n\tlines\r\n of\u2028 words \x85", "two lines of words"),
        ("\x1b[2Jgone\x07", r"\x1b[2Jgone\x07"),
        ("\u202edesrever\u200b", r"\u202edesrever\u200b"),
        ("\ud800", r"\ud800"),
        (" \n\t ", ""),
    ],
)
def test_what_does_not_print_is_spelled_out_and_white_space_is_one_space(text: str, line: str) -> None:
    assert on_one_line(text) == line
