"""A browser and the page that it visits; made when a test asks for them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.pages import CHROMIUM, FLAGS, served, visiting


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    pytest.importorskip("streamlit")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the page is served in."""
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
