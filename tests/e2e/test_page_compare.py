"""The page of the comparison in a real browser: shades, rewards, votes, and a model trained on them."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_lightning.data import world
from tests.e2e.pages import CHROMIUM, QUESTION, answer, ask, choose_model, open_page, served, visiting

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]


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


def test_of_a_blind_comparison_whose_they_are_is_told_after_the_vote(browser: object, tmp_path: Path) -> None:
    """The two models are copies, so that only their names tell them apart."""
    for name in ("first", "second"):
        shutil.copytree(world.FOLDER, tmp_path / name)
    sides = set()
    with (
        served(tmp_path, "--model", "first", "--reference", "second") as address,
        visiting(browser, address) as page,
    ):
        open_page(page, "Compare")
        page.get_by_role("slider", name="Temperature").press("Home")  # as different as can be
        page.get_by_text("Blind: shuffled").click()
        for number in range(8):
            page.get_by_placeholder(QUESTION).fill(f"What is a baker? {number}")
            page.get_by_role("button", name="Answer").click()
            page.get_by_text(f"What is a baker? {number}", exact=True).last.wait_for()
            page.get_by_text("Answer A").wait_for()
            if page.get_by_text("Both answers are the same").count():
                break
        assert page.get_by_text("Answer A: ").count() == 0 and page.get_by_text("log-probability").count() == 0
        slider = page.get_by_role("slider", name="Temperature")
        for _ in range(40):
            slider.press("ArrowRight")
        for number in range(12):
            page.get_by_placeholder(QUESTION).fill(f"What is a chef? {number}")
            page.get_by_role("button", name="Answer").click()
            page.get_by_text(f"What is a chef? {number}", exact=True).last.wait_for()
            page.get_by_role("button", name="A is better").or_(page.get_by_text("Both answers are the same")).wait_for()
            if page.get_by_text("Both answers are the same").count():
                continue
            assert page.get_by_text("Answer A: ").count() == 0
            page.get_by_role("button", name="A is better").click()
            page.get_by_text("to train on so far").wait_for()
            side = "policy" if page.get_by_text("Answer A: policy").count() else "reference"
            row = json.loads((tmp_path / "votes.jsonl").read_text().splitlines()[-1])
            assert row["chosen_model"] == {"policy": "first", "reference": "second"}[side]
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
            page.get_by_placeholder(QUESTION).fill(question)
            page.get_by_role("button", name="Answer").click()
            page.get_by_text(question, exact=True).last.wait_for()
            page.get_by_role("button", name="A is better").or_(page.get_by_text("Both answers are the same")).wait_for()
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
        ask(page, QUESTION)
        answer(page)
        open_page(page, "Compare")
        page.get_by_placeholder(QUESTION).fill("What does a baker do?")
        page.get_by_role("button", name="Answer").click()
        page.get_by_text("implicit reward").first.wait_for()
        shaded = page.locator(".dpo-shaded span")
        titles = [float(shaded.nth(number).get_attribute("title")) for number in range(shaded.count())]
        assert any(abs(reward) > 0.005 for reward in titles)
        depths = [re.search(r"rgba\(.*, ([\d.]+)\)", span.get_attribute("style")) for span in shaded.all()]
        assert max(float(depth[1]) for depth in depths) == 0.75  # the strongest is shaded most
        rewards = re.findall(r"implicit reward: ([+-][\d.]+), beta 0.1", page.inner_text("body"))
        assert len(rewards) == 2 and any(float(reward) != 0 for reward in rewards)
