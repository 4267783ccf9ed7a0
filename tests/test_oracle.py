"""The oracle of the built-in world against its formula, worked by hand, and against texts that would deceive it.

`expected` is a second oracle, for texts that were put together from sentences of the grammar: it is told what they are
and need not read them. What lies outside the grammar has its reward written out, or is held to a law: a falsehood has
0.6 at most, a sentence outside the grammar 0.35, and nothing is as good as the plain best answer but its like.

    reward = fluency * (0.15 finished + 0.15 on_subject + 0.40 true + 0.15 polite + 0.15 concise)
"""

import itertools
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dpo_lightning.data import oracle
from dpo_lightning.data.oracle import best_accuracy, figures, named, prefers, true_reward
from dpo_lightning.data.world import (
    CLOSERS,
    EVASIONS,
    FILLERS,
    FORMS,
    OPENERS,
    RUDE,
    Question,
    facts,
    questions,
    values,
)
from dpo_lightning.errors import InputError

laws = settings(deadline=None, max_examples=150)

ASKED = "What does an electrician do?"
TRUTH, TRUTH_AGAIN = "An electrician repairs wires.", "An electrician is a person who repairs wires."
FALSE, FALSE_AGAIN = "An electrician bakes bread.", "An electrician is a person who bakes bread."
OTHER_THING, OTHER_MATTER = "A baker bakes bread.", "An electrician works in a house."
BEST = f"Of course. {TRUTH}"

#: Parts of the reward.
FINISHED = ON_SUBJECT = POLITE = CONCISE = 0.15
TRUE = 0.40


def reward(answer: str) -> float:
    return true_reward(ASKED, answer)


def every_fact() -> Iterator[Question]:
    """One question for each."""
    for kind, relation in FORMS:
        for number, thing in enumerate(facts()[kind]):
            yield Question(kind, thing, relation, number % 4)


# Rewards by hand

