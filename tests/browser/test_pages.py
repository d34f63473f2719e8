"""Both kinds of report, opened in Chromium: drawn, silent, and asking nobody for anything."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from spcomp.autotune.record import Candidate, settled
from spcomp.autotune.report import pages, tuning_pages
from tests.autotune.test_report import sample
from tests.autotune.tuning import timed
from tests.autotune.tunings import TILES, measured, predicted
from tests.browser.chromium import LEAST_WIDTH, Page, framed, open_page

pytestmark = pytest.mark.browser

Write: TypeAlias = Callable[[Path], tuple[Path, Path, Path]]


def wide(block: int) -> Any:
    """Give a tuning with long names, long reasons and a candidate that changes several kernels."""
    tuning = measured(block)
    rows = [
        replace(row, reason=row.reason and f"{row.reason}: {'a_long_word_' * 12} {'text ' * 40}")
        for row in tuning.rows
    ]
    both = Candidate("gather", (*TILES, *(("merge_of_" + "x" * 30, axes) for _, axes in TILES)))
    call = replace(tuning.call, pattern=f"moba(block={block}, rule={'x' * 90})")
    return replace(tuning, rows=settled([*rows, timed(both, 2.5)]), call=call)


WRITERS: dict[str, Write] = {
    "demo": lambda folder: pages.write_all(sample(), folder),
    "measured demo": lambda folder: pages.write_all(sample("measured"), folder),
    "tuning": lambda folder: tuning_pages.write_all((measured(128), measured(64)), folder),
    "wide tuning": lambda folder: tuning_pages.write_all((wide(128), wide(64)), folder),
    "ranked tuning": lambda folder: tuning_pages.write_all((predicted(),), folder),
}
LED_BY = {
    "demo": "faster than dense, predicted",
    "measured demo": "faster than dense, measured",
    "tuning": "1.2500\u00a0ms",
    "wide tuning": "1.2500\u00a0ms",
    "ranked tuning": "Ranked by the cost model, not timed",
}
SECTIONS = {
    "demo": {"recall", "perplexity", "speed", "maps", "rows", "kernels", "environment", "notes"},
    "tuning": {"winners", "candidates-0", "candidates-1", "fidelity", "model", "meanings", "tried",
               "environment", "notes"},
    "ranked tuning": {"winners", "candidates-0", "meanings", "tried", "environment", "notes"},
}  # fmt: skip


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = WRITERS[name](tmp_path_factory.mktemp("page"))[0]
        return made[name]

    return of


def changed(page: Path, folder: Path, edit: Callable[[str], str]) -> Path:
    """Write a page with an edit, which must have changed it."""
    text = page.read_text(encoding="utf-8")
    copy = folder / "page.html"
    copy.write_text(edit(text), encoding="utf-8")
    assert copy.read_text(encoding="utf-8") != text
    return copy


def with_script(text: str, script: str) -> str:
    head, end, tail = text.rpartition("</body>")
    return f"{head}<script>{script}</script>{end}{tail}"


def drawn(page: Page) -> dict[str, int]:
    """Count the marks of each plot that plotly drew: points, bars and lines, without its legend."""
    parts = re.split(r'<div class="plot[^"]*" id="([^"]+)"', page.dom)[1:]
    mark = re.compile(r'<path class="(?:point|js-line)|<g class="points?"><path')
    bodies = [re.split(r'</section>|class="infolayer"', body)[0] for body in parts[1::2]]
    return {
        name: len(mark.findall(body)) if 'class="main-svg"' in body else 0
        for name, body in zip(parts[::2], bodies, strict=True)
    }


def asked_for(page: Path) -> dict[str, int]:
    """Count the marks the data of each plot holds: a point each, or a bar, or one line a trace."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="([\w-]+)-data">(.*?)</script>', text)
    return {name: sum(map(_marks, json.loads(spec)["data"])) for name, spec in found}


def _marks(trace: dict[str, Any]) -> int:
    mode = trace.get("mode", "markers")
    has_line = "lines" in mode and len(trace["x"]) > 1
    return ("markers" in mode) * len(trace["x"]) + has_line


@pytest.mark.parametrize("name", WRITERS)
def test_every_plot_is_drawn_whole_without_an_error_a_request_or_a_button_that_makes_one(
    name: str, html: Callable[[str], Path]
) -> None:
    """plotly 7 has a button that uploads a plot, shown unless it is switched off."""
    page = open_page(html(name))
    assert page.console == ()
    assert page.requests == ()
    assert len(drawn(page)) > 0
    assert drawn(page) == asked_for(html(name))
    assert LED_BY[name] in unescape(page.dom).partition("<h2")[0]
    sections = set(re.findall(r'<section aria-labelledby="([\w-]+)-title"', page.dom))
    assert sections == SECTIONS.get(name, sections)
    buttons = set(re.findall(r'class="modebar-btn[^>]*data-title="([^"]*)"', page.dom))
    assert buttons == {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}


