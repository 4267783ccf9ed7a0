"""The pictures of the page in docs/: `make pictures`, which needs a chromium.

    python -m tests.e2e.pictures --export runs/tiny/version_0/export --output_dir docs

At 1280 pixels in light, and Compare also at 400 in dark.
"""

from pathlib import Path

from jsonargparse import auto_cli
from playwright.sync_api import Page, sync_playwright

from tests.e2e.pages import CHROMIUM, FLAGS, PATIENCE, answer, ask, compare, open_page, served

QUESTIONS = ("What does an electrician do?", "Where does a penguin live?")

#: Milliseconds in which a plot or a table has come to rest.
REST = 2500


def pictures(export: Path, output_dir: Path) -> None:
    """Draw every page.

    Args:
        export: of a trained run, whose runs are shown too.
        output_dir: where the PNGs go.
    """
    export, output_dir = export.resolve(), output_dir.resolve()
    root = export.parents[3]  # so that names are short: runs/NAME/version_N/export
    with served(root, "--model", export.relative_to(root)) as address, sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for width, height, scheme, suffix in ((1280, 860, "light", ""), (400, 860, "dark", "-narrow")):
            viewport = {"width": width, "height": height}
            page = chromium.new_context(viewport=viewport, color_scheme=scheme, device_scale_factor=1.5).new_page()
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            draw(page, output_dir, suffix)
        chromium.close()
    for name in ("page.log", "page.pid"):
        (root / name).unlink()


def draw(page: Page, output_dir: Path, suffix: str) -> None:
    """One visit of all pages."""
    for number, question in enumerate(QUESTIONS):
        ask(page, question)
        answer(page, number)
    keep(page, output_dir / f"page-chat{suffix}.png")
    open_page(page, "Compare")
    compare(page, QUESTIONS[0])
    keep(page, output_dir / f"page-compare{suffix}.png")
    open_page(page, "Runs")
    page.get_by_text("Accuracy", exact=True).wait_for()
    keep(page, output_dir / f"page-runs{suffix}.png")
    open_page(page, "Data")
    page.get_by_role("button", name="Inspect").click()
    page.frame_locator("iframe").get_by_role("heading", name="What is in the data").wait_for()
    keep(page, output_dir / f"page-data{suffix}.png")


def keep(page: Page, file: Path) -> None:
    """The page as it is seen, once it has come to rest."""
    page.mouse.move(0, 0)  # off the button that was clicked last
    page.wait_for_timeout(REST)
    page.screenshot(path=file)
    print(file)


if __name__ == "__main__":
    auto_cli(pictures, as_positional=False)
