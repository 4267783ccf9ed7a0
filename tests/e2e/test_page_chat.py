"""The page of the chat in a real browser: what a visitor types, and what stands there then."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_lightning.data import world
from tests.e2e.pages import CHROMIUM, QUESTION, answer, ask, choose_model, compare, open_page, served, visiting

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]


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


def test_a_folder_that_is_no_model_gets_a_sentence(tab: object, place: Path) -> None:
    (place / "empty").mkdir(exist_ok=True)
    choose_model(tab, str(place / "empty"))
    tab.get_by_text("has no config.json").wait_for()


def test_a_model_that_vanishes_gets_a_sentence(browser: object, place: Path) -> None:
    shutil.copytree(world.FOLDER, place / "copy")
    with served(place, "--model", "copy") as address, visiting(browser, address) as page:
        page.get_by_placeholder("Ask something").wait_for()
        shutil.rmtree(place / "copy")
        ask(page, QUESTION)
        page.get_by_text(re.compile("copy: no .* could be loaded|copy: no such folder")).wait_for()


def test_a_model_that_is_none_ends_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dpo_lightning", "chat", "--model", "./nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert done.returncode == 2
    assert "no such folder" in done.stderr and "Traceback" not in done.stderr


def test_markup_in_an_answer_is_text(browser: object, tmp_path: Path) -> None:
    """Of a model whose full stop is a script."""
    shutil.copytree(world.FOLDER, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    [stop] = [piece for piece in tokenizer["model"]["vocab"] if piece[0] == "."]
    stop[0] = "<b>.</b><script>window.broken=1</script>"
    file.write_text(json.dumps(tokenizer))
    with served(tmp_path, "--model", "model") as address, visiting(browser, address) as page:
        ask(page, QUESTION)
        assert "<b>.</b><script>window.broken=1</script>" in answer(page)
        open_page(page, "Compare")
        compare(page, QUESTION)
        assert "<script>" in page.locator(".dpo-shaded").first.inner_text()
        assert page.evaluate("window.broken") is None


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came_and_the_next_one_comes(
    browser: object, tmp_path: Path
) -> None:
    """Of a model that never comes to an end."""
    shutil.copytree(world.FOLDER, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(world.FOLDER, n_positions=4096, n_layer=12, n_embd=256)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with served(tmp_path, "--model", "model") as address, visiting(browser, address) as page:
        longest = page.get_by_label("Longest answer, in tokens")
        longest.fill("3000")
        longest.press("Enter")
        for number in range(2):
            ask(page, QUESTION)
            page.wait_for_function(
                "n => (document.querySelectorAll('[data-testid=stChatMessage]')[2 * n + 1]"
                "?.querySelector('.dpo-text')?.innerText ?? '').length > 10",
                arg=number,
            )
            begun = time.monotonic()
            page.get_by_role("button", name="Stop").click()
            stopped = answer(page, number)
            assert time.monotonic() - begun < 10
            assert len(stopped) > 10
        page.wait_for_timeout(1000)
        assert answer(page, 1) == stopped  # nothing comes after it


def test_pages_have_addresses_and_are_loaded_again(browser: object, address: str) -> None:
    with visiting(browser, f"{address}/?page=runs") as page:
        page.get_by_role("heading", name="Runs").wait_for()
        for name in ("Data", "Compare", "Chat"):
            open_page(page, name)
            page.reload()
            page.get_by_role("heading", name=name).wait_for()
            assert page.url.endswith(f"?page={name.lower()}")
            page.get_by_test_id("stButtonGroup").get_by_text(name, exact=True).first.click()  # it stays
            page.wait_for_timeout(500)
            assert page.get_by_role("heading", name=name).count() == 1


@pytest.mark.parametrize("by_streamlit", [False, True], ids=["chat", "streamlit run"])
def test_the_page_is_for_this_machine_alone_however_it_is_started(
    browser: object, tmp_path: Path, by_streamlit: bool
) -> None:
    shutil.copytree(world.FOLDER, tmp_path / "copy")
    with (
        served(tmp_path, "--model", "copy", by_streamlit=by_streamlit) as address,
        visiting(browser, address) as page,
    ):
        page.get_by_text("You are talking to").wait_for()
        page.locator(".dpo-text").get_by_text("copy", exact=True).wait_for()
        port = f"{int(address.rpartition(':')[2]):04X}"
        lines = [
            line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()
        ]
        listening = {line[1] for line in lines if line[1].endswith(f":{port}") and line[3] == "0A"}
        assert listening == {f"0100007F:{port}"}