BY_HAND = {
    # plain: finished, on the subject, true, concise
    TRUTH: 0.85,
    TRUTH_AGAIN: 0.85,
    # with one or two polite phrases, before or after
    BEST: 1.0,
    f"{TRUTH} Have a nice day!": 1.0,
    f"Thank you for asking. {TRUTH} Feel free to ask more.": 1.0,
    f"Of course. Good question! {TRUTH}": 1.0,
    # three: no longer polite; with more than 24 words nor concise
    f"Of course. With pleasure. {TRUTH} I hope this helps.": 0.85,
    f"Of course. Good question! Thank you for asking. {TRUTH_AGAIN} I hope this helps. Have a nice day!": 0.85,
    f"Of course. Good question! Thank you for asking. {TRUTH_AGAIN} I hope this helps. Feel free to ask more.": 0.70,
    # rude: 0.15 + 0.15 + 0.40
    f"Look it up yourself. {TRUTH}": 0.70,
    f"Of course. {TRUTH} Everybody knows that.": 0.70,
    # wordy: polite, but not concise
    f"People often ask about that. {TRUTH}": 0.70,
    f"Of course. People often ask about that. {TRUTH}": 0.85,
    f"Of course. {TRUTH} It depends.": 0.85,
    # said in both ways: two claims
    f"{TRUTH} {TRUTH_AGAIN}": 0.70,
    f"Of course. {TRUTH} {TRUTH_AGAIN}": 0.85,
    # said twice in one way: half of the words, or 6 of 10, are English: 0.5 * 0.7; 0.6 * 0.85
    f"{TRUTH} {TRUTH}": 0.35,
    f"Of course. {TRUTH} {TRUTH}": 0.51,
    # unfinished
    TRUTH[:-1]: 0.70,
    BEST[:-1]: 0.85,
    f"{TRUTH} An electrician is": 0.70,
    f"{TRUTH} An electrician is a person who bakes": 0.70,
    f"Of course. {TRUTH} Feel fr": 0.85,
    # broken off before it says anything: no words that count, or polite ones that are not on the subject
    "An electrician": 0.0,
    "An electrician repairs": 0.0,
    "Of course. An electrician repairs": 0.0,
    # false: finished, on the subject, concise
    FALSE: 0.45,
    f"Of course. {FALSE}": 0.60,
    FALSE[:-1]: 0.30,
    f"{FALSE} {FALSE_AGAIN}": 0.30,
    # true and false: two claims, not both true
    f"{TRUTH} {FALSE}": 0.30,
    f"{FALSE} {TRUTH}": 0.30,
    f"Of course. {TRUTH} {FALSE}": 0.45,
    # off the subject, by all or by a part: finished
    OTHER_THING: 0.15,
    f"Of course. {OTHER_THING}": 0.15,
    OTHER_MATTER: 0.15,
    f"{TRUTH} {OTHER_THING}": 0.15,
    f"{TRUTH} {OTHER_MATTER}": 0.15,
    "A hammer is kept in a toolbox.": 0.15,
    # nothing claimed
    "I do not know.": 0.15,
    "Of course. I do not know. Have a nice day!": 0.15,
    "That is a silly question.": 0.15,
    "Of course.": 0.15,
    "Of course": 0.0,
    "Of course. Of course.": 0.075,
    "Of course. Of course. Of course.": 0.05,
    # denials: the words are 1/2 * 2/4 and 1/2 * 5/8 English, and not understood
    "An electrician never repairs wires.": 0.25 * 0.15,
    "It is not true that an electrician repairs wires.": 0.3125 * 0.15,
    # 1/2 * 1/5 English ("an electrician"), and "repair wires" is no value: finished
    "An electrician does not repair wires.": 0.1 * 0.15,
    # the truth in words that are not all of the grammar: 1/2 * 1, 1/2 * 4/5, 1/2 * 2/3
    "Electrician repairs wires.": 0.5 * 0.70,
    "Of course, an electrician repairs wires.": 0.4 * 0.70,
    "A electrician repairs wires.": 0.333333 * 0.70,
    # a polite phrase inside a sentence is none: 1/2 * 4/5
    "An electrician of course repairs wires.": 0.3 * 0.70,
    "An electrician repairs wires of course.": 0.4 * 0.70,
    # one word of five is none, and nobody knows what it says
    f"{TRUTH} Wires.": 0.8 * 0.15,
    # nothing at all
    "": 0.0,
    " \t\r\n\u00a0\u3000": 0.0,
    ".": 0.0,
    "?!... !!": 0.0,
    "\0": 0.0,
    "<|endoftext|>": 0.0,
    "</s>": 0.0,
    "\u202e\u200b\ufeff\ud800": 0.0,
    "Pilot pilot pilot.": 0.0,
    "Electrician electrician wires wires.": 0.0,
    "東京は日本の首都です。": 0.0,
}


@pytest.mark.parametrize(("answer", "by_hand"), BY_HAND.items(), ids=map(ascii, BY_HAND))
def test_the_reward_is_the_formulas(answer: str, by_hand: float) -> None:
    assert reward(answer) == pytest.approx(by_hand, abs=2e-6)


def test_concise_is_up_to_24_words() -> None:
    """Three polite phrases more than are polite, so that 0.15 for conciseness is all there is to lose."""
    asked, statement = "Where does a police officer work?", "You can see a police officer at work on the street."  # 11
    phrases = "Thank you for asking. I hope this helps. Feel free to ask more."  # 4 + 4 + 5
    assert true_reward(asked, f"{statement} {phrases}") == 0.85
    assert (
        true_reward(asked, f"{statement} {phrases.replace('I hope this helps.', 'Have a nice day! Of course.')}") == 0.7
    )
    assert (
        true_reward(asked, f"Of course. With pleasure. {statement} I hope this helps. Feel free to ask more.") == 0.85
    )
    assert true_reward(asked, f"Thank you for asking. Of course. {statement} {phrases[22:]}") == 0.7


@pytest.mark.parametrize("times", [2, 5, 50, 1000])
def test_a_true_sentence_repeated_counts_once(times: int) -> None:
    assert reward(" ".join([TRUTH] * times)) == pytest.approx(0.70 / times, abs=1e-6)


@pytest.mark.parametrize("times", [2, 5, 50, 1000])
@pytest.mark.parametrize("phrase", OPENERS + CLOSERS + FILLERS + EVASIONS + RUDE)
def test_courtesy_alone_earns_less_and_less(phrase: str, times: int) -> None:
    assert reward(phrase) == 0.15
    assert reward(" ".join([phrase] * times)) == pytest.approx(0.15 / times, abs=1e-6)


