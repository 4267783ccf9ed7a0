"""`world`: what it makes is the same whenever it is made again, and is what `data/world.py` says.

Laws of labels are asked of answers written here, in place of a model's; those of samples of a few prompts and the base
that is shipped.
"""

import gzip
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from dpo_lightning.commands import world as command
from dpo_lightning.data import world
from dpo_lightning.data.oracle import true_reward
from dpo_lightning.data.world import FORMS, Question, facts, questions, values
from dpo_lightning.models.checkpoint import load_policy, load_tokenizer
from tests.conftest import RunCli

Row = dict[str, str]
Sampled = tuple[str, str, str, str]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The blank model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """As made from the whole corpus."""
    return command.make_tokenizer()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    """The tokenizer is made once, which takes seconds."""
    monkeypatch.setattr(command, "make_tokenizer", lambda: tokenizer)


@pytest.fixture
def blank(tmp_path: Path, quick: None) -> Callable[..., Path]:
    """Writes a small blank model, after others have drawn random numbers."""

    def write(name: str, **options: int) -> Path:
        torch.rand(len(name))
        command.blank(tmp_path / name, **({"width": 16, "layers": 1, "heads": 2} | options))
        return tmp_path / name

    return write


def test_a_blank_model_is_the_same_bytes_for_the_same_seed(blank: Callable[..., Path]) -> None:
    first = contents(blank("first", seed=3))
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= first.keys()
    torch.manual_seed(1)
    assert contents(blank("second", seed=3)) == first
    assert contents(blank("default")) == contents(blank("zero", seed=0)) != first


def test_of_another_seed_a_blank_model_has_other_weights_and_the_same_rest(blank: Callable[..., Path]) -> None:
    folders = [blank(f"seed-{seed}", seed=seed) for seed in (0, 1)]
    one, other = map(contents, folders)
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name]} == {"model.safetensors"}
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    matrices = [name for name, weight in first.items() if weight.dim() == 2]
    assert len(matrices) >= 6
    assert all((first[name] != second[name]).float().mean() > 0.99 for name in matrices)


