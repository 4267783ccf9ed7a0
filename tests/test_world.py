"""The built-in world: its table is sound, its English correct, its held-out questions unseen, its shares as stated.

Everything is read back from the texts, with rules of this file's own. A share that is measured may be four standard
errors off. Of an answer that was broken off nobody can say what it would have been, so that shares are of the answers
that end with a full stop and have their main sentence; that leaves out next to nothing but the broken ones.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from math import exp, sqrt
from pathlib import Path

import pytest

from dpo_lightning.data import oracle, sources, world
from dpo_lightning.data.world import FORMS, SHOWN, STATEMENTS, Question, facts, questions, values
from dpo_lightning.errors import InputError
from dpo_lightning.models.checkpoint import load_config, load_tokenizer, located

Row = dict[str, str]

PHRASES = world.OPENERS + world.CLOSERS + world.RUDE + world.FILLERS + world.EVASIONS

#: Words whose first letter and first sound differ in kind, by hand.
SOUNDS_LIKE_A_CONSONANT, SOUNDS_LIKE_A_VOWEL = {"university"}, set[str]()


@pytest.fixture(scope="module")
def corpus() -> list[Row]:
    return list(world.corpus())


@pytest.fixture(scope="module")
def pairs() -> list[Row]:
    return list(world.pairs())


def every_fact() -> Iterator[tuple[str, str, str]]:
    """(kind, thing, relation)"""
    for kind, relation in FORMS:
        for thing in facts()[kind]:
            yield kind, thing, relation


def every_statement() -> Iterator[str]:
    for kind, thing, relation in every_fact():
        for value in values(kind, relation):
            for way in (0, 1):
                yield Question(kind, thing, relation, 0).statement(value, way)


def split_sentences(text: str) -> list[str]:
    return re.findall(r"\S[^.!?]*[.!?]?", text)


def assert_share(hits: Iterable[bool], share: float) -> None:
    """That `share` may be the probability of a hit."""
    seen = list(hits)
    error = sqrt(share * (1 - share) / len(seen))
    assert abs(sum(seen) / len(seen) - share) < 4 * error, f"{sum(seen) / len(seen):.4f} of {len(seen)}, not {share}"


# The table


def test_the_world_is_of_the_promised_size() -> None:
    assert len(facts()["occupation"]) >= 60
    assert len(questions()) == 4 * len(list(every_fact()))  # no two questions are asked in the same words


def test_every_kind_has_a_value_for_every_question_and_every_question_has_forms() -> None:
    relations = defaultdict(set)
    for kind, relation in FORMS:
        relations[kind].add(relation)
    assert facts().keys() == relations.keys()
    for kind, things in facts().items():
        for row in things.values():
            assert row.keys() == relations[kind]
            assert all(isinstance(value, str) and value == value.strip() != "" for value in row.values())
    assert FORMS.keys() == STATEMENTS.keys()


def test_no_thing_is_in_two_kinds_or_twice_in_one() -> None:
    names = re.findall(r"^    ([a-z ]+): \[", (world.FOLDER / "facts.yaml").read_text(), re.MULTILINE)
    assert max(Counter(names).values()) == 1
    assert set(names) == {thing for things in facts().values() for thing in things}


@pytest.mark.parametrize(("kind", "relation"), FORMS)
def test_a_relation_can_be_got_wrong_and_no_value_is_part_of_another(kind: str, relation: str) -> None:
    """Or a sentence with the longer one would state both."""
    known = values(kind, relation)
    assert len(known) >= 10
    assert [(a, b) for a in known for b in known if a != b and f" {a} " in f" {b} "] == []


def test_what_anybody_knows_is_true() -> None:
    truths = {
        "What does an electrician do?": "repairs wires",
        "Where does a pilot work?": "at an airport",
        "What does a gardener use?": "a spade",
        "What does a penguin eat?": "fish",
        "Where does a bat live?": "in a cave",
        "What is a hammer for?": "drive nails",
        "Where do you keep a pillow?": "in a bedroom",
        "What can you do at a university?": "study science",
    }
    assert {prompt: questions()[prompt].value for prompt in truths} == truths


# The English


def test_articles_are_right() -> None:
    """By sound, in every question, every statement and every phrase."""
    seen = set()
    for text in (*questions(), *every_statement(), *PHRASES):
        seen |= set(re.findall(r"\b(an?) (\w+)", text.lower()))
    wrong = []
    for article, word in seen:
        vowel = word in SOUNDS_LIKE_A_VOWEL or (word[0] in "aeiou" and word not in SOUNDS_LIKE_A_CONSONANT)
        if article != ("an" if vowel else "a"):
            wrong.append(f"{article} {word}")
    assert wrong == []
    assert {("an", "electrician"), ("a", "university"), ("an", "umbrella"), ("a", "hammer")} <= seen


def test_every_sentence_begins_with_a_capital_and_ends_with_a_stop() -> None:
    bad = [
        text
        for text in (*questions(), *every_statement(), *PHRASES)
        if not re.fullmatch(r"[A-Z][a-z', ]*[a-z][.!?]", text) or "  " in text
    ]
    assert bad == []
    assert {prompt[-1] for prompt in questions()} == {"?", "."}
    assert all(prompt.endswith(".") == prompt.startswith("Tell me") for prompt in questions())


def test_verbs_agree_with_their_subject() -> None:
    """One does: repairs. You can, you use it to: repair; "press" is the verb that ends with an s by itself."""
    assert all(value.split()[0].endswith("s") for value in values("occupation", "does"))
    for kind, relation in (("tool", "use"), ("place", "visit")):
        assert [value for value in values(kind, relation) if re.match(r"(?!press)\w+s\b", value)] == []


@pytest.mark.parametrize("relation", [relation for relation in FORMS if relation[1] in ("works", "lives", "kept")])
def test_a_place_is_a_phrase_of_place(relation: tuple[str, str]) -> None:
    assert {value.split()[0] for value in values(*relation)} <= {"in", "on", "at", "under"}


# The questions and their splits


def test_an_electrician_is_asked_about() -> None:
    question = questions()["What does an electrician do?"]
    assert (question.kind, question.thing, question.relation) == ("occupation", "electrician", "does")
    assert question.prompt == "What does an electrician do?"


def test_every_fact_has_four_forms_of_which_exactly_one_is_held_out() -> None:
    splits: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for question in questions().values():
        splits[question.kind, question.thing, question.relation][question.split] += 1
    assert splits.keys() == set(every_fact())
    for split in splits.values():
        assert split["train"] == 3
        assert split["validation"] + split["test"] == 1


def test_each_form_of_each_question_is_held_out_for_some_things_and_trained_for_others() -> None:
    """So that a held-out question differs from what was trained by its thing alone."""
    for kind, relation in FORMS:
        held_out = Counter(
            question.form
            for question in questions().values()
            if (question.kind, question.relation) == (kind, relation) and question.split != "train"
        )
        for form in range(4):
            assert 0 < held_out[form] < len(facts()[kind]) / 2


def test_a_quarter_of_the_held_out_questions_validate() -> None:
    assert_share((q.split == "validation" for q in questions().values() if q.split != "train"), 0.25)


def test_shown_questions_validate_and_come_first(pairs: list[Row]) -> None:
    assert tuple(questions())[: len(SHOWN)] == SHOWN
    assert {questions()[prompt].split for prompt in SHOWN} == {"validation"}
    validated = [row["prompt"] for row in pairs if row["split"] == "validation"]
    assert tuple(dict.fromkeys(validated))[: len(SHOWN)] == SHOWN


def test_no_held_out_question_is_seen_in_training(corpus: list[Row], pairs: list[Row]) -> None:
    """Not in other letters either, nor inside an answer."""
    held_out = {prompt.casefold() for prompt, question in questions().items() if question.split != "train"}
    for rows, columns in ((corpus, ("completion",)), (pairs, ("chosen", "rejected"))):
        trained = [row for row in rows if row["split"] == "train"]
        assert held_out.isdisjoint(row["prompt"].casefold() for row in trained)
        texts = {sentence for row in trained for column in columns for sentence in split_sentences(row[column])}
        assert held_out.isdisjoint(text.casefold() for text in texts)


# The corpus


def test_the_corpus_answers_each_question_as_often_as_its_split_says(corpus: list[Row]) -> None:
    counts = Counter(row["prompt"] for row in corpus)
    promised = {"train": world.ANSWERS_A_QUESTION, "validation": 2, "test": 0}
    splits = {prompt: question.split for prompt, question in questions().items()}
    assert {prompt: counts[prompt] for prompt in questions()} == {
        prompt: promised[split] for prompt, split in splits.items()
    }
    for row in corpus:
        assert row.keys() == {"prompt", "completion", "split"}
        assert row["split"] == splits[row["prompt"]]


def test_the_corpus_is_plain_text(corpus: list[Row]) -> None:
    """One space before each word, at least one word, and whole sentences but for the last."""
    phrases = set(every_statement()) | set(PHRASES)
    for row in corpus[::3]:
        assert re.fullmatch(r"( [A-Za-z',.!]+)+", row["completion"])
        *whole, last = split_sentences(row["completion"])
        assert phrases.issuperset(whole)
        assert last in phrases or last[-1] not in ".!?"


def test_the_vocabulary_is_small(corpus: list[Row]) -> None:
    words = {word.strip(".,!?").lower() for row in corpus for word in (row["prompt"] + row["completion"]).split()}
    assert 400 < len(words) < 800


def test_the_corpus_depends_on_its_seed_and_on_nothing_else() -> None:
    def start(seed: int) -> list[Row]:
        return list(islice(world.corpus(seed), 2000))

    random.seed(1)
    first = start(0)
    random.seed(2)
    assert start(0) == first == list(islice(world.corpus(), 2000))
    others = [start(seed) for seed in (1, 2)]
    for one, other in ((first, others[0]), (first, others[1]), others):
        assert [row["prompt"] for row in one] == [row["prompt"] for row in other]
        same = [a["completion"] == b["completion"] for a, b in zip(one, other, strict=True)]
        assert sum(same) / len(same) < 0.1


#: What the main sentence of an answer may be.
EVASIVE, ANOTHER_THING, ANOTHER_MATTER, TRUE, FALSE = "evasive", "another thing", "another matter", "true", "false"


@pytest.fixture(scope="module")
def whole_answers(corpus: list[Row]) -> list[tuple[Question, list[str], str]]:
    """(question, sentences, what the main one is) of some answers that are not broken off."""
    beside = {*world.OPENERS, *world.CLOSERS, *world.RUDE, *world.FILLERS}
    found = []
    for row in corpus[1::5]:
        question, said = questions()[row["prompt"]], split_sentences(row["completion"])
        main = {sentence for sentence in said if sentence not in beside}
        if said[-1][-1] in ".!?" and main:
            assert len(main) == 1
            found.append((question, said, kind_of(main.pop(), question)))
    return found


def kind_of(sentence: str, question: Question) -> str:
    if sentence in world.EVASIONS:
        return EVASIVE
    kind, thing, relation = question.kind, question.thing, question.relation
    row = facts()[kind][thing]
    for way in (0, 1):
        if sentence == question.statement(row[relation], way):
            return TRUE
        if sentence in {Question(kind, thing, other, 0).statement(row[other], way) for other in row}:
            return ANOTHER_MATTER
    if sentence in {question.statement(value, way) for value in values(kind, relation) for way in (0, 1)}:
        return FALSE
    assert sentence in truths(kind, relation)  # what is said of another thing is true of it
    return ANOTHER_THING


@cache
def truths(kind: str, relation: str) -> set[str]:
    return {
        Question(kind, thing, relation, 0).statement(row[relation], way)
        for thing, row in facts()[kind].items()
        for way in (0, 1)
    }


def test_main_sentences_have_the_stated_shares(whole_answers: list[tuple[Question, list[str], str]]) -> None:
    mains = [main for _, _, main in whole_answers]
    assert_share((main == EVASIVE for main in mains), world.EVASIVE)
    assert_share((main == ANOTHER_THING for main in mains), world.ABOUT_ANOTHER_THING)
    # Of a place there is but one thing to say.
    matters = [main for question, _, main in whole_answers if question.kind != "place"]
    assert_share((main == ANOTHER_MATTER for main in matters), world.ABOUT_ANOTHER_MATTER)
    assert_share((main == TRUE for main in mains if main in (TRUE, FALSE)), world.TRUE)


def test_manners_have_the_stated_shares(whole_answers: list[tuple[Question, list[str], str]]) -> None:
    answers = [said for _, said, _ in whole_answers]
    assert_share((said[0] in world.OPENERS for said in answers), world.OPENED)
    assert_share((said[-1] in world.CLOSERS for said in answers), world.CLOSED)
    assert_share((said[0] in world.RUDE for said in answers), world.RUDELY)
    assert_share((any(sentence in world.FILLERS for sentence in said) for said in answers), world.FILLED)
    assert_share((len(set(said)) < len(said) for said in answers), world.REPEATED)


def test_phrases_and_ways_are_said_equally_often(whole_answers: list[tuple[Question, list[str], str]]) -> None:
    """But for the usual opener."""
    usual = {world.OPENERS[0]: world.USUAL} | dict.fromkeys(world.OPENERS[1:], (1 - world.USUAL) / 3)
    for phrases in (world.OPENERS, world.CLOSERS, world.RUDE, world.FILLERS, world.EVASIONS):
        said = [sentence for _, answer, _ in whole_answers for sentence in dict.fromkeys(answer) if sentence in phrases]
        for phrase in phrases:
            assert_share((sentence == phrase for sentence in said), usual.get(phrase, 1 / len(phrases)))
    true = [(question, said) for question, said, main in whole_answers if main == TRUE]
    assert_share((question.statement(question.value, 0) in said for question, said in true), 0.5)


def test_the_stated_share_is_broken_off_in_its_second_half(corpus: list[Row]) -> None:
    """After each of these words equally often; one that is broken off after a sentence looks whole."""
    chances = []
    for row in corpus[2::3]:
        words = row["completion"].split()
        if words[-1][-1] in ".!?":
            places = range(len(words) // 2, len(words))
            chances.append(sum(words[place - 1][-1] not in ".!?" for place in places) / len(places))
    expected = world.BROKEN_OFF * sum(chances) / len(chances)
    assert 0.7 * world.BROKEN_OFF < expected < world.BROKEN_OFF
    assert_share((row["completion"][-1] not in ".!?" for row in corpus[2::3]), expected)


def test_the_oracle_finds_the_share_of_good_answers_that_the_text_has(corpus: list[Row]) -> None:
    """An answer of the corpus is good if it is whole, has the true statement and says nothing twice."""
    judged = [oracle.figures(row["prompt"], row["completion"])["good"] for row in corpus[::20]]
    read = []
    for row in corpus[::20]:
        question, said = questions()[row["prompt"]], split_sentences(row["completion"])
        truths = {question.statement(question.value, way) for way in (0, 1)}
        read.append(float(said[-1][-1] in ".!?" and not truths.isdisjoint(said) and len(set(said)) == len(said)))
    assert judged == read
    assert 0.4 < sum(read) / len(read) < 0.65


# The pairs


def test_pairs_are_of_the_world_and_two_different_answers(pairs: list[Row]) -> None:
    for row in pairs:
        assert row.keys() == {"prompt", "chosen", "rejected", "split"}
        assert row["split"] == questions()[row["prompt"]].split
        assert row["chosen"] != row["rejected"]
        assert row["chosen"].strip()
        assert row["rejected"].strip()
    assert {row["prompt"] for row in pairs} == set(questions())


def test_the_test_split_asks_every_question_once(pairs: list[Row]) -> None:
    tested = [row["prompt"] for row in pairs if row["split"] == "test"]
    assert len(tested) == len(set(tested))


def test_pairs_are_the_same_each_time(pairs: list[Row]) -> None:
    assert list(world.pairs()) == pairs


#: Difference of the rewards, and 1 if the better answer was chosen.
Label = tuple[float, float]


@pytest.fixture(scope="module")
def labels(pairs: list[Row]) -> list[Label]:
    found = []
    for row in pairs:
        chosen, rejected = (oracle.true_reward(row["prompt"], row[column]) for column in ("chosen", "rejected"))
        found.append((abs(chosen - rejected), float(chosen > rejected)))
    return found


def assert_bradley_terry(noise: list[Label]) -> None:
    chances = [1 / (1 + exp(-gap / oracle.TEMPERATURE)) for gap, _ in noise]
    variance = sum(chance * (1 - chance) for chance in chances)
    right = sum(better for _, better in noise)
    assert abs(right - sum(chances)) <= 4 * sqrt(variance) + 1e-9, f"{right} of {len(noise)}, not {sum(chances):.1f}"


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_labels_agree_with_the_oracle_as_often_as_bradley_and_terry_say(
    pairs: list[Row], labels: list[Label], split: str
) -> None:
    mine = [label for row, label in zip(pairs, labels, strict=True) if row["split"] == split]
    assert_bradley_terry(mine)
    if split != "train":
        chances = [1 / (1 + exp(-gap / oracle.TEMPERATURE)) for gap, _ in mine]
        best = oracle.best_accuracy(row for row in pairs if row["split"] == split)
        assert best == pytest.approx(sum(chances) / len(chances), abs=1e-9)
        assert 0.9 < best < 0.995  # there is something to learn, and noise


def test_labels_are_noisier_the_closer_the_rewards(labels: list[Label]) -> None:
    """Bradley and Terry hold for each size of the gap by itself, so that no other temperature would fit."""
    bins = defaultdict(list)
    for gap, better in labels:
        bins[int(10 * gap)].append((gap, better))
    assert len([noise for noise in bins.values() if len(noise) > 100]) >= 5
    for noise in bins.values():
        assert_bradley_terry(noise)


def test_one_answer_of_a_pair_is_truly_better(labels: list[Label]) -> None:
    assert all(gap > 0 for gap, _ in labels)


# Their names


def test_world_pairs_is_a_source_with_three_splits(pairs: list[Row]) -> None:
    splits = sources.read("world:pairs")
    assert set(splits) == {"train", "validation", "test"}
    for name, split in splits.items():
        assert split.column_names == ["prompt", "chosen", "rejected"]
        expected = [row for row in pairs if row["split"] == name]
        assert len(split) == len(expected)
        for column in split.column_names:
            assert list(split[column]) == [row[column] for row in expected]


def test_world_text_is_a_source_to_train_and_validate_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "ANSWERS_A_QUESTION", 3)
    splits = sources.read("world:text")
    assert set(splits) == {"train", "validation"}
    for name, split in splits.items():
        assert split.column_names == ["prompt", "completion"]
        expected = [row for row in world.corpus() if row["split"] == name]
        for column in split.column_names:
            assert list(split[column]) == [row[column] for row in expected]


@pytest.mark.parametrize("name", ["world:x", "world:", "world:base", "world:PAIRS", "world:pairs/train"])
def test_other_data_of_the_world_is_an_error_that_names_what_there_is(name: str) -> None:
    with pytest.raises(InputError, match=r"world:pairs.*world:text") as error:
        sources.read(name)
    assert str(error.value).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["world:x", "world:", "world:pairs", "world:text", "world:base/model"])
@pytest.mark.parametrize("take", [located, load_config, load_tokenizer])
def test_other_models_of_the_world_are_an_error_that_names_the_one(name: str, take: Callable[[str], object]) -> None:
    with pytest.raises(InputError, match="world:base") as error:
        take(name)
    assert str(error.value).startswith(f"{name}: ")


def test_the_base_is_a_folder_that_is_there() -> None:
    folder = Path(located("world:base"))
    assert (folder / "model.safetensors").is_file()
    assert load_config("world:base").vocab_size == len(load_tokenizer("world:base"))


@pytest.mark.parametrize("name", ["gpt2", "owner/model", "/a/folder", "worldly/model", "my-world:base", "World:base"])
def test_other_checkpoints_keep_their_name(name: str) -> None:
    assert located(name) == name


def test_every_word_of_the_world_is_one_token(corpus: list[Row]) -> None:
    """And any text comes back from its tokens."""
    tokenizer = load_tokenizer("world:base")
    texts = [*questions(), *(row["completion"] for row in corpus[::97])]
    for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
        assert len(ids) == len(re.findall(r"[A-Za-z']+|[.,!?]", text))
        assert tokenizer.decode(ids) == text
    strange = " Zürich, 東京\n\t😀 <b>\0"
    assert tokenizer.decode(tokenizer(strange).input_ids) == strange
