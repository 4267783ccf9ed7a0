"""The pages of runs and of data in a real browser."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from dpo_lightning.data import world
from tests.e2e.pages import CHROMIUM, open_page, served, settle, visiting, warnings

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]


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
        choose_run(tab, "live/version_0")  # offered without the page being loaded again
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
    choose_run(tab, "elsewhere/version_7")
    tab.get_by_text("Step 15", exact=True).wait_for()
    settle(tab)
    tab.get_by_text("elsewhere/version_7: samples").click()
    tab.get_by_text("answer of step 15").wait_for()
    tab.get_by_role("slider", name="Step").press("Home")
    tab.get_by_text("answer of step 5").wait_for()
    with SummaryWriter(str(run)) as writer:
        writer.add_text("val/samples", "| prompt | answer |\n|---|---|\n| who | answer of step 20 |", 20)
    tab.wait_for_timeout(4000)
    tab.get_by_text("answer of step 5").wait_for()  # chosen, so it stays
    tab.get_by_role("slider", name="Step").press("End")
    tab.get_by_text("answer of step 20").wait_for()
    with SummaryWriter(str(run)) as writer:
        writer.add_text("val/samples", "| prompt | answer |\n|---|---|\n| who | answer of step 25 |", 25)
    tab.get_by_text("answer of step 25").wait_for()  # who looks at the latest goes on with it


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


def test_a_run_that_is_broken_spoils_no_page(tab: object, place: Path) -> None:
    run = place / "runs" / "broken" / "version_0"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_bytes(b"step,val/loss\n1,\x00\n2,half\n3,0.5\n4,nan\n5,inf\n6,0.")
    (run / "events.out.tfevents.1.host").write_bytes(b"nothing of the kind")
    (run / "config.yaml").write_bytes(b"model: \xff\xfe <b>bold</b>")
    open_page(tab, "Runs")
    choose_run(tab, "broken/version_0")
    tab.get_by_text("broken/version_0: not finite at steps 4, 5", exact=True).wait_for()
    settle(tab)
    tab.get_by_text("broken/version_0: samples").click()
    tab.get_by_text("This run has sampled nothing yet.").wait_for()
    tab.get_by_text("broken/version_0: config").click()
    tab.get_by_text("<b>bold</b>").wait_for()


def test_runs_come_go_and_stay_chosen(browser: object, tmp_path: Path) -> None:
    def write(name: str, rows: str) -> None:
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.csv").write_text(f"step,val/loss\n{rows}")

    with served(tmp_path) as address, visiting(browser, address) as page:
        open_page(page, "Runs")
        page.get_by_text("No run in runs").wait_for()
        write("first", "10,0.6\n20,0.5\n")
        page.get_by_text("Step 20", exact=True).wait_for()  # without the page being loaded again
        write("second", "30,0.7\n")
        page.wait_for_timeout(3000)
        page.get_by_text("Step 20", exact=True).wait_for()  # what is looked at is not changed
        choose_run(page, "second", others=True)
        page.get_by_text("Step 30", exact=True).wait_for()
        assert page.locator(".dpo-lines").inner_text().split() == ["first", "second"]
        open_page(page, "Chat")
        open_page(page, "Runs")
        page.locator(".dpo-lines").wait_for()
        shutil.rmtree(tmp_path / "runs" / "second")
        page.get_by_text("Step 20", exact=True).wait_for()
        assert not warnings(page)
        (tmp_path / "runs/first/metrics.csv").write_text("")  # as where a run has just begun
        page.get_by_text("These runs have not written such figures yet.").wait_for()
        folder = page.get_by_label("Folder", exact=True)
        folder.fill("~nobody-of-this-name/x")
        folder.press("Enter")
        page.get_by_text("there can be no file or folder of this name").wait_for()


def choose_run(page: object, name: str, others: bool = False) -> None:
    """Look at a run, and at no other unless told so."""
    runs = page.get_by_test_id("stMultiSelect")
    runs.wait_for()
    settle(page)
    if not others and runs.get_by_text(name, exact=True).count() == 0:
        while runs.get_by_role("button", name=re.compile("^Remove|^Delete")).count():
            runs.get_by_role("button", name=re.compile("^Remove|^Delete")).first.click()
            settle(page)
    if runs.get_by_text(name, exact=True).count() == 0:
        runs.locator("input").click()
        page.get_by_role("option").get_by_text(name, exact=True).click()
        page.keyboard.press("Escape")
    settle(page)