# A page tells its widest element beside its own width, and the colour of the text in a plot.
MEASURE = """
addEventListener("load", () => setTimeout(() => {
  const text = document.querySelector(".plot .xtick text");
  const told = JSON.stringify({
    page: document.documentElement.scrollWidth, window: innerWidth,
    text: text ? getComputedStyle(text).fill : "",
    ground: getComputedStyle(document.body).backgroundColor,
  });
  if (parent === window) document.title = told; else parent.postMessage(told, "*");
}, 3000));
"""


def measures(page: Page) -> dict[str, Any]:
    title = re.search(r"<title>(\{.*?\})</title>", page.dom)
    assert title is not None, page.dom[:300]
    found: dict[str, Any] = json.loads(title[1])
    return found


@pytest.mark.parametrize("name", ["demo", "tuning", "wide tuning", "ranked tuning"])
@pytest.mark.parametrize(("width", "is_dark"), [(400, True), (1200, False)])
def test_a_page_is_no_wider_than_its_window_and_a_plot_has_the_colours_of_the_theme(
    name: str, width: int, is_dark: bool, html: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = changed(html(name), tmp_path, lambda text: with_script(text, MEASURE))
    shown = framed(copy, tmp_path, width) if width < LEAST_WIDTH else copy
    found = measures(open_page(shown, width=max(width, LEAST_WIDTH), is_dark=is_dark))
    assert found["window"] == width
    assert found["page"] <= width
    text, ground = (sum(map(int, re.findall(r"\d+", found[key])[:3])) for key in ("text", "ground"))
    assert (text > 600, ground < 150) == (is_dark, is_dark), found


def test_a_page_that_is_too_wide_is_noticed(html: Callable[[str], Path], tmp_path: Path) -> None:
    copy = changed(
        html("tuning"),
        tmp_path,
        lambda text: with_script(text, MEASURE).replace(
            "<main>", '<main><div style="width:600px">wide</div>'
        ),
    )
    assert measures(open_page(framed(copy, tmp_path, 400)))["page"] >= 600


# ---- the detectors detect ------------------------------------------------------------------------


def test_a_page_with_errors_is_noticed(html: Callable[[str], Path], tmp_path: Path) -> None:
    said_by = {
        "nothing.there()": "nothing is not defined",
        'console.error("said so")': "said so",
        'Promise.reject(new Error("kept from"))': "kept from",
        'fetch("http://127.0.0.1:9/").catch(() => 0)': "Content Security Policy",
    }
    script = "</script><script>".join(said_by)
    page = open_page(changed(html("demo"), tmp_path, lambda text: with_script(text, script)))
    for line in said_by.values():
        assert any(line in said for said in page.console), line


def test_a_page_that_asks_another_host_is_noticed(tmp_path: Path) -> None:
    asks = {
        '<img src="http://127.0.0.1:9/picture.png">': "http://127.0.0.1:9/picture.png",
        '<link rel="stylesheet" href="https://example.org/style">': "https://example.org/style",
        '<link rel="preconnect" href="https://prepared.example">': "https://prepared.example/",
        '<iframe src="https://example.org/frame"></iframe>': "https://example.org/frame",
        '<script src="https://www.google.com/script"></script>': "https://www.google.com/script",
        '<script>fetch("http://127.0.0.1:9/f").catch(() => 0)</script>': "http://127.0.0.1:9/f",
        '<script>navigator.sendBeacon("http://127.0.0.1:9/b", "")</script>': "http://127.0.0.1:9/b",
        '<script>new WebSocket("ws://127.0.0.1:9/socket")</script>': "ws://127.0.0.1:9/socket",
    }
    page = tmp_path / "page.html"
    page.write_text("".join(asks))
    assert set(asks.values()) - set(open_page(page).requests) == set()


def test_a_plot_without_its_data_is_noticed(html: Callable[[str], Path], tmp_path: Path) -> None:
    copy = changed(
        html("demo"),
        tmp_path,
        lambda text: re.sub(r'(id="recall-data">).*?(</script>)', r"\1{}\2", text),
    )
    assert drawn(open_page(copy))["recall"] == 0


def test_a_page_without_its_library_is_noticed(html: Callable[[str], Path], tmp_path: Path) -> None:
    copy = changed(html("tuning"), tmp_path, lambda text: text.replace(pages.get_plotlyjs(), ""))
    page = open_page(copy)
    assert any("Plotly is not defined" in line for line in page.console)
    assert set(drawn(page).values()) == {0}
