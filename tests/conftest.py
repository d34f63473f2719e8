"""What every test run shares: where kernels run, where caches go, how many examples are drawn."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.browser import chromium

HAS_CUDA = torch.cuda.is_available()
MOST_WORKERS = 8  # each one holds a torch of its own and, with a card, a CUDA context
NO_CARD = "needs a CUDA card, and torch finds none"
NO_BROWSER = "Chromium is not on the PATH, so the pages of the reports were NOT opened"

# Triton reads this when a kernel is decorated, so it is set before any test module is imported.
# Tests that compile for a card that is not here start a process of their own without it.
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile(
    "ci",
    max_examples=20,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", max_examples=500, deadline=None, print_blob=True)
settings.load_profile("ci")  # --hypothesis-profile=thorough overrides it

CACHES = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail, rather than skip the gpu tests, when there is no CUDA card",
    )
    parser.addoption(
        "--require-browser",
        action="store_true",
        help="fail, rather than skip the browser tests, when there is no Chromium",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Count the processors this process may use; xdist would count physical cores."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--require-gpu") and not HAS_CUDA:
        raise pytest.UsageError(f"--require-gpu: {NO_CARD}")
    if config.getoption("--require-browser") and not chromium.found():
        raise pytest.UsageError(f"--require-browser: {NO_BROWSER}")
    if hasattr(config, "workerinput"):  # an xdist worker: the folders came with its environment
        torch.set_num_threads(1)
        return
    caches = Path(tempfile.mkdtemp(prefix="spcomp-tests-"))
    config.stash[CACHES] = caches
    os.environ["SPCOMP_CACHE_DIR"] = str(caches / "spcomp")
    os.environ["TRITON_CACHE_DIR"] = str(caches / "triton")


def pytest_unconfigure(config: pytest.Config) -> None:
    caches = config.stash.get(CACHES, None)
    if caches is not None:
        shutil.rmtree(caches, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason=NO_CARD))
        if item.get_closest_marker("browser") and not chromium.found():
            item.add_marker(pytest.mark.skip(reason=NO_BROWSER))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say loudly that tests were left out for want of a browser; who runs others hears nothing."""
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(1 for report in skipped if NO_BROWSER in str(report.longrepr))
    if count:
        terminalreporter.write_line(f"{count} tests were skipped: {NO_BROWSER}", yellow=True)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Seed torch before each test, so that a failure does not depend on the order of tests."""
    torch.manual_seed(0)
    yield