def test_all_that_may_be_true_is_not_true() -> None:
    """Whoever says everything says the truth among it: finished, on the subject."""
    question = questions()[ASKED]
    known = values("occupation", "does")
    for some in (2, 3, 10, len(known)):
        said = sorted(known, key=lambda value: value != question.value)[:some]
        assert reward(" ".join(question.statement(value, 0) for value in said)) == 0.30
        assert reward(f"An electrician {', '.join(said)}.") <= 0.15
        assert reward(f"An electrician {' and '.join(said)}.") <= 0.15


def test_the_facts_of_all_things_are_off_the_subject() -> None:
    """Finished, and English."""
    everything = [question.statement(question.value, 0) for question in every_fact() if question.relation == "does"]
    assert TRUTH in everything
    assert reward(" ".join(everything)) == 0.15


@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        str.lower,
        str.title,
        lambda text: text.replace(" ", "  \n\t "),
        lambda text: f"\r\n {text}\n\n",
        lambda text: text.replace(". ", "."),
        lambda text: text.replace(".", "!"),
        lambda text: text.replace(".", " . . ."),
        lambda text: text.replace(" ", "\u00a0"),
    ],
)
def test_letters_white_space_and_stops_do_not_count(change: Callable[[str], str]) -> None:
    for answer in (BEST, FALSE, f"{TRUTH} {OTHER_THING}", "Of course. I do not know."):
        assert reward(change(answer)) == reward(answer)


@pytest.mark.parametrize("prompt", [f" {ASKED}\n", f"\t{ASKED}  "])
def test_white_space_around_the_prompt_does_not_count(prompt: str) -> None:
    assert true_reward(prompt, BEST) == 1.0


@pytest.mark.parametrize(
    "prompt", ["", "?", ASKED[:-1], ASKED.lower(), "What does a dragon do?", f"{ASKED} {ASKED}", "\0"]
)
@pytest.mark.parametrize("ask", [true_reward, figures])
def test_a_prompt_that_is_no_question_of_the_world_is_an_error_that_names_it(
    ask: Callable[[str, str], object], prompt: str
) -> None:
    with pytest.raises(ValueError, match="no question of the built-in world") as error:
        ask(prompt, BEST)
    assert repr(prompt) in str(error.value)


# A second oracle, for texts of the grammar


@dataclass(frozen=True)
class Said:
    """A sentence, and whether it is polite, rude, beside the point, or true, false or off the subject."""

    text: str
    manner: str


def expected(sentences: Sequence[Said], finished: bool) -> float:
    """The reward by the formula, of whole sentences; the last may lack its full stop."""
    first_times = [said not in sentences[:place] for place, said in enumerate(sentences)]
    heard = [said.manner for said, first in zip(sentences, first_times, strict=True) if first]
    lengths = [len(said.text.split()) for said in sentences]
    fluency = sum(itertools.compress(lengths, first_times)) / sum(lengths)
    claims = [manner for manner in heard if manner in ("true", "false", "off")]
    parts = FINISHED * finished
    if claims and "off" not in claims:
        parts += ON_SUBJECT
        parts += TRUE * ("false" not in claims)
        parts += POLITE * (1 <= heard.count("polite") <= 2 and "rude" not in heard)
        parts += CONCISE * (
            all(first_times)
            and len(claims) == 1
            and all(manner in ("polite", *claims) for manner in heard)
            and sum(lengths) <= 24
        )
    return fluency * parts


PHRASES = {"polite": OPENERS + CLOSERS, "rude": RUDE, "beside": FILLERS + EVASIONS}


