"""The process that compiles: each form once, failures told, an end of it survived."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from spcomp.backends.triton import generated
from spcomp.backends.triton.compilers import CompilerFailed, Compilers, compilers
from spcomp.backends.triton.manifest import Signature
from spcomp.backends.triton.store import Form, gpu_target

SOURCE = """
import triton
import triton.language as tl


@triton.jit
def copy_kernel(x_ptr, y_ptr, n):
    at = tl.program_id(0) * 128 + tl.arange(0, 128)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)
"""
TYPES = (("x_ptr", "*fp32"), ("y_ptr", "*fp32"), ("n", "i32"))


def form_of(text: str = SOURCE, warps: int = 4) -> Form:
    made = generated.read("copy", text)
    options = (("num_warps", warps), ("num_stages", 2))
    return Form(made, Signature(TYPES, frozenset()), gpu_target("cuda:90", 32), options)


@pytest.fixture
def made() -> Iterator[Compilers]:
    compilers = Compilers()
    yield compilers
    compilers.close()


def test_a_form_is_compiled_once_for_all_who_ask_at_once(made: Compilers) -> None:
    form = form_of()
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: made.files(form), range(8)))
    assert len({id(job) for job in jobs}) == 1
    files = jobs[0].result(60)
    assert sorted(files) == ["copy.cubin", "copy.json", "copy.py", "usage.json"]
    assert files["copy.cubin"].startswith(b"\x7fELF")


def test_what_the_compiler_says_is_told_and_the_next_form_is_compiled(made: Compilers) -> None:
    bad = form_of(SOURCE.replace("tl.arange(0, 128)", "tl.arange(0, 100)"))
    with pytest.raises(CompilerFailed, match="power of 2"):
        made.files(bad).result(60)
    assert made.files(form_of()).result(60)["copy.cubin"]


def test_the_environment_of_the_moment_counts(
    made: Compilers, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimised = made.files(form_of()).result(60)
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    plain = made.files(form_of()).result(60)
    assert optimised["copy.cubin"] != plain["copy.cubin"]


def test_jobs_of_a_process_that_is_killed_fail_and_the_next_one_has_another_process() -> None:
    first = compilers()
    assert compilers() is first
    jobs = [first.files(form_of(warps=warps)) for warps in (1, 2, 4, 8)]
    os.kill(first._process.pid, signal.SIGKILL)
    assert not wait(jobs, 30).not_done
    assert any(isinstance(job.exception(), CompilerFailed) for job in jobs)
    second = compilers()
    assert second is not first
    assert second.files(form_of()).result(60)["copy.cubin"]
    assert not first._folder.exists()


def test_nothing_is_left_behind(made: Compilers) -> None:
    made.files(form_of()).result(60)
    assert list(made._folder.iterdir()) == []
    made.close()
    assert not made._folder.exists()
    assert not made.is_alive()
    with pytest.raises(CompilerFailed, match="is gone"):
        made.files(form_of()).result(60)


def test_the_process_knows_neither_torch_nor_the_interpreter(
    made: Compilers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    made.files(form_of()).result(60)
    maps = Path(f"/proc/{made._process.pid}/maps").read_text()
    assert "libtriton" in maps
    assert "libtorch" not in maps
