"""The page in a real browser: what a visitor types, and what stands there then."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.processes import free_port

pytest.importorskip("streamlit")
playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
QUESTION = "What does an electrician do?"
ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]

#: Milliseconds that anything on a page may take on a busy machine.
PATIENCE = 60_000


@contextmanager
def served(folder: Path, *words: object) -> Iterator[str]:
    """`chat WORDS` in a folder; its address once it is up."""
    port = free_port()
    command = [sys.executable, "-m", "dpo_lightning", "chat", "--port", str(port), *map(str, words)]
    with (folder / "page.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(600):
                assert server.poll() is None, (folder / "page.log").read_text()
                try:
                    urllib.request.urlopen(f"{address}/_stcore/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.1)
            yield address
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    with served(place) as found:
        yield found


@pytest.fixture
def tab(browser: object, address: str) -> Iterator[object]:
    """A new visitor's tab; nothing may have gone wrong in it."""
    with visiting(browser, address) as page:
        yield page


@contextmanager
def visiting(browser: object, address: str) -> Iterator[object]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(address)
    yield page
    seen = page.inner_text("body")
    context.close()
    assert not wrong
    assert "Traceback" not in seen and "error running app" not in seen.lower()


def ask(page: object, question: str) -> None:
    page.get_by_placeholder("Ask something").fill(question)
    page.keyboard.press("Enter")


def answer(page: object, number: int = 0) -> str:
    """The text of an answer that has come to its end."""
    page.wait_for_function(
        "n => document.querySelectorAll('[data-testid=stChatMessage]').length >= 2 * n + 2"
        " && !document.body.innerText.includes('Stop')",
        arg=number,
    )
    return page.get_by_test_id("stChatMessage").nth(2 * number + 1).inner_text()


def open_page(page: object, name: str) -> None:
    page.get_by_test_id("stTopNavLink").filter(has_text=name).click()
    page.get_by_role("heading", name=name).wait_for()


def test_the_built_in_model_answers_in_time(tab: object) -> None:
    ask(tab, "What is a baker?")
    answer(tab)  # the model is loaded by now
    ask(tab, QUESTION)
    began = time.monotonic()
    tab.wait_for_function(
        "() => (document.querySelectorAll('[data-testid=stChatMessage]')[3]?.querySelector('.dpo-text')?.innerText"
        " ?? '').trim().length > 0"
    )
    first = time.monotonic() - began
    assert answer(tab, 1).strip().endswith(".")
    whole = time.monotonic() - began
    print(f"first token after {first:.2f} s, answer after {whole:.2f} s")
    assert first < 1.5 and whole < 5


def test_a_question_s_markup_is_text(tab: object) -> None:
    for number, question in enumerate(("<b>bold</b><script>window.broken = 1</script>", "**stars** $x$ 🦊 مرحبا")):
        ask(tab, question)
        answer(tab, number)
    shown = tab.get_by_test_id("stChatMessage").locator(".dpo-text")
    assert shown.nth(0).inner_text() == "<b>bold</b><script>window.broken = 1</script>"
    assert "**stars** $x$ 🦊 مرحبا" in shown.all_inner_texts()
    assert tab.evaluate("window.broken") is None


def test_a_long_prompt_and_an_empty_one_get_a_sentence(tab: object) -> None:
    ask(tab, "word " * 300)
    tab.get_by_text("longer than the model's context of 96").wait_for()
    ask(tab, QUESTION)
    answer(tab)
    open_page(tab, "Compare")
    tab.get_by_role("button", name="Answer").click()
    tab.get_by_text("The prompt is empty").wait_for()


def test_two_tabs_have_histories_of_their_own(browser: object, address: str, tab: object) -> None:
    with visiting(browser, address) as other:
        ask(tab, QUESTION)
        ask(other, "What is a baker?")
        assert answer(tab) and answer(other)
        assert "baker" not in tab.get_by_test_id("stChatMessage").first.inner_text()
        assert "electrician" not in other.get_by_test_id("stChatMessage").first.inner_text()


def test_a_comparison_is_scored_and_voted_on_twice_clicked_once_written(tab: object, place: Path) -> None:
    (place / "votes.jsonl").unlink(missing_ok=True)
    open_page(tab, "Compare")
    tab.get_by_placeholder(QUESTION).fill(QUESTION)
    tab.get_by_role("button", name="Answer").click()
    tab.get_by_text("implicit reward").first.wait_for()
    shown = tab.locator(".dpo-shaded").all_inner_texts()
    assert len(shown) == 2
    # The policy is the reference: every token is worth the same to both.
    assert "implicit reward: +0.000" in tab.inner_text("body")
    tab.get_by_role("button", name="B is better").dblclick()
    tab.get_by_text("1 vote to train on").wait_for()
    [row] = [json.loads(line) for line in (place / "votes.jsonl").read_text().splitlines()]
    assert row["prompt"] == QUESTION
    assert row["chosen"].strip() == shown[1].replace("<|endoftext|>", "").strip()
    assert row["rejected"].strip() == shown[0].replace("<|endoftext|>", "").strip()
    assert row["sampling"]["temperature"] == 0.7 and re.match(r"20\d\d-", row["time"])


def test_a_folder_that_is_no_model_gets_a_sentence(tab: object, place: Path) -> None:
    (place / "empty").mkdir(exist_ok=True)
    chosen = tab.get_by_label("Model", exact=True)
    chosen.fill(str(place / "empty"))
    chosen.press("Enter")
    tab.get_by_text("has no config.json").wait_for()


def test_a_model_that_vanishes_gets_a_sentence(browser: object, place: Path) -> None:
    from dpo_lightning.data import world

    shutil.copytree(world.FOLDER, place / "copy")
    with served(place, "--model", "copy") as address, visiting(browser, address) as page:
        page.get_by_placeholder("Ask something").wait_for()
        shutil.rmtree(place / "copy")
        ask(page, QUESTION)
        page.get_by_text(re.compile("copy: no .* could be loaded|copy: no such folder")).wait_for()


def test_a_run_that_grows_is_drawn_as_it_grows(tab: object, place: Path) -> None:
    run = place / "runs" / "growing" / "version_0"
    run.mkdir(parents=True, exist_ok=True)
    lines = ["step,val/loss,val/rewards/accuracies"]
    lines += [f"{step},{0.7 - step / 1000},{0.5 + step / 1000}" for step in (10, 20)]
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    open_page(tab, "Runs")
    tab.get_by_text("Step 20").wait_for()
    (run / "metrics.csv").write_text("\n".join([*lines, "30,0.6,0.55"]) + "\n")
    tab.get_by_text("Step 30").wait_for()


def test_a_model_that_is_none_ends_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dpo_lightning", "chat", "--model", "./nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert done.returncode == 2
    assert "no such folder" in done.stderr and "Traceback" not in done.stderr