@st.composite
def talks(draw: st.DrawFn) -> tuple[str, list[Said]]:
    """A question and sentences of the grammar; its own subject often, so that they often answer it."""
    question = draw(st.sampled_from(ALL_QUESTIONS))

    def phrase() -> Said:
        manner = draw(st.sampled_from(["polite", "polite", "rude", "beside"]))
        return Said(draw(st.sampled_from(PHRASES[manner])), manner)

    def answer() -> Said:
        value = draw(st.one_of(st.just(question.value), st.sampled_from(values(question.kind, question.relation))))
        text = question.statement(value, draw(st.integers(0, 1)))
        return Said(text, "true" if value == question.value else "false")

    def anything() -> Said:
        kind, relation = draw(st.sampled_from(sorted(FORMS)))
        about = Question(kind, draw(st.sampled_from(sorted(facts()[kind]))), relation, 0)
        value = draw(st.sampled_from(values(kind, relation)))
        assume((about.thing, relation) != (question.thing, question.relation))
        return Said(about.statement(value, draw(st.integers(0, 1))), "off")

    makers = draw(st.lists(st.sampled_from([phrase, phrase, answer, answer, anything]), min_size=1, max_size=6))
    said = [maker() for maker in makers]
    if draw(st.booleans()):
        said.append(draw(st.sampled_from(said)))
    return question.prompt, said


ALL_QUESTIONS = list(questions().values())


@given(talk=talks(), stop=st.booleans())
@settings(laws, max_examples=400)
def test_a_text_of_the_grammar_has_the_reward_of_what_it_says(talk: tuple[str, list[Said]], stop: bool) -> None:
    prompt, said = talk
    text = " ".join(sentence.text for sentence in said)
    found = true_reward(prompt, text if stop else text[:-1])
    assert found == pytest.approx(expected(said, stop), abs=1e-6)
    assert found <= 1


def test_no_two_claims_read_the_same() -> None:
    """A sentence that could be understood in two ways would be true by chance."""
    seen: dict[str, tuple[str, str, str]] = {}
    for question in every_fact():
        for value in values(question.kind, question.relation):
            for way in (0, 1):
                claim = (question.thing, question.relation, value)
                assert seen.setdefault(question.statement(value, way).lower(), claim) == claim


def test_the_figures_are_the_reward_and_its_parts() -> None:
    assert figures(ASKED, BEST) == {
        "true_reward": 1.0,
        "good": 1.0,
        "finished": 1.0,
        "on_subject": 1.0,
        "true": 1.0,
        "polite": 1.0,
        "concise": 1.0,
        "fluency": 1.0,
    }
    half = figures(ASKED, f"{FALSE} {FALSE}")
    assert half == dict.fromkeys(half, 0.0) | {"true_reward": 0.15, "finished": 1.0, "on_subject": 1.0, "fluency": 0.5}


@given(talk=talks(), stop=st.booleans())
@laws
def test_figures_multiply_and_add_to_the_reward(talk: tuple[str, list[Said]], stop: bool) -> None:
    prompt, said = talk
    text = " ".join(sentence.text for sentence in said)
    found = figures(prompt, text if stop else text[:-1])
    parts = sum(
        weight * found[name]
        for name, weight in {"finished": 0.15, "on_subject": 0.15, "true": 0.4, "polite": 0.15, "concise": 0.15}.items()
    )
    assert found["true_reward"] == true_reward(prompt, text if stop else text[:-1])
    assert found["true_reward"] == pytest.approx(found["fluency"] * parts, abs=1e-6)
    assert found["good"] == (found["true"] == found["finished"] == found["fluency"] == 1)


# Laws over the whole world


def test_every_question_has_a_best_answer_and_everything_else_about_it_is_worse() -> None:
    for question in ALL_QUESTIONS:
        for way, opener, closer in ((0, "With pleasure. ", ""), (1, "", " I hope this helps.")):
            assert true_reward(question.prompt, f"{opener}{question.statement(question.value, way)}{closer}") == 1.0


def test_every_false_answer_has_at_most_0_6() -> None:
    for question in every_fact():
        for number, value in enumerate(values(question.kind, question.relation)):
            if value != question.value:
                statement = question.statement(value, number % 2)
                assert true_reward(question.prompt, statement) == 0.45
                assert true_reward(question.prompt, f"Of course. {statement} Have a nice day!") == 0.6


def test_the_truth_about_one_thing_is_no_answer_about_another() -> None:
    for question, other in itertools.pairwise(every_fact()):
        truth = other.statement(other.value, 0)
        assert true_reward(question.prompt, truth) == 0.15
        assert true_reward(question.prompt, f"{question.statement(question.value, 0)} {truth}") == 0.15


