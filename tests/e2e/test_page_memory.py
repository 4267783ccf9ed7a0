"""One model for all tabs, and no memory taken by questions."""

import re
from pathlib import Path

import pytest

from tests.e2e.pages import CHROMIUM, QUESTION, answer, ask, served, visiting

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]


def test_a_model_is_loaded_once_and_a_hundred_questions_take_no_memory(browser: object, tmp_path: Path) -> None:
    with served(tmp_path) as address, visiting(browser, address) as page, visiting(browser, address) as other:
        for tab in (page, other):
            tab.get_by_label("Longest answer, in tokens", exact=True).fill("4")
            tab.get_by_label("Longest answer, in tokens", exact=True).press("Enter")
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
