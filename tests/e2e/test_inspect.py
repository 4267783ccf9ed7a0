"""`inspect` as a person calls it: a report in the terminal and as one file, which a browser opens by itself."""

import gzip
import json
import re
import shutil
import time
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import SHARED, RunCli

DATA = SHARED / "data"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with GPT-2's tokenizer and context, and a model of next to nothing."""
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copytree(SHARED / "tokenizers" / "gpt2", folder, dirs_exist_ok=True)
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    return folder


def words_for(toy: Path, tmp_path: Path) -> list[object]:
    options = {"model.checkpoint": toy / "model", "data.source": toy / "pairs.jsonl", "data.val_fraction": 0.2}
    return [w for name, value in options.items() for w in (f"--{name}", value)] + [
        "--trainer.default_root_dir",
        tmp_path / "runs",
    ]


def test_the_report_goes_to_the_terminal_and_into_the_runs_directory(
    run_cli: RunCli, toy: Path, tmp_path: Path
) -> None:
    done = run_cli("inspect", *words_for(toy, tmp_path))
    assert done.status == 0, done.err
    report = tmp_path / "runs/version_0/inspect.html"
    assert str(report) in done.out.replace("\n", "")
    for section in ("Sources", "Tokens, before any cut", "What max_length cuts", "Repetitions", "What to change"):
        assert section in done.out
    assert done.out.index("What to change") > done.out.index("Sample row")
    assert not (tmp_path / "runs/version_0/ledger.csv").exists()  # nothing was dropped
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["version_0"]


def test_the_file_has_all_that_it_shows(run_cli: RunCli, toy: Path, tmp_path: Path) -> None:
    assert run_cli("inspect", *words_for(toy, tmp_path)).status == 0
    page = (tmp_path / "runs/version_0/inspect.html").read_text()
    assert page.count("<svg") == 4 and "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', page)
    assert not re.search(r"url\((?!#)", page) and "@import" not in page


def test_a_text_that_looks_like_html_is_shown_as_text(run_cli: RunCli, toy: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (toy / "pairs.jsonl").read_text().splitlines()]
    rows = [row | {"prompt": f"<script>alert({i})</script>"} for i, row in enumerate(rows)]
    source = tmp_path / "<b>rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_cli("inspect", *words_for(toy, tmp_path), "--data.source", source).status == 0
    page = (tmp_path / "runs/version_0/inspect.html").read_text()
    assert (
        "<script" not in page
        and "<b>rows" not in page
        and "&lt;script&gt;" in page.replace('</span><wbr><span class="prompt">', "")
    )


def test_the_config_of_a_fit_is_enough_and_its_run_is_left_alone(
    run_cli: RunCli, toy: Path, toy_words: list[str], tmp_path: Path
) -> None:
    assert run_cli("fit", *toy_words, "--trainer.max_steps", 2).status == 0
    run = tmp_path / "runs/version_0"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = run_cli("inspect", "--config", run / "config.yaml")
    assert done.status == 0, done.err
    assert (tmp_path / "runs/version_1/inspect.html").exists()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    # A report is no run to go on from: the newest checkpoint is still found.
    assert run_cli("validate", "--config", run / "config.yaml", "--ckpt_path", "last").status == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.source", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--data.format", "dialogues"], "none of the first 60 rows can be used as dialogues; row 0: chosen has no"),
        (["--data.fromat", "triples"], "did you mean data.format"),
        (["--data.max_length", "100000"], "data.max_length is 100000"),
        (["--data.weights", "[1]"], "data.weights has 1 numbers for 1 sources"),
        (["--data.chat_template", "nowhere.jinja"], "data.chat_template: nowhere.jinja cannot be read"),
    ],
)
def test_what_cannot_be_inspected_is_said_and_leaves_nothing_behind(
    words: list[str], said: str, run_cli: RunCli, toy: Path, tmp_path: Path
) -> None:
    done = run_cli("inspect", *words_for(toy, tmp_path), *words)
    assert done.status == 2 and said in done.err[-1]
    assert not (tmp_path / "runs").exists()


def test_a_stream_is_inspected_by_its_first_window(run_cli: RunCli, toy: Path, tmp_path: Path) -> None:
    words = ["--model.checkpoint", toy / "model", "--data.source", toy / "pairs.jsonl", "--data.streaming", "true"]
    words += ["--data.val_source", toy / "pairs.jsonl", "--data.shuffle_buffer", 25]
    done = run_cli("inspect", *words, "--trainer.default_root_dir", tmp_path / "runs")
    assert done.status == 0, done.err
    assert "25 pairs train" in done.out and "60 validate" in done.out


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_opens_it_without_network_and_without_errors(run_cli: RunCli, toy: Path, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    assert run_cli("inspect", *words_for(toy, tmp_path)).status == 0
    report = tmp_path / "runs/version_0/inspect.html"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        for width in (1000, 390):
            page = browser.new_context(offline=True, viewport={"width": width, "height": 800}).new_page()
            errors: list[str] = []
            requests: list[str] = []
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.on("console", lambda message, errors=errors: errors.append(message.text))
            page.on("request", lambda request, requests=requests: requests.append(request.url))
            page.goto(report.as_uri())
            assert errors == [] and requests == [report.as_uri()]
            figures = page.locator("svg")
            assert figures.count() == 4
            assert all(figures.nth(i).bounding_box()["width"] > 200 for i in range(4))
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the window"
            script = "part => getComputedStyle(document.querySelector('.tokens .' + part)).borderBottomColor"
            masks = [page.evaluate(script, part) for part in ("prompt", "chosen")]
            assert masks[0] != masks[1], "the loss mask cannot be seen"
        browser.close()


@pytest.mark.realdata
def test_each_row_of_real_preferences_is_accounted_for_by_name_and_soon(
    run_cli: RunCli, gpt2: Path, tmp_path: Path
) -> None:
    source = DATA / "rm-static-test.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    empty = [i for i, row in enumerate(rows) if not (row["chosen"].strip() and row["rejected"].strip())]
    same = [i for i, row in enumerate(rows) if i not in empty and row["chosen"] == row["rejected"]]
    places: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        places.setdefault(row["prompt"], []).append(i)
    [twice] = [where for where in places.values() if len(where) > 1]
    assert (len(rows), len(empty), len(same), len(twice)) == (5103, 4, 34, 2)
    words = ["--model.checkpoint", gpt2, "--data.source", source, "--trainer.default_root_dir", tmp_path / "runs"]
    start = time.monotonic()
    done = run_cli("inspect", *words)
    seconds = time.monotonic() - start
    assert done.status == 0, done.err
    page = (tmp_path / "runs/version_0/inspect.html").read_text()
    for reason, which in (("chosen and rejected are identical", same), ("rejected is empty", empty)):
        named = ", ".join(f"row {row}" for row in which)
        assert re.search(rf"{reason}</td><td class=\"n\">{len(which)}</td>.*?{named}", page, re.DOTALL)
    assert f"row {twice[0]} and row {twice[1]}" in page and f"row {twice[0]} and row {twice[1]}" in done.out
    ledger = (tmp_path / "runs/version_0/ledger.csv").read_text().splitlines()
    assert len(ledger) == 1 + len(same) + len(empty)
    # Alone it takes a third of it; the limit is for a machine with other work. Imports are not in it.
    assert seconds < 30
