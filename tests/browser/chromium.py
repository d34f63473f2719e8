"""A page in headless Chromium: its document after the scripts ran, its console, its requests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

NAMES = ("chromium", "google-chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
    "--proxy-server=http://127.0.0.1:9",  # nobody listens: what is asked is logged and goes no way
)
CONSOLE = re.compile(r'CONSOLE[:(]\d+\)?\] "(.*)", source:')
WAIT_MS = 15_000  # of the page's own clock, which runs ahead while nothing happens
LIMIT_S = 120
LEAST_WIDTH = 500  # pixels of a window; `framed` shows a page in less
INSIDE = ("", "file", "data", "blob", "about", "chrome", "chrome-error", "devtools")
BROWSERS_OWN = ("google.com", "googleapis.com", "gstatic.com", "gvt1.com")
"""Whom Chromium asks on its own account at its start; a page's own request has an initiator."""


def found() -> str | None:
    """Give the path of a Chromium, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Page:
    """What was seen: the document as HTML, lines on the console, addresses the page asked for."""

    dom: str
    console: tuple[str, ...]
    requests: tuple[str, ...]


def open_page(path: Path, *, width: int = 1200, is_dark: bool = False) -> Page:
    """Open a file in a fresh profile and wait until its scripts have run. width: of the window, in
    pixels."""
    program = found()
    assert program is not None and width >= LEAST_WIDTH
    with tempfile.TemporaryDirectory(prefix="spcomp-chromium-") as name:
        log = Path(name) / "net.json"
        command = [
            program,
            *QUIET,
            f"--user-data-dir={name}/profile",
            f"--window-size={width},900",
            f"--blink-settings=preferredColorScheme={0 if is_dark else 1}",
            f"--virtual-time-budget={WAIT_MS}",
            f"--log-net-log={log}",
            "--enable-logging=stderr",
            "--v=0",
            "--dump-dom",
            path.as_uri(),
        ]
        env = {**os.environ, "HOME": name}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr[-2000:]
        return Page(done.stdout, tuple(CONSOLE.findall(done.stderr)), _requests(log))


def _requests(log: Path) -> tuple[str, ...]:
    """Read the addresses a page asked for from Chromium's log, which may lack its end."""
    text = log.read_text(errors="replace").rstrip().rstrip(",")
    try:
        events = json.loads(text)["events"]
    except json.JSONDecodeError:
        events = json.loads(text + "]}")["events"]
    return tuple(dict.fromkeys(url for event in events for url in _asked(event.get("params", {}))))


def _asked(event: dict[str, Any]) -> Iterator[str]:
    """Give the address of an event, if it leaves the page and is not the browser's own.

    A request names its initiator, whoever it asks. Connections that are only prepared, and names
    that are only looked up, have none: there the host decides.
    """
    is_pages_own = event.get("initiator", "not an origin") != "not an origin"
    for name in ("url", "host"):
        url = str(event.get(name, ""))
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.scheme in INSIDE or not host:
            continue
        is_browsers = any(host == own or host.endswith("." + own) for own in BROWSERS_OWN)
        if is_pages_own or not is_browsers:
            yield url


def framed(page: Path, folder: Path, width: int) -> Path:
    """Write a page that shows another one in a frame, `width` pixels wide, and takes the title that
    the framed one sends it."""
    path = folder / "framed.html"
    path.write_text(
        f'<iframe src="{page.name}" style="width:{width}px;height:900px;border:0"></iframe>'
        '<script>addEventListener("message", (event) => { document.title = event.data; });'
        "</script>",
        encoding="utf-8",
    )
    return path
