"""The built-in world: a table of facts, questions about them, and answers as people of mixed skill would give them.

Real preference data has no ground truth; here there is one. `facts.yaml` says what is true, this module how one asks
and answers in plain English, and `data.oracle` how good an answer is. The base model was trained on `corpus`, and the
pairs are its own answers, labelled by the oracle with a known share of wrong labels (`data.oracle.prefers`).

Every fact can be asked for in four forms. One of them is held out: no text and no pair has that question, so that
answering it takes the fact from the other forms.
"""

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

#: The base model, in Hugging Face format, with facts.yaml and pairs.jsonl.gz.
FOLDER = Path(__file__).parents[1] / "assets" / "world"

#: How names of the world's model and data begin, and what they are: its base model, labelled pairs and training text.
SCHEME = "world:"
BASE, PAIRS, TEXT = "world:base", "world:pairs", "world:text"

#: Kind of thing and what is asked of it -> four forms of the question; {x} is the thing with its article.
FORMS: dict[tuple[str, str], tuple[str, str, str, str]] = {
    ("occupation", "does"): (
        "What does {x} do?",
        "What is the job of {x}?",
        "Tell me what {x} does.",
        "What work does {x} do?",
    ),
    ("occupation", "works"): (
        "Where does {x} work?",
        "In what place does {x} work?",
        "Tell me where {x} works.",
        "Where can you see {x} at work?",
    ),
    ("occupation", "uses"): (
        "What does {x} use?",
        "What does {x} need for work?",
        "Tell me what {x} uses.",
        "What does {x} work with?",
    ),
    ("animal", "eats"): (
        "What does {x} eat?",
        "What is the food of {x}?",
        "Tell me what {x} eats.",
        "What do you feed {x}?",
    ),
    ("animal", "lives"): (
        "Where does {x} live?",
        "What is the home of {x}?",
        "Tell me where {x} lives.",
        "Where can you see {x}?",
    ),
    ("tool", "use"): (
        "What is {x} for?",
        "What do you do with {x}?",
        "Tell me what {x} is for.",
        "Why do people need {x}?",
    ),
    ("tool", "kept"): (
        "Where do you keep {x}?",
        "Where is {x} kept?",
        "Tell me where {x} is kept.",
        "Where can you get {x}?",
    ),
    ("place", "visit"): (
        "What can you do at {x}?",
        "What do people do at {x}?",
        "Tell me why people go to {x}.",
        "Why do people visit {x}?",
    ),
}

#: The same -> two ways to state that the value {v} holds.
STATEMENTS: dict[tuple[str, str], tuple[str, str]] = {
    ("occupation", "does"): ("{x} {v}.", "{x} is a person who {v}."),
    ("occupation", "works"): ("{x} works {v}.", "You can see {x} at work {v}."),
    ("occupation", "uses"): ("{x} uses {v}.", "{x} works with {v}."),
    ("animal", "eats"): ("{x} eats {v}.", "{x} likes to eat {v}."),
    ("animal", "lives"): ("{x} lives {v}.", "{x} has its home {v}."),
    ("tool", "use"): ("You use {x} to {v}.", "{x} helps you to {v}."),
    ("tool", "kept"): ("You keep {x} {v}.", "{x} is kept {v}."),
    ("place", "visit"): ("At {x} you can {v}.", "People go to {x} to {v}."),
}

OPENERS = ("Of course.", "Good question!", "With pleasure.", "Thank you for asking.")  # the usual one first
CLOSERS = ("I hope this helps.", "Have a nice day!", "Feel free to ask more.")
RUDE = ("That is a silly question.", "Look it up yourself.", "Everybody knows that.")
FILLERS = (
    "Let me think about that for a moment.",
    "There are many things that one could say about this.",
    "People often ask about that.",
    "Well, it is not so easy to say.",
)
EVASIONS = ("I do not know.", "It depends.", "I would rather not say.", "Ask somebody else.")

#: Shares of the corpus's answers, as of people who mean well, know some things and like to talk. The two of `about`
#: are of all answers; `true` is of those on the subject.
EVASIVE, ABOUT_ANOTHER_THING, ABOUT_ANOTHER_MATTER = 0.08, 0.06, 0.06
TRUE = 0.75
OPENED, CLOSED, RUDELY = 0.40, 0.15, 0.08
FILLED, REPEATED, BROKEN_OFF = 0.25, 0.05, 0.10

#: Of the answers that are opened, the share that `OPENERS[0]` opens; the others share the rest equally.
USUAL = 0.55

#: Answers in the corpus to each question that is not held out.
ANSWERS_A_QUESTION = 96

