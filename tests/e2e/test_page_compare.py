"""The page of the comparison in a real browser: shades, rewards, votes, and a model trained on them."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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
)

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]


def test_a_comparison_is_scored_and_voted_on_twice_clicked_once_written(tab: object, place: Path) -> None:
    (place / "votes.jsonl").unlink(missing_ok=True)
    open_page(tab, "Compare")
    compare(tab, QUESTION)
    tab.get_by_text("implicit reward").first.wait_for()
    shown = tab.locator(".dpo-shaded").all_inner_texts()
    assert len(shown) == 2
    # The policy is the reference: every token is worth the same to both.
    assert "implicit reward: +0.000" in tab.inner_text("body")
    assert all(text.rstrip().endswith("∎") for text in shown)
    tab.get_by_role("button", name="B is better").dblclick()
    tab.get_by_text("1 vote to train on").wait_for()
    tab.get_by_text("Vote on another prompt, too").wait_for()
    assert tab.get_by_test_id("stCode").count() == 0  # a fit of one prompt has none to validate on
    [row] = [json.loads(line) for line in (place / "votes.jsonl").read_text().splitlines()]
    assert row["prompt"] == QUESTION
    assert row["chosen"].strip() == shown[1].replace("∎", "").strip()
    assert row["rejected"].strip() == shown[0].replace("∎", "").strip()
    assert row["sampling"]["temperature"] == 0.7 and re.match(r"20\d\d-", row["time"])


def test_of_a_blind_comparison_whose_they_are_is_told_after_the_vote(browser: object, tmp_path: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree(world.FOLDER, tmp_path / name)
    weights = load_file(tmp_path / "second/model.safetensors")
    torch.manual_seed(0)
    moved = {name: value + 0.05 * torch.randn_like(value) for name, value in weights.items()}
    save_file(moved, tmp_path / "second/model.safetensors", metadata={"format": "pt"})
    sides = set()
    with (
        served(tmp_path, "--model", "first", "--reference", "second") as address,
        visiting(browser, address) as page,
    ):
        open_page(page, "Compare")
        page.get_by_text("Blind: shuffled").click()
        for number in range(16):
            compare(page, f"What is a chef? {number}")
            if page.get_by_text("Both answers are the same").count():
                continue
            for hidden in ("Answer A: ", "log-probability", "implicit reward", "likelier after training"):
                assert page.get_by_text(hidden).count() == 0
            page.get_by_role("button", name="A is better").click()
            page.get_by_text("to train on so far").wait_for()
            side = "policy" if page.get_by_text("Answer A: policy").count() else "reference"
            row = json.loads((tmp_path / "votes.jsonl").read_text().splitlines()[-1])
            assert row["chosen_model"] == {"policy": "first", "reference": "second"}[side] and row["blind"]
            assert row["chosen"].strip() in page.locator(".dpo-shaded").first.inner_text()
            sides.add(side)
            if len(sides) == 2:
                break
    assert sides == {"policy", "reference"}


def test_votes_are_trained_on_and_the_page_shows_the_new_model(browser: object, tmp_path: Path) -> None:
    """Vote, run the command that stands there, choose the model that it made, and see what it learned."""
    with served(tmp_path) as address, visiting(browser, address) as page:
        open_page(page, "Compare")
        page.get_by_role("slider", name="Temperature").press("End")
        cast = 0
        for number, subject in enumerate(("baker", "chef", "nurse", "painter", "farmer", "teacher", "pilot", "judge")):
            question = f"What does a {subject} do?"
            compare(page, question)
            if page.get_by_text("Both answers are the same").count():
                continue
            page.get_by_role("button", name=("A is better", "B is better")[number % 2]).click()
            cast += 1
            page.get_by_text(f"{cast} vote").wait_for()
        assert cast >= 5
        command = shlex.split(page.get_by_test_id("stCode").inner_text())
        assert command[:4] == ["python", "-m", "dpo_lightning", "fit"]
        words = [sys.executable, *command[1:], "--trainer.accelerator", "cpu", "--trainer.max_steps", "20"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        trained = Path("runs") / "votes" / "version_0" / "export"
        assert (tmp_path / trained / "model.safetensors").exists()

        open_page(page, "Runs")
        page.get_by_text("votes/version_0", exact=True).first.wait_for()
        page.get_by_text("Accuracy", exact=True).wait_for()
        page.reload()
        choose_model(page, str(trained))
        open_page(page, "Chat")
        ask(page, QUESTION)
        answer(page)
        open_page(page, "Compare")
        compare(page, "What does a baker do?")
        shaded = page.locator(".dpo-shaded span")
        titles = [float(shaded.nth(number).get_attribute("title")) for number in range(shaded.count())]
        assert any(abs(reward) > 0.005 for reward in titles)
        depths = [re.search(r"rgba\(.*, ([\d.]+)\)", span.get_attribute("style")) for span in shaded.all()]
        assert max(float(depth[1]) for depth in depths) == 0.6  # the strongest is shaded most
        rewards = re.findall(r"implicit reward: ([+-][\d.]+), beta 0.1", page.inner_text("body"))
        assert len(rewards) == 2 and any(float(reward) != 0 for reward in rewards)


def test_answers_that_are_cut_say_so_and_what_a_vote_on_them_would_teach(tab: object, place: Path) -> None:
    (place / "votes.jsonl").unlink(missing_ok=True)
    longest = tab.get_by_label("Longest answer, in tokens", exact=True)
    longest.fill("3")
    longest.press("Enter")
    settle(tab)
    open_page(tab, "Compare")
    assert longest.input_value() == "3"
    tab.get_by_role("slider", name="Temperature").press("End")
    for number in range(8):  # until the answers differ
        compare(tab, f"What does a chef do? {number}")
        if not tab.get_by_text("Both answers are the same").count():
            break
    tab.get_by_text("cut at 3 tokens").first.wait_for()
    tab.get_by_text("An answer did not come to its own end").wait_for()
    tab.get_by_role("button", name="Tie").click()
    tab.get_by_text("votes.ties.jsonl").wait_for()
    row = json.loads((place / "votes.ties.jsonl").read_text().splitlines()[-1])
    assert row["cut"] == [True, True] and row["sampling"]["max_new_tokens"] == 3
    assert row["sampling"]["temperature"] == 2.0


def test_a_file_that_holds_no_votes_is_not_written_to(browser: object, tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text("mine\n")
    with served(tmp_path, "--votes", "notes.jsonl") as address, visiting(browser, address) as page:
        open_page(page, "Compare")
        compare(page, QUESTION)
        page.get_by_text("notes.jsonl is no file of votes").wait_for()
        assert page.get_by_role("button", name="A is better").count() == 0
    assert (tmp_path / "notes.jsonl").read_text() == "mine\n"


def test_a_comparison_that_is_stopped_or_left_keeps_what_stood_there(browser: object, tmp_path: Path) -> None:
    """Of models that never come to an end."""
    endless(tmp_path / "model")
    with served(tmp_path, "--model", "model", "--reference", "model") as address, visiting(browser, address) as page:
        longest = page.get_by_label("Longest answer, in tokens", exact=True)
        longest.fill("4")
        longest.press("Enter")
        open_page(page, "Compare")
        compare(page, QUESTION)
        before = page.locator(".dpo-shaded").all_inner_texts()
        assert len(before) == 2
        longest.fill("3000")
        longest.press("Enter")
        settle(page)
        page.get_by_placeholder(QUESTION).fill("What is a baker?")
        page.get_by_role("button", name="Answer", exact=True).click()
        page.get_by_role("button", name="Stop").wait_for()
        page.wait_for_timeout(1500)
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped before both had answered").wait_for()
        settle(page)
        assert page.locator(".dpo-shaded").all_inner_texts() == before
        page.get_by_role("button", name="Answer", exact=True).click()
        page.get_by_role("button", name="Stop").wait_for()
        page.wait_for_timeout(1500)
        open_page(page, "Chat")
        ask(page, QUESTION)  # the model is free for it
        page.get_by_role("button", name="Stop").wait_for()
        page.wait_for_function("() => (document.querySelectorAll('.dpo-text')[1]?.innerText ?? '').length > 10")
        page.get_by_role("button", name="Stop").click()
        assert "stopped at" in answer(page)
