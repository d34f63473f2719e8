"""Both kinds of report, opened in Chromium: drawn, silent, and asking nobody for anything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spcomp.autotune.report import pages, tuning_pages
from tests.autotune.test_report import sample
from tests.autotune.tunings import measured, predicted
from tests.browser.chromium import Page, found, open_page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pages.write_all(sample(), tmp_path_factory.mktemp("demo"))[0]


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    held = (measured(block=128), measured(block=64))
    return tuning_pages.write_all(held, tmp_path_factory.mktemp("tuning"))[0]


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuning_pages.write_all((predicted(),), tmp_path_factory.mktemp("unmeasured"))[0]


PAGES = ("demo", "tuning", "unmeasured")


@pytest.mark.parametrize("name", PAGES)
def test_every_plot_is_drawn_without_an_error_and_without_a_request(
    name: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(name)
    page = open_page(path)
    assert page.console == ()
    assert page.requests == ()
    asked = path.read_text(encoding="utf-8").count('class="plot"')
    assert asked == len(drawn(page)) > 0
    assert all(points > 0 for points in drawn(page).values()), drawn(page)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [500, 1200])
def test_a_page_is_no_wider_than_its_window(
    name: str, width: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path: Path = request.getfixturevalue(name)
    measure = (
        '<script>addEventListener("load", () => setTimeout(() => { document.title = '
        'document.documentElement.scrollWidth + " " + innerWidth; }, 3000));</script>'
    )
    copy = tmp_path / "page.html"
    copy.write_text(path.read_text(encoding="utf-8").replace("</body>", measure + "</body>"))
    title = re.search(r"<title>(\d+) (\d+)</title>", open_page(copy, width).dom)
    assert title is not None
    assert int(title[1]) <= int(title[2])


def test_a_page_with_an_error_is_noticed(demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "page.html"
    text = demo.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", "<script>nothing.there()</script></body>"))
    assert any("nothing is not defined" in line for line in open_page(copy).console)


def test_a_page_that_asks_another_host_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<img src="http://127.0.0.1:9/picture.png">')
    assert open_page(page).requests == ("http://127.0.0.1:9/picture.png",)


def test_a_plot_without_its_data_is_noticed(demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "page.html"
    text = demo.read_text(encoding="utf-8")
    emptied = re.sub(r"(?s)(id=\"\w+-data\">).*?(</script>)", r"\1{}\2", text, count=1)
    assert emptied != text
    copy.write_text(emptied)
    page = open_page(copy)
    assert page.console or 0 in drawn(page).values()


def drawn(page: Page) -> dict[str, int]:
    """Count the marks of each plot that plotly drew: points, bars, lines and cells."""
    parts = re.split(r'<div class="plot[^"]*" id="([^"]+)"', page.dom)[1:]
    marks = r'class="(?:point|points?|bars|js-line|hm)[^"]*"|<path class="(?:point|js-line)'
    return {
        name: len(re.findall(marks, body.partition("</section>")[0])) if "main-svg" in body else 0
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def test_chromium_is_the_one_of_the_system() -> None:
    assert found() is not None
