"""Of several answers the better one is preferred, by scores, by ranks or by a verdict; where none is, that is no fault.

The oracle is brute force: all ordered pairs of answers whose figures say better, and nothing else. Answers are named
after their place, so that a pair says which two they were.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dpo_lightning.data.preference import Conversation, Format, NoPreference, Preference, RowFault, check
from dpo_lightning.data.rankings import (
    GRADES,
    SCORES,
    TEXTS,
    all_pairs,
    arena,
    best_worst,
    helpsteer3,
    safe_rlhf,
    shp,
    stack_exchange,
)

Row = dict[str, Any]
#: Figures of answers -> a row that has them.
Write = Callable[[Sequence[float]], Row]

few = settings(max_examples=100, deadline=None)

#: Few different ones, so that many tie; whole and broken, below 0 and infinite.
figures = st.lists(st.sampled_from([-2, -0.5, 0, 0.0, 1, 1.5, 3, 1e300, float("inf")]), min_size=2, max_size=6)


def lists(scores: Sequence[float], column: str = "scores") -> Row:
    return {"prompt": "a", "responses": [f"answer {i}" for i in range(len(scores))], column: list(scores)}


def records(scores: Sequence[float], grade: str = "score") -> Row:
    return {"prompt": "a", "answers": [{"text": f"answer {i}", grade: score} for i, score in enumerate(scores)]}


def nectar(scores: Sequence[float]) -> Row:
    """Ranks, of which the lowest is the best."""
    return records([-score for score in scores], "rank")


def ranks(scores: Sequence[float]) -> Row:
    return lists([-score for score in scores], "ranks")


WAYS = [lists, records, nectar, ranks]


def better(scores: Sequence[float]) -> Counter[tuple[str, str]]:
    """All pairs of answers of which the first has the higher score."""
    places = permutations(range(len(scores)), 2)
    return Counter((f"answer {i}", f"answer {j}") for i, j in places if scores[i] > scores[j])


# Scores and ranks


@pytest.mark.parametrize("write", WAYS)
@few
@given(scores=figures)
@example(scores=[1, 2])
@example(scores=[3, 1, 3, 1])
def test_all_pairs_are_those_of_which_one_is_better_and_no_others(write: Write, scores: list[float]) -> None:
    assume(better(scores))
    found = all_pairs(write(scores))
    assert Counter((pair.chosen, pair.rejected) for pair in found) == better(scores)
    ties = sum(n * (n - 1) // 2 for n in Counter(scores).values())
    assert len(found) == len(scores) * (len(scores) - 1) // 2 - ties
    assert {pair.prompt for pair in found} == {"a"}


@pytest.mark.parametrize("write", WAYS)
@few
@given(scores=figures)
def test_the_best_stands_against_the_worst(write: Write, scores: list[float]) -> None:
    assume(better(scores))
    pair = best_worst(write(scores))
    first, last = (int(answer.removeprefix("answer ")) for answer in (pair.chosen, pair.rejected))
    assert (scores[first], scores[last]) == (max(scores), min(scores))


@pytest.mark.parametrize("write", WAYS)
@pytest.mark.parametrize("format", [best_worst, all_pairs])
@few
@given(score=st.floats(allow_nan=False), count=st.integers(2, 5))
def test_answers_that_all_tie_prefer_none(format: Format, write: Write, score: float, count: int) -> None:
    with pytest.raises(NoPreference, match="same score"):
        format(write([score] * count))


@pytest.mark.parametrize("column", ["prompt", "instruction", "question"])
@pytest.mark.parametrize("answers", ["completions", "responses", "answers", "candidates", "generations"])
def test_columns_go_by_several_names(column: str, answers: str) -> None:
    for scores in SCORES:
        worst = 5 if scores == "ranks" else -5
        assert best_worst({column: "a", answers: ["b", "c"], scores: [worst, 0]}) == Preference("a", "c", "b")
    for name in TEXTS:
        for grade in GRADES:
            worst = 5 if grade == "rank" else -5
            row = {column: "a", answers: [{name: "b", grade: worst}, {name: "c", grade: 0}]}
            assert best_worst(row) == Preference("a", "c", "b")


def test_keys_that_are_none_in_records_are_as_if_they_were_not_there() -> None:
    row = records([1, 2])
    row["answers"] = [dict.fromkeys((*TEXTS, *GRADES, "rank")) | answer for answer in row["answers"]]
    assert best_worst(row | {"completions": None, "responses": None}) == Preference("a", "answer 1", "answer 0")


@pytest.mark.parametrize("format", [best_worst, all_pairs])
@pytest.mark.parametrize(
    ("row", "said"),
    [
        (lists([1, float("nan")]), "scores is not a number, expected a number"),
        (lists([1, None]), "scores is missing, expected a number"),
        (lists([1, "2"]), "scores is of type str, expected a number"),
        (lists([1, True]), "scores is of type bool, expected a number"),
        (records([float("nan"), 1]), "score is not a number"),
        (records([1, 2, None], "rank"), "rank is missing"),
        (records([None, None], "overall_score"), "overall_score is missing"),
        (lists([1]), "responses has 1 answers, expected two or more"),
        (lists([]), "responses has 0 answers"),
        (lists([1, 2]) | {"scores": [1]}, "scores is of type list, expected a list of 2 numbers"),
        (lists([1, 2]) | {"scores": None}, "scores is missing, expected a list of 2 numbers"),
        (lists([1, 2]) | {"scores": 2}, "scores is of type int"),
        (lists([1, 2]) | {"scores": "12"}, "scores is of type str"),
        (lists([1, 2]) | {"responses": ["a", None]}, "responses is missing, expected a string"),
        (lists([1, 2]) | {"responses": "ab"}, "responses is of type str, expected a list of answers"),
        (lists([1, 2]) | {"responses": None}, "completions is missing"),
        (lists([1, 2]) | {"prompt": None}, "prompt is missing"),
        (records([1, 2]) | {"answers": [{"text": "a", "score": 1}, {"score": 2}]}, "it has no column response"),
        (records([1, 2]) | {"answers": [{"text": "a", "score": 1}, "b"]}, "scores is missing"),
    ],
)
def test_answers_that_cannot_be_ranked_are_a_fault_and_no_tie(format: Format, row: Row, said: str) -> None:
    with pytest.raises(RowFault, match=said) as fault:
        format(row)
    assert not isinstance(fault.value, NoPreference)


def test_the_same_answer_with_two_scores_is_left_to_the_check_of_its_pair() -> None:
    pairs = all_pairs({"prompt": "a", "responses": ["b", "c", "b"], "scores": [3, 2, 1]})
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("b", "c"), ("b", "b"), ("c", "b")]
    with pytest.raises(RowFault, match="identical"):
        check(pairs[1], pairwise=True)


# Verdicts


def pku(first: str, second: str, verdict: int) -> Row:
    answers = {"prompt": "a", "response_0": first, "response_1": second}
    return answers | {"better_response_id": 0 if verdict > 0 else 1}


def reddit(first: str, second: str, verdict: int) -> Row:
    answers = {"history": "a", "human_ref_A": first, "human_ref_B": second}
    return answers | {"labels": 1 if verdict > 0 else 0, "score_A": 1, "score_B": 9}  # what counts is the label


def steer(first: str, second: str, verdict: int) -> Row:
    """Negative where the first is better, from -3 to 3."""
    context = [{"role": "user", "content": "a"}]
    return {"context": context, "response1": first, "response2": second, "overall_preference": -verdict}


def battle(first: str, second: str, verdict: int) -> Row:
    sides = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in (first, second)]
    winner = "tie" if verdict == 0 else "model_a" if verdict > 0 else "model_b"
    return {"conversation_a": sides[0], "conversation_b": sides[1], "winner": winner}


TEXT = Preference("a", "good", "bad")
CHAT = Conversation(({"role": "user", "content": "a"},), "good", "bad")
VERDICTS = [(safe_rlhf, pku, TEXT), (shp, reddit, TEXT), (helpsteer3, steer, CHAT), (arena, battle, CHAT)]


@pytest.mark.parametrize(("format", "write", "wanted"), VERDICTS)
@pytest.mark.parametrize("strength", [1, 2, 3])
def test_a_verdict_says_which_is_better_wherever_it_stands(
    format: Format, write: Callable[[str, str, int], Row], wanted: Preference | Conversation, strength: int
) -> None:
    assert format(write("good", "bad", strength)) == wanted
    assert format(write("bad", "good", -strength)) == wanted


@pytest.mark.parametrize(
    ("format", "row"),
    [
        (helpsteer3, steer("b", "c", 0)),
        *((arena, battle("b", "c", 0) | {"winner": tie}) for tie in ("tie", "tie (bothbad)", "both_bad")),
    ],
)
def test_a_tie_prefers_none(format: Format, row: Row) -> None:
    with pytest.raises(NoPreference, match="tie"):
        format(row)


@pytest.mark.parametrize(
    ("format", "row"),
    [
        (safe_rlhf, pku("b", "c", 1) | {"better_response_id": None}),
        (safe_rlhf, pku("b", "c", 1) | {"better_response_id": "0"}),
        (shp, reddit("b", "c", 1) | {"labels": float("nan")}),
        (helpsteer3, steer("b", "c", 1) | {"overall_preference": None}),
        (helpsteer3, steer("b", "c", 1) | {"context": "a"}),
        (helpsteer3, steer("b", "c", 1) | {"context": []}),
        (arena, battle("b", "c", 1) | {"winner": None}),
        (arena, battle("b", "c", 1) | {"conversation_b": battle("b", "c", 1)["conversation_b"][:1]}),
        (arena, battle("b", "c", 1) | {"conversation_a": battle("b", "c", 1)["conversation_a"] * 2}),
        (arena, {name: said[1:] if name != "winner" else said for name, said in battle("b", "c", 1).items()}),
        (stack_exchange, {"question": "a", "response_j": "b", "response_k": None}),
    ],
)
def test_a_row_without_a_verdict_or_without_one_prompt_is_a_fault(format: Format, row: Row) -> None:
    with pytest.raises(RowFault) as fault:
        format(row)
    assert not isinstance(fault.value, NoPreference)


@pytest.mark.parametrize(
    ("format", "row"),
    [(safe_rlhf, pku("b", "c", 1) | {"better_response_id": number}) for number in (-1, 2, float("inf"))]
    + [(shp, reddit("b", "c", 1) | {"labels": number}) for number in (-1, 2)]
    + [(arena, battle("b", "c", 1) | {"winner": name}) for name in ("", "A", "Model_A", "gpt-4")],
)
def test_a_verdict_for_neither_answer_that_is_no_tie_is_a_fault(format: Format, row: Row) -> None:
    """What the source means by it is not known, so that it must not go by as one answer's or as a tie."""
    with pytest.raises(RowFault) as fault:
        format(row)
    assert not isinstance(fault.value, NoPreference)


@pytest.mark.parametrize("system", [{"system": "Be kind."}, {"system_prompt": "Be kind."}])
@pytest.mark.parametrize(("format", "write"), [(helpsteer3, steer), (arena, battle)])
def test_a_system_text_stands_before_the_prompt_of_a_conversation(
    format: Format, write: Callable[[str, str, int], Row], system: Row
) -> None:
    wanted = Conversation(({"role": "system", "content": "Be kind."}, *CHAT.prompt), "good", "bad")
    assert format(write("good", "bad", 1) | system) == wanted


@pytest.mark.parametrize(("label", "chosen"), [(1, "b"), (0, "c"), (1.0, "b"), (0.0, "c"), (True, "b"), (False, "c")])
def test_a_label_may_be_any_kind_of_number(label: float, chosen: str) -> None:
    assert shp(reddit("b", "c", 1) | {"labels": label}).chosen == chosen
    assert safe_rlhf(pku("b", "c", 1) | {"better_response_id": 1 - label}).chosen == chosen


def test_pairs_of_stack_exchange_have_the_better_answer_first() -> None:
    assert stack_exchange({"question": "a", "response_j": "good", "response_k": "bad", "qid": 1}) == TEXT
