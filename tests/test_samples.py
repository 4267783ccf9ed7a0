"""Answers that a run shows: before and after in the terminal, at each validation in TensorBoard, whatever is in them.

The toy's answers are random bytes, so that control characters, pipes and angle brackets come by themselves. Whether
TensorBoard shows a text as it is, TensorBoard is asked: its own renderer makes the HTML that is read back.
"""

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from dpo_lightning.models.checkpoint import load_policy, load_tokenizer
from dpo_lightning.models.generation import generate
from dpo_lightning.training.callbacks import LAST
from dpo_lightning.training.comparison import on_one_line
from dpo_lightning.training.samples import Samples
from tests.conftest import RunCli

#: Name -> directory of a run, and what it printed.
Parts = dict[str, tuple[Path, str]]

#: Longest answer, and the learning rate at which a few steps change every answer.
TOKENS = 12
FAST = ["--model.optimizer.lr", 1e-2, "--model.max_new_tokens", TOKENS]

#: What Markdown, HTML or a table could take for its own.
HARD_TEXTS = [
    "plain",
    "a|b",
    "<script>alert(1)</script> <b",
    "&amp; & &lt;",
    "two\nlines",
    "old\rlines\r\n",
    "one ` backtick",
    "`code` and `a|b`",
    "*stars* **more** _and_ more",
    "[link](http://example.org) ![picture](http://example.org/a.png)",
    r"back\slash \| \* \`",
    "# head",
    "- item",
    "東京 😀 é",
    "",
]