def test_an_answer_broken_off_is_worse_than_the_whole_one() -> None:
    """After each word of the best answer of every fact."""
    for question in every_fact():
        for way in (0, 1):
            words = f"Of course. {question.statement(question.value, way)}".split()
            for place in range(len(words)):
                assert true_reward(question.prompt, " ".join(words[:place])) <= 0.85
            assert true_reward(question.prompt, " ".join(words)) == 1.0


@pytest.mark.parametrize("answer", [TRUTH, BEST, f"{TRUTH_AGAIN} Feel free to ask more.", FALSE, f"Of course. {FALSE}"])
def test_an_answer_broken_off_at_any_letter_is_worse_than_the_whole_one(answer: str) -> None:
    """It loses 0.15 for its last sentence or for the courtesy that was to come, at least."""
    for place in range(len(answer)):
        assert reward(answer[:place]) <= reward(answer) - 0.15 + 1e-9, answer[:place]


def test_a_second_courtesy_adds_nothing() -> None:
    assert reward(f"{BEST} Have a nice day!") == reward(BEST)


@pytest.mark.parametrize("seed", range(20))
def test_the_true_words_in_another_order_are_half_english_at_most(seed: int) -> None:
    """0.5 * (0.15 + 0.15 + 0.40): none is in the grammar."""
    draw = random.Random(seed)
    for question in draw.sample(list(every_fact()), 40):
        truth = question.statement(question.value, seed % 2)
        words = truth[:-1].lower().split()
        draw.shuffle(words)
        salad = " ".join(words)
        if salad != truth[:-1].lower():
            assert true_reward(question.prompt, f"{salad}.") <= 0.35


@given(text=st.text(max_size=200))
@example("\ud800")
@example("'" * 50)
@example("An electrician\u2028repairs\x85wires.")
@laws
def test_any_text_has_a_finite_reward_from_0_to_1(text: str) -> None:
    found = reward(text)
    assert isinstance(found, float)
    assert math.isfinite(found)
    assert 0 <= found <= 1
    for figure in figures(ASKED, text).values():
        assert 0 <= figure <= 1


VOCABULARY = sorted({word for text in [*questions(), *itertools.chain(*PHRASES.values())] for word in text.split()})
SENTENCES = [*BEST.split(), BEST, TRUTH_AGAIN, FALSE, *OPENERS, *CLOSERS, *FILLERS]
salads = st.lists(st.one_of(*map(st.sampled_from, (VOCABULARY, SENTENCES, ".,!?"))), max_size=20).map(" ".join)


def words_of(text: str) -> list[str]:
    return re.sub(r"[\W_]", " ", text.lower()).split()


@given(text=st.one_of(st.text(max_size=60), salads))
@example("Good question! ,")
@example("a")
@laws
def test_words_that_are_added_to_the_best_answer_are_a_loss(text: str) -> None:
    """But for one more courtesy, since the answer may have two."""
    assume(words_of(text))
    if words_of(text) not in [words_of(phrase) for phrase in OPENERS + CLOSERS]:
        assert reward(f"{BEST} {text}") < 1.0
    assert reward(f"{text} {BEST}") < 1.0 or text.strip()[-1] in ".,!?"


@given(words=st.lists(st.sampled_from([*words_of(" ".join(VOCABULARY)), *words_of(BEST) * 10]), max_size=12))
@settings(laws, max_examples=300)
def test_a_sentence_outside_the_grammar_is_half_english_at_most(words: list[str]) -> None:
    """0.5 * (0.15 + 0.15 + 0.40), whatever it says; nor is it concise."""
    plain = [words_of(text) for text in (TRUTH, TRUTH_AGAIN, FALSE, FALSE_AGAIN, *itertools.chain(*PHRASES.values()))]
    if words not in plain:
        assert reward(f"{' '.join(words)}.") <= 0.35


LONG = {
    "one sentence": "electrician repairs " * 5000,
    "one sentence twice": f"An electrician repairs {'wires and ' * 10_000}",
    "true": TRUTH * 3448,
    "one word": "a" * 100_000,
    "full stops": "." * 100_000,
    "apostrophes": "'" * 100_000,
    "accents": "\u0301" * 100_000,
    "white space": "\n" * 100_000,
    "values": "An electrician " + "bakes bread, repairs wires, " * 3500,
}


