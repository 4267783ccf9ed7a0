"""The page of the chat in a real browser: what a visitor types, and what stands there then."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_lightning.data import world
from tests.e2e.pages import (
    CHROMIUM,
    QUESTION,
    answer,
    ask,
    choose_model,
    compare,
    endless,
    open_page,
    served,
    settle,
    visiting,
    warnings,
)

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
    settle(tab)
    field = tab.get_by_placeholder("Ask something")
    assert field.input_value() == "word " * 300  # to be shortened
    assert tab.get_by_test_id("stChatMessage").count() == 0
    ask(tab, QUESTION)
    answer(tab)
    assert not warnings(tab)
    field.fill("  ")
    tab.keyboard.press("Enter")
    tab.wait_for_timeout(500)
    assert tab.get_by_test_id("stChatMessage").count() == 2
    open_page(tab, "Compare")
    tab.get_by_role("button", name="Answer", exact=True).click()
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
        page.get_by_text(re.compile("copy: (no .* could be loaded|no such folder|there is no such folder)")).wait_for()


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
    endless(tmp_path / "model")
    with served(tmp_path, "--model", "model") as address, visiting(browser, address) as page:
        longest = page.get_by_label("Longest answer, in tokens", exact=True)
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
            assert len(stopped) > 10 and "stopped at" in stopped
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
        page.get_by_text("You are talking to copy", exact=True).wait_for()
        port = f"{int(address.rpartition(':')[2]):04X}"
        lines = [
            line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()
        ]
        listening = {line[1] for line in lines if line[1].endswith(f":{port}") and line[3] == "0A"}
        assert listening == {f"0100007F:{port}"}


def test_back_and_forward_are_pages_and_what_was_said_stays(browser: object, address: str) -> None:
    with visiting(browser, address) as page:
        ask(page, QUESTION)
        said = answer(page)
        open_page(page, "Compare")
        page.get_by_placeholder(QUESTION).fill("What is a baker?")
        page.get_by_placeholder(QUESTION).press("Tab")
        open_page(page, "Runs")
        for name in ("Compare", "Chat"):
            page.go_back()
            page.get_by_role("heading", name=name).wait_for()
            settle(page)
        assert page.get_by_test_id("stChatMessage").nth(1).inner_text() == said
        page.go_forward()
        page.get_by_role("heading", name="Compare").wait_for()
        settle(page)
        assert page.get_by_text("Compare", exact=True).first.is_visible() and page.url.endswith("page=compare")


def test_models_of_names_that_cannot_be_leave_the_other_pages_usable(tab: object) -> None:
    for name in ("~nobody-of-this-name/x", "a" * 300, "../../..", "no name/of a repository", "somebody/none"):
        open_page(tab, "Chat")
        choose_model(tab, name)
        assert name[:40] in warnings(tab)
        open_page(tab, "Runs")
        settle(tab)
        assert name[:40] not in warnings(tab)
    choose_model(tab, world.BASE)
    open_page(tab, "Chat")
    ask(tab, QUESTION)
    assert answer(tab)


def test_the_sidebar_is_heeded_and_the_model_is_in_the_address(browser: object, tmp_path: Path) -> None:
    shutil.copytree(world.FOLDER, tmp_path / "copy")
    with served(tmp_path) as address, visiting(browser, address) as page:
        ask(page, QUESTION)
        drawn = {answer(page)}
        for number in range(1, 9):  # another seed is another answer, if not the first
            seed = page.get_by_label("Seed", exact=True)
            seed.fill(str(number))
            seed.press("Enter")
            ask(page, QUESTION)
            drawn.add(answer(page, number))
            if len(drawn) > 1:
                break
        assert len(drawn) > 1
        page.get_by_role("button", name="Clear").click()
        page.wait_for_function("() => document.querySelectorAll('[data-testid=stChatMessage]').length == 0")
        page.get_by_role("slider", name="Temperature").press("Home")
        settle(page)
        for number in range(2):
            seed.fill(str(20 + number))
            seed.press("Enter")
            ask(page, QUESTION)
            answer(page, number)
        assert answer(page, 0) == answer(page, 1)  # at temperature 0 the seed is nothing
        choose_model(page, "copy")
        open_page(page, "Data")
        open_page(page, "Chat")
        assert "model=copy" in page.url
        page.get_by_text("You are talking to copy").wait_for()
        assert page.get_by_test_id("stChatMessage").nth(1).inner_text().endswith(world.BASE)  # whose answer that was
        (tmp_path / "runs/new/version_0").mkdir(parents=True)
        shutil.copytree(world.FOLDER, tmp_path / "runs/new/version_0/export")
        ask(page, QUESTION)
        answer(page, 2)
        page.get_by_text("You are talking to copy").wait_for()  # a new export changes no choice
        page.reload()
        page.get_by_text("You are talking to copy").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_page_fits_a_narrow_screen_in_light_and_dark(browser: object, address: str, scheme: str) -> None:
    with visiting(browser, address, width=400, scheme=scheme) as page:
        ask(page, QUESTION)
        answer(page)
        for name in ("Chat", "Compare", "Runs", "Data"):
            open_page(page, name)
            if name == "Compare":
                compare(page, QUESTION)
            settle(page)
            body = page.get_by_test_id("stMainBlockContainer")
            assert body.evaluate("element => element.parentElement.scrollWidth") <= 400, name
            ground = page.evaluate(
                "() => getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor"
            )
            assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 600) == (scheme == "light")
        page.get_by_role("button", name="Inspect").click()
        page.frame_locator("iframe").get_by_role("heading", name="What is in the data").wait_for()
        body = page.frame_locator("iframe").locator("body")
        ground = body.evaluate("element => getComputedStyle(element).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 600) == (scheme == "light")


def test_an_option_that_is_none_gets_a_sentence(browser: object, tmp_path: Path) -> None:
    with (
        served(tmp_path, "--modell", "x", by_streamlit=True) as address,
        visiting(browser, address) as page,
    ):
        page.get_by_text("the page was started with options that it does not take").wait_for()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--port", "99999"], "ports are numbered from 1 to 65535"),
        (["--address", "nonsense.invalid"], "this machine has no such address"),
        (["--port", "taken"], "is taken; give another"),
    ],
)
def test_a_place_that_cannot_be_ends_the_command(words: list[str], sentence: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = [str(taken.getsockname()[1]) if word == "taken" else word for word in words]
        command = [sys.executable, "-m", "dpo_lightning", "chat", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert done.returncode == 2
    assert sentence in done.stderr and "Traceback" not in done.stderr