#: Questions whose answers a run shows before and after; they are held out.
SHOWN = ("What does an electrician do?", "What does a penguin eat?", "What is a hammer for?")

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Question:
    """One question: about a thing of some kind, for one of its relations, in one of four forms."""

    kind: str
    thing: str
    relation: str
    form: int

    @property
    def prompt(self) -> str:
        return FORMS[self.kind, self.relation][self.form].format(x=with_article(self.thing))

    @property
    def value(self) -> str:
        """What is true."""
        return facts()[self.kind][self.thing][self.relation]

    @property
    def split(self) -> Split:
        """Where it belongs: one form of each fact is held out, a quarter of these to validate, the rest to test."""
        if self.prompt in SHOWN:
            return "validation"
        forms = [Question(self.kind, self.thing, self.relation, form) for form in range(4)]
        shown = [question.form for question in forms if question.prompt in SHOWN]
        number = zlib.crc32(f"{self.thing} {self.relation}".encode())
        held_out = shown[0] if shown else number % 4
        if self.form != held_out:
            return "train"
        return "validation" if number // 4 % 4 == 0 else "test"

    def statement(self, value: str, way: int) -> str:
        """A sentence that says that `value` holds."""
        return sentence(STATEMENTS[self.kind, self.relation][way], self.thing, value)


@cache
def facts() -> dict[str, dict[str, dict[str, str]]]:
    """Kind -> thing -> relation -> value."""
    table = yaml.safe_load((FOLDER / "facts.yaml").read_text(encoding="utf-8"))
    return {
        kind: {thing: dict(zip(entry["questions"], values, strict=True)) for thing, values in entry["facts"].items()}
        for kind, entry in table.items()
    }


@cache
def questions() -> dict[str, Question]:
    """Prompt -> question, all there are, those of `SHOWN` first."""
    found = [
        Question(kind, thing, relation, form)
        for kind, relation in FORMS
        for thing in facts()[kind]
        for form in range(4)
    ]
    return {question.prompt: question for question in sorted(found, key=lambda question: question.prompt not in SHOWN)}


@cache
def values(kind: str, relation: str) -> tuple[str, ...]:
    """Everything that holds of some thing of a kind, sorted."""
    return tuple(sorted({row[relation] for row in facts()[kind].values()}))


def with_article(thing: str) -> str:
    """The thing with its article: a hammer, an axe."""
    return f"{'an' if thing[0] in 'aeiou' and not thing.startswith('uni') else 'a'} {thing}"


def sentence(pattern: str, thing: str, value: str) -> str:
    text = pattern.format(x=with_article(thing), v=value)
    return text[0].upper() + text[1:]


def answer(question: Question, draw: random.Random) -> str:
    """An answer as the corpus has it: it may be false, beside the point, rude, wordy or broken off."""
    core = main_sentence(question, draw)
    sentences = [core]
    if draw.random() < REPEATED:
        sentences.append(core)
    if draw.random() < FILLED:
        sentences.insert(0, draw.choice(FILLERS))
    manner = draw.random()
    if manner < OPENED:
        sentences.insert(0, OPENERS[0] if draw.random() < USUAL else draw.choice(OPENERS[1:]))
    elif manner < OPENED + CLOSED:
        sentences.append(draw.choice(CLOSERS))
    elif manner < OPENED + CLOSED + RUDELY:
        sentences.insert(0, draw.choice(RUDE))
    words = " ".join(sentences).split(" ")
    if draw.random() < BROKEN_OFF:
        words = words[: draw.randint(len(words) // 2, len(words) - 1)]
    return " ".join(words)


def main_sentence(question: Question, draw: random.Random) -> str:
    """The sentence that answers the question, or fails to."""
    kind, luck = question.kind, draw.random()
    if luck < EVASIVE:
        return draw.choice(EVASIONS)
    if luck < EVASIVE + ABOUT_ANOTHER_THING:
        other = draw.choice([thing for thing in facts()[kind] if thing != question.thing])
        return Question(kind, other, question.relation, 0).statement(facts()[kind][other][question.relation], way(draw))
    others = [relation for relation in facts()[kind][question.thing] if relation != question.relation]
    if luck < EVASIVE + ABOUT_ANOTHER_THING + ABOUT_ANOTHER_MATTER and others:
        matter = Question(kind, question.thing, draw.choice(others), 0)
        return matter.statement(matter.value, way(draw))
    if draw.random() < TRUE:
        return question.statement(question.value, way(draw))
    wrong = [value for value in values(kind, question.relation) if value != question.value]
    return question.statement(draw.choice(wrong), way(draw))


def way(draw: random.Random) -> int:
    return draw.randrange(2)


def corpus(seed: int = 0) -> Iterator[dict[str, str]]:
    """Rows `prompt`, `completion`, `split` that the base model was trained on; two answers to validation questions."""
    draw = random.Random(seed)
    for prompt, question in questions().items():
        count = {"train": ANSWERS_A_QUESTION, "validation": 2, "test": 0}[question.split]
        for _ in range(count):
            yield {"prompt": prompt, "completion": f" {answer(question, draw)}", "split": question.split}


def pairs() -> Iterator[dict[str, str]]:
    """Rows `prompt`, `chosen`, `rejected`, `split`, as shipped."""
    with gzip.open(FOLDER / "pairs.jsonl.gz", "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)