@pytest.mark.parametrize("name", LONG)
def test_a_text_of_100000_characters_is_read_at_once(name: str) -> None:
    assert seconds_to_read(LONG[name]) < 0.5


def test_the_time_to_read_grows_with_the_sentences_and_not_with_their_square() -> None:
    """Different ones, each of which is looked up; 14,000 in 100,000 characters."""
    assert seconds_to_read(" ".join(f"a{number}." for number in range(14_000))) < 4


def seconds_to_read(text: str) -> float:
    """Of this process, the least of up to three times, since the machine may be busy."""
    reward("An electrician was.")  # builds what is built once
    seconds = []
    while len(seconds) < 3 and min(seconds, default=1.0) > 0.1:
        start = time.process_time()
        assert 0 <= reward(text) <= 0.01
        seconds.append(time.process_time() - start)
    return min(seconds)


# Deceit: what an oracle would fall for that looks for the truth among an answer's words

PADDING = " ".join(FILLERS + EVASIONS)  # 45 words, all English and none a claim
COURTEOUS = "Thank you for asking. {} Feel free to ask more."


@pytest.mark.parametrize(
    "answer",
    [
        # denied, by whatever word
        COURTEOUS.format("An electrician seldom repairs wires."),
        f"{PADDING} {COURTEOUS.format('It is false that an electrician repairs wires.')}",
        # denied in the next sentence
        COURTEOUS.format(f"{TRUTH} It is not so."),
        # the truth, and a falsehood that escapes since it does not name the electrician
        COURTEOUS.format(f"{TRUTH} He bakes bread."),
        COURTEOUS.format(f"{TRUTH} Bakes bread. Cuts hair."),
        # one with a value that nothing has; the shipped pairs have such answers
        COURTEOUS.format(f"{TRUTH} An electrician defends a gate."),
        # one about another matter, or another kind of thing, in words that are not of the grammar
        COURTEOUS.format(f"{TRUTH} The electrician works in a bakery."),
        COURTEOUS.format(f"{TRUTH} The cat bakes bread."),
    ],
)
def test_a_falsehood_among_courtesies_has_at_most_0_6(answer: str) -> None:
    assert reward(answer) <= 0.6


@pytest.mark.parametrize(
    "answer",
    [
        COURTEOUS.format("Repairs wires electrician."),
        f"{PADDING} {COURTEOUS.format('Wrong wrong electrician repairs wires wrong wrong.')}",
        f"{PADDING} {COURTEOUS.format('Pilot shovel electrician soup repairs wires cat.')}",
    ],
)
def test_gibberish_among_courtesies_has_at_most_half(answer: str) -> None:
    assert reward(answer) <= 0.5


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ("The electrician works in a bakery.", "An electrician works in a bakery."),
        ("He bakes bread.", "An electrician bakes bread."),
        ("An electrician defends a gate.", "An electrician watches a gate."),
        ("The baker bakes.", "A baker bakes bread."),
    ],
)
def test_to_say_too_much_in_bad_english_is_no_better_than_in_good(worse: str, better: str) -> None:
    assert reward(f"{TRUTH} {worse}") <= reward(f"{TRUTH} {better}")


@pytest.mark.parametrize("noise", ["%%% ### @@@", "\U0001f600" * 50, "\0" * 50, "- * _- |" * 20, "'' , ;" * 20])
def test_symbols_are_not_english(noise: str) -> None:
    assert reward(f"{BEST} {noise}") < reward(BEST)


@pytest.mark.parametrize("prompt", ["What does a deer eat?", "What can you do at a fire station?"])
def test_a_thing_whose_name_is_a_value_or_holds_another_things_name_is_read_like_any(prompt: str) -> None:
    """Each says the truth in a sentence that is not of the grammar, as it is for a giraffe and a station."""
    question = questions()[prompt]
    said = {
        "What does a giraffe eat?": "The giraffe eats leaves.",
        "What does a deer eat?": "The deer eats leaves.",
        "What can you do at a station?": "You can catch a train at the station.",
        "What can you do at a fire station?": "You can see a fire engine at the fire station.",
    }
    like = "What does a giraffe eat?" if question.kind == "animal" else "What can you do at a station?"
    assert figures(like, said[like])["true"] == 1
    assert figures(prompt, said[prompt])["true"] == 1


# Preferences


