"""The page in a real browser: what a visitor types, and what stands there then."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_lightning.data import world
from tests.e2e.pages import CHROMIUM, FLAGS, answer, ask, open_page, served, visiting

pytest.importorskip("streamlit")
playwright = pytest.importorskip("playwright.sync_api")

QUESTION = "What does an electrician do?"

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]


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


def choose_model(page: object, name: str) -> None:
    chosen = page.get_by_label("Model", exact=True)
    chosen.fill(name)
    chosen.press("Enter")


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
    choose_model(tab, str(place / "empty"))
    tab.get_by_text("has no config.json").wait_for()


def test_a_model_that_vanishes_gets_a_sentence(browser: object, place: Path) -> None:
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
        page.get_by_placeholder(QUESTION).fill(QUESTION)
        page.get_by_role("button", name="Answer").click()
        page.get_by_text("implicit reward").first.wait_for()
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
        page.get_by_label("Temperature").press("Home")  # as different as can be
        page.get_by_text("Blind: shuffled").click()
        for number in range(8):
            page.get_by_placeholder(QUESTION).fill(f"What is a baker? {number}")
            page.get_by_role("button", name="Answer").click()
            page.get_by_text(f"What is a baker? {number}", exact=True).last.wait_for()
            page.get_by_text("Answer A").wait_for()
            if page.get_by_text("Both answers are the same").count():
                break
        assert page.get_by_text("Answer A: ").count() == 0 and page.get_by_text("log-probability").count() == 0
        slider = page.get_by_label("Temperature")
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
        page.get_by_label("Temperature").press("End")
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


def test_a_run_is_seen_growing_while_a_fit_writes_it(tab: object, place: Path) -> None:
    words = ["--model.checkpoint", world.BASE, "--data.source", "world:pairs", "--trainer.max_steps", "200"]
    words += ["--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "2", "--trainer.accelerator", "cpu"]
    words += ["--trainer.default_root_dir", "runs/live", "--model.try_longest", "false", "--model.samples", "0"]
    command = [sys.executable, "-m", "dpo_lightning", "fit", *words]
    fit = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        open_page(tab, "Runs")
        for _ in range(60):
            if list((place / "runs/live").glob("version_0/metrics.csv")):
                break
            time.sleep(1)
        tab.reload()
        tab.get_by_text("live/version_0", exact=True).first.wait_for()
        tab.get_by_text("Training", exact=True).click()
        steps = []
        for _ in range(240):
            shown = tab.get_by_text(re.compile(r"^Step \d+$"))
            steps += [int(text.removeprefix("Step ")) for text in shown.all_inner_texts()]
            if fit.poll() is not None or len({*steps}) > 2:
                break
            time.sleep(0.5)
        assert len({*steps}) > 2 and steps == sorted(steps)
    finally:
        fit.terminate()
        fit.wait(60)


def test_a_run_of_tensorboard_s_files_alone_has_curves_and_samples_over_time(tab: object, place: Path) -> None:
    run = place / "runs" / "elsewhere" / "version_7"
    with SummaryWriter(str(run)) as writer:
        for step in (5, 10, 15):
            writer.add_scalar("val/rewards/accuracies", 0.5 + step / 100, step)
            writer.add_text("val/samples", f"| prompt | answer |\n|---|---|\n| who | answer of step {step} |", step)
    open_page(tab, "Runs")
    tab.get_by_text("elsewhere/version_7", exact=True).first.wait_for()  # the latest is shown
    tab.get_by_text("Step 15", exact=True).wait_for()
    tab.get_by_text("elsewhere/version_7: samples").click()
    tab.get_by_text("answer of step 15").wait_for()
    tab.get_by_role("slider", name="Step").press("Home")
    tab.get_by_text("answer of step 5").wait_for()


def test_data_is_reported_and_a_source_that_is_none_gets_a_sentence(tab: object, place: Path) -> None:
    open_page(tab, "Data")
    tab.get_by_role("button", name="Inspect").click()
    report = tab.frame_locator("iframe")
    report.get_by_role("heading", name="What is in the data").wait_for()
    assert "world:pairs" in report.locator("body").inner_text()
    report.get_by_role("heading", name="What to change").wait_for()
    source = tab.get_by_label("Source", exact=True)
    source.fill("nothing.jsonl")
    source.press("Enter")
    tab.get_by_role("button", name="Inspect").click()
    tab.get_by_text("nothing.jsonl: no such file or folder").wait_for()


def test_a_model_is_loaded_once_and_a_hundred_questions_take_no_memory(browser: object, tmp_path: Path) -> None:
    with served(tmp_path) as address, visiting(browser, address) as page, visiting(browser, address) as other:
        for tab in (page, other):
            tab.get_by_label("Longest answer, in tokens").fill("4")
            tab.get_by_label("Longest answer, in tokens").press("Enter")
            ask(tab, QUESTION)
            answer(tab)
        assert (tmp_path / "page.log").read_text().count("Loaded world:base") == 1
        resident = []
        for number in range(1, 121):
            ask(page, f"What is a baker? {number}")
            answer(page, number % 10)
            if number % 10 == 9:
                page.get_by_role("button", name="Clear").click()
                page.wait_for_function("() => document.querySelectorAll('[data-testid=stChatMessage]').length == 0")
                ask(page, QUESTION)
                answer(page)
            resident.append(resident_megabytes(tmp_path))
        assert resident[-1] - resident[19] < 16, resident[19::10]


def resident_megabytes(folder: Path) -> float:
    """Of the server whose log is in a folder."""
    status = Path(f"/proc/{(folder / 'page.pid').read_text()}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024