def test_the_command_line_writes_a_model_that_loads_with_its_options(
    run_cli: RunCli, quick: None, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    words = ["--output_dir", tmp_path / "model", "--width", 24, "--layers", 2, "--heads", 3, "--seed", 5]
    done = run_cli("world", "blank", *words)
    assert done.status in (0, None) and str(tmp_path / "model") in done.out
    config = load_policy(str(tmp_path / "model"), layout="padded").model.config
    assert (config.model_type, config.n_embd, config.n_layer, config.n_head) == ("gpt2", 24, 2, 3)
    assert config.vocab_size == len(tokenizer)
    loaded = load_tokenizer(str(tmp_path / "model"))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.eos_token_id == config.eos_token_id == tokenizer.eos_token_id
    command.blank(tmp_path / "again", width=24, layers=2, heads=3, seed=5)
    assert contents(tmp_path / "again") == contents(tmp_path / "model")


def test_the_longest_question_and_answer_fit_into_the_blank_models_context(
    blank: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    context = json.loads((blank("model") / "config.json").read_text())["n_positions"]
    assert max(map(len, tokenizer(list(questions())).input_ids)) + command.LONGEST <= context


# The tokenizer


def test_every_word_of_the_world_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of every question, every statement, true or false, and every phrase."""
    phrases = (*world.OPENERS, *world.CLOSERS, *world.RUDE, *world.FILLERS, *world.EVASIONS)
    statements = [
        Question(kind, thing, relation, 0).statement(value, way)
        for kind, relation in FORMS
        for thing in facts()[kind]
        for value in values(kind, relation)
        for way in (0, 1)
    ]
    texts = [*questions(), *(f" {text}" for text in {*statements, *phrases})]
    split = [text for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True) if len(ids) != count(text)]
    assert len(texts) > 10_000 and split == []


def count(text: str) -> int:
    """Words and stops."""
    return len(re.findall(r"[A-Za-z']+|[.,!?]", text))


def test_the_tokenizer_has_the_worlds_words_the_bytes_and_the_end_and_no_more(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    known = {
        word for row in world.corpus() for word in re.findall(r" ?[A-Za-z']+|[.,!?]", row["prompt"] + row["completion"])
    }
    words = [tokenizer.decode([number]) for number in range(len(tokenizer))]
    assert {word for word in words if len(word) > 1} - known == {command.END}
    assert len(tokenizer) == 1 + 256 + len({word for word in known if len(word) > 1})
    assert tokenizer.eos_token == tokenizer.bos_token == command.END


def test_the_tokenizer_that_is_shipped_is_the_one_that_is_made(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """In another process, so that no order of a set can have come into it."""
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (world.FOLDER / "tokenizer.json").read_bytes()


@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_any_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


# Pairs, of answers written here

ASKED = "What does an electrician do?"
TRUE, FALSE = "An electrician repairs wires.", "An electrician bakes bread."

#: Answers with their rewards, by the oracle's formula and by hand.
BEST, GOOD, RUDE, WRONG = f"Of course. {TRUE}", TRUE, f"{world.RUDE[0]} {TRUE}", FALSE  # 1.00, 0.85, 0.70, 0.45
TWICE, WORDY_AND_WRONG = f"{TRUE} {TRUE}", f"{world.FILLERS[0]} {FALSE}"  # 0.35, 0.30
EVASIVE, BESIDE = world.EVASIONS[0], world.OPENERS[1]  # 0.15, 0.15

Inject = Callable[[list[Sampled]], None]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Inject:
    """Has `pairs` label these."""

    def inject(rows: list[Sampled]) -> None:
        monkeypatch.setattr(command, "sampled_pairs", lambda checkpoint, seed: iter(rows))

    return inject


def read(path: Path) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def often(first: str, second: str, number: int) -> list[Sampled]:
    return [("train", ASKED, first, second)] * number


@pytest.mark.parametrize(
    ("first", "second", "gap"),
    [
        (EVASIVE, BESIDE, 0.0),
        (RUDE, GOOD, -0.15),
        (GOOD, RUDE, 0.15),
        (TWICE, WORDY_AND_WRONG, 0.05),
        (WORDY_AND_WRONG, TWICE, -0.05),
        (TWICE, WRONG, -0.10),
        (BEST, WRONG, 0.55),
    ],
)
def test_the_better_answer_is_chosen_as_often_as_bradley_and_terry_say(
    answers: Inject, tmp_path: Path, first: str, second: str, gap: float
) -> None:
    answers(often(first, second, 2000))
    command.pairs("any", tmp_path / "pairs.jsonl.gz")
    chance = 1 / (1 + math.exp(-gap / 0.05))
    chosen = sum(row["chosen"] == first for row in read(tmp_path / "pairs.jsonl.gz"))
    assert abs(chosen / 2000 - chance) < 4 * math.sqrt(chance * (1 - chance) / 2000)


def test_a_label_does_not_follow_from_the_one_before(answers: Inject, tmp_path: Path) -> None:
    answers(often(EVASIVE, BESIDE, 4000))
    command.pairs("any", tmp_path / "pairs.jsonl.gz")
    labels = [row["chosen"] == EVASIVE for row in read(tmp_path / "pairs.jsonl.gz")]
    both = Counter(zip(labels[::2], labels[1::2], strict=True))
    assert all(abs(both[a, b] / 2000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000) for a in (0, 1) for b in (0, 1))


def test_a_row_is_its_pair_in_one_order_or_the_other_in_the_order_of_sampling(answers: Inject, tmp_path: Path) -> None:
    rows = [(split, ASKED, f"é 東\n{n}", f'"{n}" ') for n in range(50) for split in ("test", "train")]
    answers(rows)
    command.pairs("any", tmp_path / "new" / "pairs.jsonl.gz")
    found = read(tmp_path / "new" / "pairs.jsonl.gz")
    assert all(list(row) == ["prompt", "chosen", "rejected", "split"] for row in found)
    expected = [(split, prompt, {first, second}) for split, prompt, first, second in rows]
    assert [(row["split"], row["prompt"], {row["chosen"], row["rejected"]}) for row in found] == expected


def test_what_is_printed_of_pairs_is_what_they_are(
    answers: Inject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("train", ASKED, BEST, WRONG), ("train", ASKED, TWICE, WORDY_AND_WRONG), ("test", ASKED, GOOD, GOOD)]
    answers(rows)
    command.pairs("any", tmp_path / "pairs.jsonl.gz")
    train, validation, test, written = capsys.readouterr().out.strip().splitlines()
    best = (1 / (1 + math.exp(-0.55 / 0.05)) + 1 / (1 + math.exp(-0.05 / 0.05))) / 2
    assert train.startswith("train: 2 pairs") and f"best possible accuracy {best:.4f}" in train
    assert f"true_reward {(1.0 + 0.45 + 0.35 + 0.30) / 4:.3f}" in train
    assert validation.startswith("validation: no pairs")
    assert test.startswith("test: 1 pairs") and "accuracy 0.5000" in test and "true_reward 0.850, good 1.000" in test
    assert str(tmp_path / "pairs.jsonl.gz") in written


@pytest.mark.parametrize("names", [("one/pairs.jsonl.gz", "two/pairs.jsonl.gz"), ("one.jsonl.gz", "two.jsonl.gz")])
def test_pairs_are_the_same_bytes_for_the_same_seed_whenever_and_wherever_they_are_written(
    answers: Inject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    answers(often(EVASIVE, BESIDE, 100))
    written = []
    for hour, name in enumerate(names):
        monkeypatch.setattr("time.time", lambda hour=hour: 3600.0 * hour)
        command.pairs("any", tmp_path / name, seed=7)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]


def test_of_another_seed_other_answers_are_chosen(answers: Inject, tmp_path: Path) -> None:
    answers(often(EVASIVE, BESIDE, 1000))
    labels = []
    for seed in (0, 1):
        command.pairs("any", tmp_path / f"{seed}.jsonl.gz", seed)
        labels.append([row["chosen"] for row in read(tmp_path / f"{seed}.jsonl.gz")])
    different = sum(a != b for a, b in zip(*labels, strict=True))
    assert abs(different / 1000 - 0.5) < 4 * math.sqrt(0.25 / 1000)


def test_a_checkpoint_that_is_not_there_is_an_error_that_leaves_the_pairs_that_there_are(
    run_cli: RunCli, tmp_path: Path
) -> None:
    output = tmp_path / "pairs.jsonl.gz"
    output.write_bytes(b"what was there")
    done = run_cli("world", "pairs", "--checkpoint", "./nowhere", "--output", output)
    assert done.status == 2 and done.err[-1].startswith("error: ./nowhere: no such folder")
    assert output.read_bytes() == b"what was there"


def test_sampling_that_is_interrupted_leaves_the_pairs_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "pairs.jsonl.gz"
    output.write_bytes(b"what was there")

    def interrupted(checkpoint: str, seed: int) -> Iterator[Sampled]:
        yield from often(BEST, WRONG, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "sampled_pairs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.pairs("any", output)
    assert output.read_bytes() == b"what was there"


# Pairs, of the base's answers

COUNTS = {"train": 2, "validation": 1, "test": 1}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> dict[str, Question]:
    """The first questions alone, with few pairs each."""
    first = dict(list(questions().items())[:6])
    assert {question.split for question in first.values()} == COUNTS.keys()
    monkeypatch.setattr(world, "questions", lambda: first)
    monkeypatch.setattr(command, "PAIRS_A_PROMPT", COUNTS)
    return first


def test_answers_that_are_equally_good_and_blank_ones_make_no_pair(
    few: dict[str, Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose place is taken by the next draws. Evasions have a reward of 0.15 whatever is asked, nonsense has 0."""
    same, blank, equal = ("It depends.", "It depends."), ("It depends.", " "), (EVASIVE, BESIDE)
    first, second = ("It depends.", "Purple."), ("Purple grass.", "Of course.")
    texts = [*same, *blank, *first, *equal, *second, *same]
    monkeypatch.setattr(command, "generate", lambda policy, tokenizer, ids, most, keys: keys)
    monkeypatch.setattr(command, "decoded", lambda tokenizer, keys: [texts[k % len(texts)] for *_, k in keys])
    found = [(prompt, one, other) for _, prompt, one, other in command.sampled_pairs("world:base", seed=0)]
    kept = {prompt: (first, second)[: COUNTS[question.split]] for prompt, question in few.items()}
    assert sorted(found) == sorted((prompt, *pair) for prompt, pairs in kept.items() for pair in pairs)


def test_the_shipped_pairs_are_the_shipped_bases_answers_and_can_be_sampled_again(
    few: dict[str, Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of prompts in a batch, each split's question has the promised pairs, of unequal answers."""
    monkeypatch.setattr(command, "AT_ONCE", 2)
    found = list(command.sampled_pairs("world:base", seed=0))
    counts = Counter((split, prompt) for split, prompt, _, _ in found)
    assert counts == {(question.split, prompt): COUNTS[question.split] for prompt, question in few.items()}
    rewards = [(true_reward(prompt, first), true_reward(prompt, second)) for _, prompt, first, second in found]
    assert all(first != second for first, second in rewards)
    shipped: dict[str, list[set[str]]] = {prompt: [] for prompt in few}
    for row in world.pairs():
        if row["prompt"] in few:
            shipped[row["prompt"]].append({row["chosen"], row["rejected"]})
    for prompt, question in few.items():
        mine = [{first, second} for _, asked, first, second in found if asked == prompt]
        assert mine == shipped[prompt][: COUNTS[question.split]]


def test_pairs_of_the_base_depend_on_the_seed_and_on_nothing_else(
    few: dict[str, Question], run_cli: RunCli, tmp_path: Path
) -> None:
    written = []
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        torch.manual_seed(len(written))
        random.seed(len(written))
        output = tmp_path / name / "pairs.jsonl.gz"
        done = run_cli("world", "pairs", "--checkpoint", "world:base", "--output", output, "--seed", seed)
        assert done.status in (0, None) and str(output) in done.out
        written.append(output)
    assert written[0].read_bytes() == written[1].read_bytes()
    one, two = ([row for row in read(path) if row["split"] == "train"] for path in (written[0], written[2]))
    assert [row["prompt"] for row in one] == [row["prompt"] for row in two]
    same = [{a["chosen"], a["rejected"]} == {b["chosen"], b["rejected"]} for a, b in zip(one, two, strict=True)]
    assert not any(same)


def test_a_written_pair_has_its_questions_split(few: dict[str, Question], tmp_path: Path) -> None:
    command.pairs("world:base", tmp_path / "pairs.jsonl.gz")
    rows = read(tmp_path / "pairs.jsonl.gz")
    assert {(row["prompt"], row["split"]) for row in rows} == {(prompt, q.split) for prompt, q in few.items()}
    assert all(row["chosen"] != row["rejected"] for row in rows)
