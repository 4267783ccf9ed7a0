"""How good an answer to a question of the built-in world truly is: any text gets a number from 0 to 1.

An answer is read sentence by sentence. A sentence of the world's grammar is looked up; any other is understood if it
reads much like the grammar and claims one value of the thing that was asked about, in no words but the grammar's own.
The reward adds up what the answer achieves and multiplies by the share of it that is English:

    reward = fluency * (0.15 finished + 0.15 on_subject + 0.40 true + 0.15 polite + 0.15 concise)

`true`, `polite` and `concise` count only for an answer on the subject, so that courtesy alone earns nothing. What is
not understood is not on the subject, so that nothing can be added to a good answer to make it better or to deny it. And
a sentence that is said twice is not English the second time, so that saying more of it earns less.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise

from dpo_lightning.data.world import (
    CLOSERS,
    EVASIONS,
    FILLERS,
    OPENERS,
    RUDE,
    STATEMENTS,
    Question,
    facts,
    questions,
    sentence,
    values,
)
from dpo_lightning.errors import InputError

#: (prompt, answer) -> what is known of the answer; `true_reward` is always among it.
Oracle = Callable[[str, str], Mapping[str, float]]

WEIGHTS = {"finished": 0.15, "on_subject": 0.15, "true": 0.40, "polite": 0.15, "concise": 0.15}

#: Difference of rewards at which the better answer is preferred with odds of e to 1.
TEMPERATURE = 0.05

#: Words of the longest answer that can be concise.
CONCISE = 24

#: Words that a sentence may have twice, and that change nothing of what it claims.
SMALL_WORDS = frozenset({"a", "an", "the", "to", "of", "in", "at", "is", "and", "you", "course"})


@dataclass(frozen=True)
class Claim:
    """That `value` holds of a thing."""

    thing: str
    relation: str
    value: str


@dataclass(frozen=True)
class Reading:
    """What one sentence is: `manner` is claim, polite, rude, beside (the point), broken (off), again (what was said
    before), free (a claim in words of its own) or obscure; fluency from 0 to 1."""

    manner: str
    claims: frozenset[Claim] = frozenset()
    fluency: float = 1.0


@dataclass(frozen=True)
class Judgement:
    """What an answer achieves; all but `fluency` are 0 or 1.

    Attributes:
        finished: its last sentence is complete.
        on_subject: it claims something about the thing and the matter asked for, nothing about any other, and has no
            sentence that cannot be understood.
        true: on the subject, and every claim is true.
        polite: on the subject, with one or two polite phrases and no rude one.
        concise: on the subject, in one claim and at most 24 words, with nothing beside the point or said twice.
        fluency: share of its words in sentences of the grammar. Words of another sentence count half, by the share of
            its neighbouring words that are neighbours in the grammar; not at all if it repeats words. A last sentence
            broken off is left out of the count. A symbol counts as a word.
    """

    finished: float
    on_subject: float
    true: float
    polite: float
    concise: float
    fluency: float

    @property
    def good(self) -> float:
        """1 if it is true, on the subject and finished, and all of it English."""
        return float(self.finished == self.true == self.fluency == 1)

    @property
    def reward(self) -> float:
        return round(self.fluency * sum(weight * getattr(self, name) for name, weight in WEIGHTS.items()), 6)


def true_reward(prompt: str, answer: str) -> float:
    """The reward of any text as an answer to a question of the world, from 0 to 1.

    Raises:
        ValueError: if the prompt is no question of the world.

    >>> true_reward("What does an electrician do?", "Of course. An electrician repairs wires.")
    1.0
    >>> true_reward("What does an electrician do?", "An electrician bakes bread.")
    0.45
    >>> true_reward("What does an electrician do?", "Of course. Of course. Of course.")
    0.05
    """
    return judge(prompt, answer).reward


def figures(prompt: str, answer: str) -> dict[str, float]:
    """What the `test` verb reports of an answer: `true_reward`, `good`, and each part of the judgement.

    Raises:
        ValueError: if the prompt is no question of the world.
    """
    judgement = judge(prompt, answer)
    return {"true_reward": judgement.reward, "good": judgement.good} | asdict(judgement)


def prefers(first: float, second: float) -> float:
    """Probability that the first of two answers with these rewards is preferred: the known noise of the labels.

    Bradley and Terry 1952, as in Rafailov et al. 2023, eq. 1, with rewards divided by `TEMPERATURE`.

    >>> round(prefers(1.0, 0.85), 3)
    0.953
    """
    return 1 / (1 + math.exp((second - first) / TEMPERATURE))


def best_accuracy(rows: Iterable[Mapping[str, str]]) -> float:
    """Expected accuracy of one who knows every reward, on pairs labelled by `prefers`: nobody can have a higher one.

    Args:
        rows: with `prompt`, `chosen` and `rejected`.
    """
    chances = [
        prefers(true_reward(row["prompt"], row["chosen"]), true_reward(row["prompt"], row["rejected"])) for row in rows
    ]
    return sum(max(chance, 1 - chance) for chance in chances) / len(chances)


def named(name: str) -> Oracle:
    """An oracle of the user's own.

    Args:
        name: import path of a function (prompt, answer) -> true reward, or -> figures with `true_reward` among them.

    Raises:
        InputError: if there is no such function.
    """
    module, _, attribute = name.rpartition(".")
    try:
        function = getattr(import_module(module), attribute)
        if not callable(function):
            raise TypeError(f"it is of type {type(function).__name__}")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"data.oracle: {name!r} is not the import path of a function (prompt, answer) -> float: {error}"
        ) from error

    names: frozenset[str] = frozenset()  # of the first answer's figures

    def judged(prompt: str, answer: str) -> Mapping[str, float]:
        nonlocal names
        try:
            found = function(prompt, answer)
            found = found if isinstance(found, Mapping) else {"true_reward": found}
            found = {key: float(value) for key, value in found.items()}
            names = names or frozenset(found)
            if names != set(found) or "true_reward" not in found or not all(map(math.isfinite, found.values())):
                raise ValueError(f"expected finite figures, true_reward among them and the same each time, got {found}")
            return found
        except Exception as error:  # whatever the user's function may raise
            raise InputError(
                f"data.oracle {name} failed at the prompt {prompt!r} with {type(error).__name__}: {error}; mend it, or "
                "leave data.oracle out"
            ) from error

    return judged


def judge(prompt: str, answer: str) -> Judgement:
    """Read an answer.

    Raises:
        ValueError: if the prompt is no question of the world.
    """
    question = questions().get(prompt.strip())
    if question is None:
        raise ValueError(f"{prompt!r} is no question of the built-in world, so nobody knows a true answer to it")
    sentences = [found.strip() for found in re.findall(r"[^.!?]*[.!?]+|[^.!?]+$", answer)]
    sentences = [found for found in sentences if re.search(r"[^\s.!?,]", found)]
    readings: list[Reading] = []
    lengths: list[int] = []
    heard: set[str] = set()
    for text in sentences:
        words = re.findall(r"[\w']+|[^\w\s.!?,]", text.lower())
        plain = " ".join(words)
        again = plain in heard
        heard.add(plain)
        readings.append(Reading("again", fluency=0.0) if again else read(words, text[-1] in ".!?", question))
        lengths.append(0 if readings[-1].manner == "broken" else len(words))
    claims = frozenset().union(*(reading.claims for reading in readings))
    manners = [reading.manner for reading in readings]
    subjects = {(claim.thing, claim.relation) for claim in claims}
    on_subject = subjects == {(question.thing, question.relation)} and "obscure" not in manners
    heard_words = sum(length * reading.fluency for length, reading in zip(lengths, readings, strict=True))
    return Judgement(
        finished=float(bool(sentences) and sentences[-1][-1] in ".!?"),
        on_subject=float(on_subject),
        true=float(on_subject and {claim.value for claim in claims} == {question.value}),
        polite=float(on_subject and 1 <= manners.count("polite") <= 2 and "rude" not in manners),
        concise=float(
            on_subject and manners.count("claim") == 1 and set(manners) <= {"claim", "polite", "broken"}
            and sum(lengths) <= CONCISE
        ),
        fluency=heard_words / max(sum(lengths), 1),
    )  # fmt: skip


def read(words: list[str], complete: bool, question: Question) -> Reading:
    """What a sentence says, by the grammar if it is of it."""
    plain = " ".join(words)
    known = grammar().get(plain)
    if known is not None:
        return known
    if not complete and begins_a_sentence(plain):
        return Reading("broken")
    large = [word for word in without(plain, question.thing).split() if word not in SMALL_WORDS]
    neighbours = [pair in known_neighbours() for pair in pairwise(words)]
    likeness = sum(neighbours) / len(neighbours) if neighbours and len(set(large)) == len(large) else 0.0
    value = claimed_value(plain, question) if likeness > 0.5 else None
    if value is None:
        return Reading("obscure", fluency=0.5 * likeness)
    return Reading("free", frozenset({Claim(question.thing, question.relation, value)}), 0.5 * likeness)


def claimed_value(plain: str, question: Question) -> str | None:
    """The one value that a sentence of no known form claims of the thing asked about; None if it is not clear.

    Every other word must be of the question's own statements, or small: any other might deny it.
    """
    longer = [name for name in facts()[question.kind] if mentions(name, question.thing) and name != question.thing]
    if not mentions(plain, question.thing) or any(mentions(plain, name) for name in longer):
        return None
    rest = without(plain, question.thing)
    named = [value for value in values(question.kind, question.relation) if mentions(rest, value)]
    if len(named) != 1:
        return None
    patterns = STATEMENTS[question.kind, question.relation]
    common = SMALL_WORDS.union(*(as_words(pattern.format(x="", v="")).split() for pattern in patterns))
    return named[0] if common.issuperset(without(rest, named[0]).split()) else None


def without(text: str, phrase: str) -> str:
    """`text` less the first place where the words of `phrase` stand together; a gap marks it."""
    return f" {text} ".replace(f" {phrase} ", "  ", 1)


def mentions(text: str, phrase: str) -> bool:
    """Whether the words of `phrase` stand together in `text`."""
    return f" {phrase} " in f" {text} "


@cache
def grammar() -> dict[str, Reading]:
    """Every sentence that the world can say, in lower case and without punctuation -> what it is."""
    found: dict[str, Reading] = {}
    for manner, phrases in (("polite", OPENERS + CLOSERS), ("rude", RUDE), ("beside", FILLERS + EVASIONS)):
        found |= {as_words(phrase): Reading(manner) for phrase in phrases}
    for (kind, relation), patterns in STATEMENTS.items():
        for pattern in patterns:
            for thing in facts()[kind]:
                for value in values(kind, relation):
                    claim = Reading("claim", frozenset({Claim(thing, relation, value)}))
                    found[as_words(sentence(pattern, thing, value))] = claim
    return found


def as_words(text: str) -> str:
    return " ".join(re.findall(r"[\w']+", text.lower()))


@cache
def sorted_sentences() -> list[str]:
    return sorted(grammar())


def begins_a_sentence(text: str) -> bool:
    """Whether a sentence of the grammar goes on from `text`, which may end inside a word."""
    place = bisect_left(sorted_sentences(), text)
    return place < len(grammar()) and sorted_sentences()[place].startswith(text)


@cache
def known_neighbours() -> frozenset[tuple[str, str]]:
    """Pairs of words that follow each other in some sentence of the grammar."""
    return frozenset(pair for text in grammar() for pair in pairwise(text.split()))
