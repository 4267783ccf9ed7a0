"""Formats of rows that hold several answers, with scores, ranks or a verdict between two of them.

What is text in the source stays text; a format of rows that are conversations on the hub gives conversations, which go
through the chat template.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_lightning.data.conversations import split_last, tools_of, turns, with_system
from dpo_lightning.data.preference import (
    Conversation,
    Message,
    NoPreference,
    Preference,
    Preferences,
    RowFault,
    first_of,
    kind,
    number,
    plain,
    text,
)

#: Columns that hold the prompt, the answers, and the figures of the answers, which are better when higher.
PROMPTS = ("prompt", "instruction", "question")
ANSWERS = ("completions", "responses", "answers", "candidates", "generations")
SCORES = ("scores", "rewards", "ratings", "ranks")

#: The same within one answer, where answers are records.
TEXTS = ("response", "answer", "text", "content", "completion")
GRADES = ("overall_score", "score", "reward", "rating", "rank")

#: A prompt as text or as messages.
Prompt = str | tuple[Message, ...]

#: A rank is better when lower.
RANKS = ("rank", "ranks")


def best_worst(row: Mapping[str, Any]) -> Preference:
    """A prompt and several answers with scores or ranks: the best against the worst.

    As in openbmb/UltraFeedback (`instruction`, `completions`), berkeley-nest/Nectar (`prompt`, `answers`), or the
    columns `prompt`, `responses` and `scores`.
    """
    prompt, answers = graded(row)
    ordered = sorted(answers, key=lambda answer: answer[1], reverse=True)
    if ordered[0][1] == ordered[-1][1]:
        raise NoPreference("all answers have the same score")
    return plain(row, prompt, ordered[0][0], ordered[-1][0])


def all_pairs(row: Mapping[str, Any]) -> list[Preference]:
    """The same rows: every answer against every worse one. Never guessed, by name only."""
    prompt, answers = graded(row)
    ordered = sorted(answers, key=lambda answer: answer[1], reverse=True)
    pairs = [
        plain(row, prompt, better, worse)
        for place, (better, high) in enumerate(ordered)
        for worse, low in ordered[place + 1 :]
        if high > low
    ]
    if not pairs:
        raise NoPreference("all answers have the same score")
    return pairs


def graded(row: Mapping[str, Any]) -> tuple[str, list[tuple[str, float]]]:
    """The prompt, and each answer with a figure that is higher when the answer is better.

    Raises:
        RowFault: if there are fewer than two answers, or one has no score.
    """
    column = first_of(row, ANSWERS)
    answers = row.get(column)
    if not isinstance(answers, Sequence) or isinstance(answers, str):
        raise RowFault(f"{column} is {kind(answers)}, expected a list of answers")
    if len(answers) < 2:
        raise RowFault(f"{column} has {len(answers)} answers, expected two or more")
    if all(isinstance(answer, Mapping) for answer in answers):
        grade = first_of(answers[0], GRADES)
        texts = [text(answer, first_of(answer, TEXTS)) for answer in answers]
        figures = [number(answer, grade) for answer in answers]
    else:
        grade = first_of(row, SCORES)
        values = row.get(grade)
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(answers):
            raise RowFault(f"{grade} is {kind(values)}, expected a list of {len(answers)} numbers")
        texts = [text({column: answer}, column) for answer in answers]
        figures = [number({grade: value}, grade) for value in values]
    sign = -1 if grade in RANKS else 1
    return text(row, first_of(row, PROMPTS)), [(a, sign * f) for a, f in zip(texts, figures, strict=True)]


# A verdict between two answers


def safe_rlhf(row: Mapping[str, Any]) -> Preferences:
    """PKU-Alignment/PKU-SafeRLHF: `prompt`, `response_0`, `response_1`, and the number of the better one."""
    first = one_of(row, "better_response_id", {0: 1, 1: -1})
    return verdict(row, text(row, "prompt"), text(row, "response_0"), text(row, "response_1"), first)


def shp(row: Mapping[str, Any]) -> Preferences:
    """stanfordnlp/SHP: `history`, `human_ref_A`, `human_ref_B`, `labels` 1 where A is the better one."""
    first = one_of(row, "labels", {1: 1, 0: -1})
    return verdict(row, text(row, "history"), text(row, "human_ref_A"), text(row, "human_ref_B"), first)


def stack_exchange(row: Mapping[str, Any]) -> Preference:
    """lvwerra/stack-exchange-paired: `question`, `response_j` better than `response_k`."""
    return plain(row, text(row, "question"), text(row, "response_j"), text(row, "response_k"))


def helpsteer3(row: Mapping[str, Any]) -> Preferences:
    """nvidia/HelpSteer3: `context` as messages, `response1`, `response2`, `overall_preference` < 0 for the first."""
    prompt = with_system(row, turns(row.get("context"), "context"))
    return verdict(row, prompt, text(row, "response1"), text(row, "response2"), -number(row, "overall_preference"))


def arena(row: Mapping[str, Any]) -> Preferences:
    """LMArena's human preferences: `conversation_a`, `conversation_b` and `winner`: model_a, model_b or a tie."""
    (prompt, first), (other, second) = (split_last(row, f"conversation_{name}", None) for name in "ab")
    if prompt != other:
        raise RowFault("the two conversations differ before their last message")
    prompt = with_system(row, prompt)
    winners = {"model_a": 1, "model_b": -1, "tie": 0, "tie (bothbad)": 0, "both_bad": 0}
    return verdict(row, prompt, first, second, one_of(row, "winner", winners))


def one_of(row: Mapping[str, Any], column: str, known: Mapping[Any, int]) -> int:
    """What a verdict means; raises RowFault for one that is not known."""
    value = row.get(column)
    if not isinstance(value, str | int | float) or value not in known:
        raise RowFault(f"{column} is {value!r}, expected one of {', '.join(map(str, known))}")
    return known[value]


def verdict(
    row: Mapping[str, Any], prompt: Prompt, first: str, second: str, preference: float
) -> Preference | Conversation:
    """The better of two answers against the other; `preference` is above 0 where the first one is better.

    Raises:
        NoPreference: if it is 0.
    """
    if preference == 0:
        raise NoPreference("a tie: neither answer is preferred")
    chosen, rejected = (first, second) if preference > 0 else (second, first)
    if isinstance(prompt, str):
        return plain(row, prompt, chosen, rejected)
    return Conversation(prompt, chosen, rejected, tools_of(row))