class Cells(HTMLParser):
    """The texts of a table's cells, and the tags that are no part of a table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.others: set[str] = set()
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.inside = True
            self.rows[-1].append("")
        elif tag == "br":
            self.handle_data("\n")
        elif tag not in ("table", "thead", "tbody"):
            self.others.add(tag)

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def seen(text: str) -> str:
    """What a browser shows of a text: white space is one space; control characters are nothing."""
    return " ".join(re.sub(r"[\x00-\x08\x0e-\x1f\x7f]", "", text).split())


def run_of(folder: Path, number: int = 0) -> Path:
    return folder / "runs" / f"version_{number}"


def shown(out: str) -> list[tuple[str, str, str]]:
    """`(prompt, before, after)` as printed at the end of a fit."""
    return re.findall(r"^  (.*)\n    before: (.*)\n    after:  (.*)$", out, re.MULTILINE)


def tables(run: Path) -> dict[int, list[tuple[str, ...]]]:
    """Step -> rows `(prompt, before, now)` of every text `val/samples` in TensorBoard."""
    events = EventAccumulator(str(run))
    events.Reload()
    if "val/samples/text_summary" not in events.Tags()["tensors"]:
        return {}
    found = {}
    for event in events.Tensors("val/samples/text_summary"):
        head, rule, *rows = event.tensor_proto.string_val[0].decode().split("\n")
        assert head.split(" | ") == ["| prompt", "before", "now |"] and set(rule) == {"|", "-"}
        cells = [row.removeprefix("| ").removesuffix(" |").split(" | ") for row in rows]
        found[event.step] = [tuple(unescape(cell.replace("<br>", "\n")) for cell in row) for row in cells]
    return found


def pairs_of(toy_words: list[str]) -> list[str]:
    """The prompts of the toy, in order."""
    source = Path(toy_words[toy_words.index("--data.source") + 1])
    return [json.loads(line)["prompt"] for line in source.read_text().splitlines()]


def sampled(folder: Path, rows: dict[str, int], seed: int = 0) -> list[str]:
    """What a model answers to prompts, prompt -> row, by the random numbers that a run of this seed has for them."""
    policy, tokenizer = load_policy(str(folder)), load_tokenizer(str(folder))
    ids = [tokenizer(prompt, return_tensors="np").input_ids[0] for prompt in rows]
    answers = generate(policy, tokenizer, ids, TOKENS, [(seed, row) for row in rows.values()])
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def with_prompts(toy_words: list[str], tmp_path: Path, prompts: list[str]) -> list[str]:
    """Options that validate on these prompts."""
    rows = [{"prompt": prompt, "chosen": " Yes.", "rejected": " No."} for prompt in prompts]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = toy_words.index("--data.val_fraction")
    return [*toy_words[:place], "--data.val_source", str(tmp_path / "val.jsonl"), *toy_words[place + 2 :]]


# A table that shows what there is


@pytest.mark.parametrize("text", HARD_TEXTS, ids=ascii)
def test_tensorboard_shows_prompts_and_answers_as_they_are(text: str) -> None:
    samples = Samples(2)
    samples.before = {f"Q {text}": f"{text} before", "plain": "one"}
    samples.now = {f"Q {text}": text, "plain": "two"}
    cells = Cells(markdown_to_safe_html(samples.as_table()))
    assert [[seen(cell) for cell in row] for row in cells.rows] == [
        ["prompt", "before", "now"],
        [seen(f"Q {text}"), seen(f"{text} before"), seen(text)],
        ["plain", "one", "two"],
    ]
    assert cells.others == set()


# Through a run


def test_every_validation_adds_a_table_and_the_end_prints_before_and_after(
    run_cli: RunCli, toy: Path, toy_words: list[str], tmp_path: Path
) -> None:
    """Before: of the model that the run started from. After, and now at the end: of the one that it exported."""
    done = run_cli("fit", *toy_words, *FAST, "--trainer.max_epochs", 2, "--seed_everything", 5)
    assert done.status == 0, done.err
    found = tables(run_of(tmp_path))
    assert found.keys() == {12, 24}  # each epoch's end, and not the check before training
    prompts = [prompt for prompt, _, _ in found[12]]
    assert len(set(prompts)) == 3
    rows = {prompt: pairs_of(toy_words).index(prompt) for prompt in prompts}
    before, after = (sampled(folder, rows, 5) for folder in (toy / "model", run_of(tmp_path) / "export"))
    assert [row[:2] for row in found[12]] == [row[:2] for row in found[24]] == list(zip(prompts, before, strict=True))
    assert [now for _, _, now in found[24]] == after
    assert all(len({row[1], row[2], other[2]}) == 3 for row, other in zip(found[12], found[24], strict=True))
    assert shown(done.out) == [tuple(map(on_one_line, row)) for row in zip(prompts, before, after, strict=True)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resumed")


@pytest.fixture
def parts(run_cli: RunCli, toy_words: list[str], place: Path) -> Parts:
    """Four steps without samples and with, then each goes on to six with samples; made by the first test that asks."""
    words = [*toy_words, *FAST, "--trainer.default_root_dir", place / "runs", "--trainer.max_steps"]
    runs = {
        "without": (4, "--model.samples", 0),
        "with": (4,),
        "with, resumed": (6, "--ckpt_path", run_of(place, 1) / LAST),
        "without, resumed": (6, "--ckpt_path", run_of(place, 0) / LAST),
    }
    for number, options in enumerate(runs.values()):
        if not run_of(place, number).exists():
            done = run_cli("fit", *words, *options)
            assert done.status == 0, done.err
            (run_of(place, number) / "stdout").write_text(done.out)
    return {
        name: (run_of(place, number), (run_of(place, number) / "stdout").read_text())
        for number, name in enumerate(runs)
    }


def test_a_resumed_run_knows_what_the_untrained_policy_said(parts: Parts, toy: Path, toy_words: list[str]) -> None:
    (first, first_out), (second, second_out) = parts["with"], parts["with, resumed"]
    rows = {prompt: pairs_of(toy_words).index(prompt) for prompt, _, _ in tables(first)[4]}
    untrained, halfway, final = (
        list(map(on_one_line, sampled(folder, rows))) for folder in (toy / "model", first / "export", second / "export")
    )
    assert shown(first_out) == list(zip(map(on_one_line, rows), untrained, halfway, strict=True))
    assert shown(second_out) == list(zip(map(on_one_line, rows), untrained, final, strict=True))
    assert not {*untrained} & {*halfway}
    assert [row[1] for row in tables(second)[6]] == sampled(toy / "model", rows)


def test_the_policy_that_a_run_goes_on_from_is_not_shown_as_the_one_before_training(
    parts: Parts, toy_words: list[str]
) -> None:
    """Where the first part of the run made no samples, nobody knows what was before."""
    (first, _), (second, out) = parts["without"], parts["without, resumed"]
    rows = {prompt: pairs_of(toy_words).index(prompt) for prompt, _, _ in tables(second)[6]}
    halfway = set(map(on_one_line, sampled(first / "export", rows)))
    assert len(shown(out)) == 3
    assert not {before for _, before, _ in shown(out)} & halfway


def test_samples_change_nothing_of_a_run_and_none_are_made_where_none_are_wanted(parts: Parts) -> None:
    (one, out), (other, _) = parts["without"], parts["with"]
    assert shown(out) == [] and "Sampled" not in out
    assert tables(one) == {} and len(tables(other)[4]) == 3
    weights = [load_file(run / "export" / "model.safetensors") for run in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_loss_without_a_reference_shows_samples_too(
    run_cli: RunCli, toy: Path, toy_words: list[str], tmp_path: Path
) -> None:
    done = run_cli("fit", *toy_words, *FAST, "--model.loss", "SFT", "--trainer.max_steps", 2)
    assert done.status == 0, done.err
    (table,) = tables(run_of(tmp_path)).values()
    rows = {prompt: pairs_of(toy_words).index(prompt) for prompt, _, _ in table}
    assert [row[1] for row in table] == sampled(toy / "model", rows)
    assert [row[2] for row in table] == sampled(run_of(tmp_path) / "export", rows)


def test_prompts_that_leave_no_room_for_an_answer_are_left_out_and_that_is_said(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    """A token is a byte, and the context 128: with answers of 100 a prompt of 28 is the longest."""
    prompts = ["x" * 29, "y" * 28, "z" * 60, "What does a saw do?"]
    words = with_prompts(toy_words, tmp_path, prompts)
    done = run_cli("fit", *words, "--model.max_new_tokens", 100, "--trainer.max_steps", 1)
    assert done.status == 0, done.err
    assert [prompt for prompt, _, _ in shown(done.out)] == [prompts[1], prompts[3]]
    (line,) = [line for line in done.err if "not answered" in line]
    assert re.search(r"2 of 4 prompts .* 100 tokens .* context of 128", line)
