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
from tests.e2e.pages import CHROMIUM, QUESTION, answer, ask, choose_model, compare, open_page, served, visiting

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
    tab.get_by_role("button", name="B is better").dblclick()
    tab.get_by_text("1 vote to train on").wait_for()
    [row] = [json.loads(line) for line in (place / "votes.jsonl").read_text().splitlines()]
    assert row["prompt"] == QUESTION
    assert row["chosen"].strip() == shown[1].replace("<|endoftext|>", "").strip()
    assert row["rejected"].strip() == shown[0].replace("<|endoftext|>", "").strip()
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
        assert max(float(depth[1]) for depth in depths) == 0.75  # the strongest is shaded most
        rewards = re.findall(r"implicit reward: ([+-][\d.]+), beta 0.1", page.inner_text("body"))
        assert len(rewards) == 2 and any(float(reward) != 0 for reward in rewards)
