"""The page as a visitor's browser has it: served, opened, asked."""

import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_lightning.data import world
from tests.e2e.processes import free_port

CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]

ROOT = Path(__file__).parents[2]

QUESTION = "What does an electrician do?"

#: Whether the server has said all that it has to say, in a browser's words.
AT_REST = (
    "document.querySelector('[data-testid=stApp]').getAttribute('data-test-script-state') === 'notRunning'"
    " && !document.querySelector('[data-stale=true]')"
)

#: Milliseconds that anything on a page may take on a busy machine.
PATIENCE = 60_000


@contextmanager
def served(folder: Path, *words: object, by_streamlit: bool = False) -> Iterator[str]:
    """`chat WORDS` in a folder, or `streamlit run ui/app.py -- WORDS`; its address once it is up."""
    port = free_port()
    start = ["dpo_lightning", "chat", "--port", str(port)]
    if by_streamlit:
        start = ["streamlit", "run", str(ROOT / "ui" / "app.py"), "--server.port", str(port), "--"]
    command = [sys.executable, "-m", *start, *map(str, words)]
    with (folder / "page.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        (folder / "page.pid").write_text(str(server.pid))
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


@contextmanager
def visiting(browser: object, address: str, width: int = 1280, scheme: str = "light") -> Iterator[object]:
    """A new visitor's tab, in which nothing may go wrong."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
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
        f" && !document.body.innerText.includes('Stop') && ({AT_REST})",
        arg=number,
    )
    return page.get_by_test_id("stChatMessage").nth(2 * number + 1).inner_text()


def open_page(page: object, name: str) -> None:
    page.get_by_test_id("stButtonGroup").get_by_text(name, exact=True).first.click()
    page.get_by_role("heading", name=name).wait_for()


def choose_model(page: object, name: str) -> None:
    """Type a model's name in the sidebar, and take it."""
    page.get_by_label("Model", exact=True).fill(name)
    page.get_by_role("option").last.click()
    settle(page)


def warnings(page: object) -> str:
    """What stands in boxes."""
    return "\n".join(page.get_by_test_id("stAlert").all_inner_texts())


def compare(page: object, question: str) -> None:
    """Ask on the page of the comparison, and wait until both answers and what follows stand there."""
    page.get_by_placeholder(QUESTION).fill(question)
    page.get_by_role("button", name="Answer", exact=True).click()
    page.locator(".dpo-text").get_by_text(question, exact=True).wait_for()
    page.get_by_role("button", name="Stop").wait_for(state="detached")
    settle(page)


def settle(page: object) -> None:
    """Wait until the server has said all that it has to say."""
    calm = 0
    while calm < 3:  # it has heard of a click, and begins nothing more of itself
        page.wait_for_timeout(150)
        page.wait_for_function(f"() => {AT_REST}")
        calm = calm + 1 if page.evaluate(f"() => {AT_REST}") else 0


def endless(folder: Path) -> None:
    """A model of random weights that never comes to an end, nor soon to its longest answer."""
    shutil.copytree(world.FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(world.FOLDER, n_positions=4096, n_layer=12, n_embd=256)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
