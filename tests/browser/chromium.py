"""A page in headless Chromium: its document after the scripts ran, its console, its requests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
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
)
CONSOLE = re.compile(r'CONSOLE[:(]\d+\)?\] "(.*)", source:')
WAIT_MS = 15_000  # of the page's own clock, which runs ahead while nothing happens


def found() -> str | None:
    """Give the path of a Chromium, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Page:
    """What was seen: the document as HTML, lines on the console, addresses the page asked for."""

    dom: str
    console: tuple[str, ...]
    requests: tuple[str, ...]


def open_page(path: Path, width: int = 1200) -> Page:
    """Open a file in a fresh profile and wait until its scripts have run."""
    program = found()
    assert program is not None
    with tempfile.TemporaryDirectory(prefix="spcomp-chromium-") as name:
        log = Path(name) / "net.json"
        command = [
            program,
            *QUIET,
            f"--user-data-dir={name}/profile",
            f"--window-size={width},900",
            f"--virtual-time-budget={WAIT_MS}",
            f"--log-net-log={log}",
            "--enable-logging=stderr",
            "--dump-dom",
            path.as_uri(),
        ]
        env = {**os.environ, "HOME": name}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return Page(done.stdout, tuple(CONSOLE.findall(done.stderr)), _requests(log))


def _requests(log: Path) -> tuple[str, ...]:
    """Read the addresses a page asked for from Chromium's log, which may lack its end. What the
    browser asks on its own account has no origin there; files and data inside a page are no
    requests."""
    text = log.read_text(errors="replace").rstrip().rstrip(",")
    try:
        events = json.loads(text)["events"]
    except json.JSONDecodeError:
        events = json.loads(text + "]}")["events"]
    asked = (event.get("params", {}) for event in events)
    urls = [p["url"] for p in asked if p.get("initiator", "not an origin") != "not an origin"]
    return tuple(dict.fromkeys(urls))