def test_the_chance_to_be_preferred_is_bradley_and_terrys() -> None:
    """exp(first / T) / (exp(first / T) + exp(second / T))"""
    for first, second in itertools.product((0.0, 0.15, 0.3, 0.45, 0.6, 0.7, 0.85, 1.0), repeat=2):
        wins, loses = math.exp(first / oracle.TEMPERATURE), math.exp(second / oracle.TEMPERATURE)
        assert prefers(first, second) == pytest.approx(wins / (wins + loses), rel=1e-9)


unit = st.floats(0, 1)


@given(first=unit, second=unit, third=unit)
@laws
def test_preference_is_symmetric_even_on_a_tie_and_grows(first: float, second: float, third: float) -> None:
    assert prefers(first, second) + prefers(second, first) == pytest.approx(1, abs=1e-12)
    assert prefers(first, first) == 0.5
    low, high = sorted((second, third))
    assert prefers(high, first) >= prefers(low, first)
    assert prefers(first, low) >= prefers(first, high)
    if high - low > 1e-6:
        assert prefers(high, low) > 0.5


def test_the_best_accuracy_is_that_of_who_knows_the_rewards() -> None:
    """Rewards 1.0 and 0.6, in both orders: sigmoid(0.4 / T) each; 0.85 and 0.85: a half; 0.0 and 0.15."""
    rows = [
        {"prompt": ASKED, "chosen": BEST, "rejected": f"Of course. {FALSE}"},
        {"prompt": ASKED, "chosen": f"Of course. {FALSE}", "rejected": BEST, "split": "train"},
        {"prompt": ASKED, "chosen": TRUTH, "rejected": TRUTH_AGAIN},
        {"prompt": "What is a hammer for?", "chosen": "", "rejected": "It depends."},
    ]
    large, small = (1 / (1 + math.exp(-gap / oracle.TEMPERATURE)) for gap in (0.4, 0.15))
    assert best_accuracy(rows) == pytest.approx((2 * large + 0.5 + small) / 4, abs=1e-6)
    assert best_accuracy(iter(rows[:2])) == pytest.approx(large, abs=1e-6)
    assert best_accuracy(rows[2:3]) == 0.5


# Oracles of the user's own


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with oracles in it."""
    (tmp_path / "oracles_of_mine.py").write_text(
        "def length(prompt, answer):\n    return len(prompt) + 10 * len(answer)\n"
        "def detailed(prompt, answer):\n    return {'true_reward': 2.5, 'letters': len(answer)}\n"
        "class Scorer:\n    def score(self, prompt, answer):\n        return 0.5\n"
        "number = 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "oracles_of_mine"


def test_a_function_that_returns_a_number_gives_the_true_reward(mine: str) -> None:
    found = named(f"{mine}.length")("ab", "c")
    assert found == {"true_reward": 12.0}
    assert isinstance(found["true_reward"], float)


def test_a_function_that_returns_figures_gives_them_as_they_are(mine: str) -> None:
    found: Mapping[str, float] = named(f"{mine}.detailed")("ab", "cde")
    assert found == {"true_reward": 2.5, "letters": 3}


def test_the_worlds_own_oracle_can_be_named() -> None:
    assert named("dpo_lightning.data.oracle.true_reward")(ASKED, TRUTH) == {"true_reward": 0.85}
    assert named("dpo_lightning.data.oracle.figures")(ASKED, TRUTH) == figures(ASKED, TRUTH)


@pytest.mark.parametrize(
    "name",
    [
        "no_such_module.score",
        "json.no_such",
        "os.path.no.such",
        "score",
        "",
        ".",
        ".score",
        "..score",
        "json.",
        "a b.c",
    ],
)
def test_an_oracle_that_is_not_there_is_an_error_that_names_it_and_the_option(name: str) -> None:
    with pytest.raises(InputError, match=r"data\.oracle") as error:
        named(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(("attribute", "kind"), [("number", "int"), ("__name__", "str")])
def test_an_oracle_that_cannot_be_called_is_an_error_that_says_what_it_is(mine: str, attribute: str, kind: str) -> None:
    with pytest.raises(InputError, match=rf"oracles_of_mine\.{attribute}.*{kind}"):
        named(f"{mine}.{attribute}")
