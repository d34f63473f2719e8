"""A project built by the commands of its own README: driver, comparison, tiling, torch operator."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from spcomp.backends.ascendc.emit import forms
from spcomp.backends.ascendc.executor import Host
from spcomp.backends.ascendc.project_case import TOLERANCE, case_of, raw
from spcomp.backends.reference.executable import ProgramExecutable
from tests.ascendc.projects import (
    PATTERNS,
    TARGET,
    accepts,
    needs_cmake,
    run,
    source_of,
    written,
)

pytestmark = [needs_cmake, pytest.mark.slow]

NAME = "block_topk"
OP = "block_topk_prefill"
DRIVER = "./build-emu/host_driver"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build and prove a project by the first commands of its README, once for all workers."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, done = root / "project", root / "project-is-built"
    with FileLock(root / "project.lock"):
        if not done.exists():
            build(written(NAME, "prefill", folder))
            done.touch()
    return folder


def build(folder: Path) -> None:
    readme = (folder / "README.md").read_text()
    (block, *_) = re.findall(r"^```\n(cmake.*?)^```", readme, re.M | re.S)
    commands = [line.split() for line in block.splitlines()]
    assert [words[0] for words in commands] == ["cmake", "cmake", DRIVER, "python3"]
    for words in commands:
        words[0] = sys.executable if words[0] == "python3" else words[0]
        accepts(*words, folder=folder, CXXFLAGS="-Werror")  # what the first configuration keeps


def compared(project: Path, case: Path) -> tuple[int, str]:
    done = run(sys.executable, "tests/compare.py", case, folder=project)
    return done.returncode, done.stdout + done.stderr


def copied(project: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(project / "tests/case", tmp_path / "case"))


def test_the_commands_of_the_readme_prove_the_project(project: Path) -> None:
    code, said = compared(project, project / "tests/case")
    assert code == 0
    assert re.fullmatch(r"out: ok, 0 of .*\nlse: ok, 0 of .*\n", said)


@pytest.mark.parametrize("cores", [1, 24])
def test_any_number_of_cores_gives_the_same(project: Path, tmp_path: Path, cores: int) -> None:
    case = copied(project, tmp_path)
    said = accepts(DRIVER, case, "--ai-cores", str(cores), folder=project)
    assert said == f"ran {OP} on {cores} AI cores: {case}/out.bin, lse.bin\n"
    for name in ("out.bin", "lse.bin"):
        assert (case / name).read_bytes() == (project / "tests/case" / name).read_bytes()


def test_tokens_before_heads_are_read_where_they_lie(project: Path, tmp_path: Path) -> None:
    case = copied(project, tmp_path)
    made = case_of(source_of(NAME, "prefill"), PATTERNS[NAME][0].program)
    words = dict(line.split() for line in (case / "case.txt").read_text().splitlines())
    for name in ("q", "k", "v"):
        swapped = getattr(made, name).transpose(1, 2).contiguous()
        (case / f"{name}.bin").write_bytes(raw(swapped))
        batch, tokens, heads, _ = swapped.stride()
        words |= {f"{name}_b": str(batch), f"{name}_h": str(heads), f"{name}_s": str(tokens)}
    (case / "case.txt").write_text("".join(f"{k} {v}\n" for k, v in words.items()))
    accepts(DRIVER, case, folder=project)
    assert compared(project, case)[0] == 0


def spoil(path: Path, at: int, kind: str, value: float) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(kind, content, at, value)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("file", "kind", "value"),
    [
        ("expected_out.bin", "<e", 3.0),
        ("expected_lse.bin", "<f", -np.inf),
        ("out.bin", "<e", np.nan),
        ("lse.bin", "<f", np.inf),
    ],
)
def test_one_wrong_value_makes_the_comparison_fail(
    project: Path, tmp_path: Path, file: str, kind: str, value: float
) -> None:
    case = copied(project, tmp_path)
    spoil(case / file, 8, kind, value)
    name = file.removeprefix("expected_").removesuffix(".bin")
    code, said = compared(project, case)
    assert code == 1
    assert f"{name}: WRONG, 1 of " in said


def test_a_comparison_without_results_says_what_to_run(project: Path, tmp_path: Path) -> None:
    case = copied(project, tmp_path)
    (case / "out.bin").unlink()
    assert compared(project, case) == (1, f"there is no {case}/out.bin; run host_driver first\n")


def replaced(name: str, value: str) -> Callable[[Path], None]:
    def change(case: Path) -> None:
        text = (case / "case.txt").read_text()
        changed = re.sub(rf"^{name} \S+$", f"{name} {value}", text, flags=re.M)
        assert changed != text
        (case / "case.txt").write_text(changed)

    return change


def removed(name: str) -> Callable[[Path], None]:
    return lambda case: (case / name).unlink()


def shortened(case: Path) -> None:
    (case / "k.bin").write_bytes((case / "k.bin").read_bytes()[:-2])


def without_lengths(case: Path) -> None:
    words = (case / "case.txt").read_text().replace("Sq ", "rows ")
    (case / "case.txt").write_text(words)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (removed("case.txt"), "there is no {case}/case.txt to read"),
        (removed("v.bin"), "there is no {case}/v.bin to read"),
        (
            shortened,
            "{case}/k.bin has 58622 bytes, and the lengths and strides of case.txt need 58624",
        ),
        (without_lengths, "case.txt does not say Sq"),
        (
            replaced("op", "moba_decode"),
            "the case is for op = moba_decode, and this program for op = block_topk_prefill",
        ),
        (
            replaced("dtype", "bfloat16"),
            "the case is for dtype = bfloat16, and this program for dtype = float16",
        ),
        (replaced("D", "128"), "the case is for D = 128, and this program for D = 64"),
        (
            replaced("B", "-1"),
            "case.txt: B is '-1', which is no whole number from 0 to 2^40",
        ),
        (
            replaced("Hkv", "3"),
            "the query heads are no multiple of the key and value heads",
        ),
        (
            replaced("Hkv", "0"),
            "a call needs at least one row, key, batch item and head",
        ),
        (
            replaced("Sq", "0"),
            "a call needs at least one row, key, batch item and head",
        ),
    ],
)
def test_a_case_that_cannot_run_is_refused_with_a_sentence(
    project: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    case = copied(project, tmp_path)
    change(case)
    done = run(DRIVER, case, folder=project)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"host_driver: {said.format(case=case)}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "host_driver needs the folder of a case"),
        (["a", "b"], "'b' is no argument of host_driver CASE [--ai-cores N] [--tiling]"),
        (["tests/case", "--ai-cores", "25"], "--ai-cores is 25, and no chip has more than 24"),
    ],
)
def test_a_wrong_command_is_refused_with_a_sentence(
    project: Path, words: list[str], said: str
) -> None:
    done = run(DRIVER, *words, folder=project)
    assert (done.returncode, done.stderr) == (1, f"host_driver: {said}\n")


@pytest.mark.parametrize("cores", [1, 20])
@pytest.mark.parametrize(
    "shape", [(1, 4, 2, 1, 7), (2, 8, 2, 300, 1000), (1, 32, 8, 40000, 131072)]
)
def test_the_driver_shows_the_tiling_that_the_library_gives(
    project: Path, tmp_path: Path, shape: tuple[int, ...], cores: int
) -> None:
    source = source_of(NAME, "prefill")
    made = forms(source.plan, TARGET, source.spec)
    host = Host(source, made)
    _, heads, kv_heads, rows, keys = shape
    strides: list[int] = []
    for count, tokens in ((heads, rows), (kv_heads, keys), (kv_heads, keys), (heads, rows)):
        strides += [count * tokens * 64, tokens * 64, 64]
    words = [*shape, *strides, heads * rows, rows]
    names = re.findall(r"^(\w+) \d+$", (project / "tests/case/case.txt").read_text(), re.M)[2:]
    assert len(names) == len(words)
    text = f"op {OP}\ndtype float16\nD 64\nDv 64\n"
    text += "".join(f"{name} {word}\n" for name, word in zip(names, words, strict=True))
    (tmp_path / "case.txt").write_text(text)
    shown = json.loads(
        accepts(DRIVER, tmp_path, "--tiling", "--ai-cores", str(cores), folder=project)
    )
    assert shown["ai_cores"] == cores
    assert shown["workspace_bytes"] == host.workspace_bytes(words, cores)
    steps = list(host.steps(words, cores))
    assert len(shown["launches"]) == len(steps)
    for launch, step in zip(shown["launches"], steps, strict=True):
        form = made[step.kernel]
        assert launch["kernel"] == form.name
        assert launch["blocks"] == step.blocks
        assert launch["buffers"] == list(step.places)
        assert launch["tiling"] == fields_of(form, step.tiling)


LETTERS = {"int32_t": "i", "int64_t": "q", "float": "f"}


def fields_of(form: Any, content: bytes) -> dict[str, Any]:
    layout = "".join(LETTERS[field.c_type] for field in form.fields)
    values = struct.unpack(f"@{layout}", content[: struct.calcsize(f"@{layout}")])
    return {field.name: value for field, value in zip(form.fields, values, strict=True)}


def test_torch_calls_the_operator(project: Path) -> None:
    """Built for the emulator, the operator is one of CPU tensors."""
    options = ("-DSPCOMP_TORCH=ON", f"-DPython3_EXECUTABLE={sys.executable}")
    accepts("cmake", "-S", ".", "-B", "build-emu", *options, folder=project)
    accepts("cmake", "--build", "build-emu", folder=project)
    torch.ops.load_library(str(project / f"build-emu/lib{OP}_torch.so"))
    operator = getattr(torch.ops.spcomp, OP)
    pattern, _ = PATTERNS[NAME]
    q = torch.randn(2, 50, 4, 64).half().transpose(1, 2)
    k, v = torch.randn(2, 2, 2, 130, 64).half()
    out, lse = operator(q, k, v)
    want, want_lse = ProgramExecutable(pattern.program).run({"q": q, "k": k, "v": v}, {}, {})
    relative, absolute = TOLERANCE["float16"]
    torch.testing.assert_close(out, want, rtol=relative, atol=absolute)
    torch.testing.assert_close(lse, want_lse.float(), rtol=relative, atol=absolute)
    shapes = operator(q.to("meta"), k.to("meta"), v.to("meta"))
    assert [(t.shape, t.dtype) for t in shapes] == [(t.shape, t.dtype) for t in (out, lse)]
    for wrong, kind, said in (
        ((q.float(), k, v), TypeError, "q is Float, and the kernels were made for Half; cast it."),
        ((q[0], k, v), ValueError, "q has 3 dimensions, and 4 are needed"),
        ((q[..., :32], k, v), ValueError, "the head dimension of q is 32, and the kernels were"),
        ((q[:, :3], k, v), ValueError, "q has 3 heads, which is no multiple of the 2 of k and v"),
        ((q[:1], k, v), ValueError, "k has a batch of 2, and q of 1."),
        ((q, k, v[:, :, :9]), ValueError, "k has 2 heads of 130 tokens, and v 2 of 9."),
        ((q.to("meta"), k, v), ValueError, "k is on cpu, and q on meta."),
        ((q, k.mT.contiguous().mT, v), ValueError, "the last stride of k is 130, and 1 is needed"),
        (
            (q[:, :, :0], k, v),
            ValueError,
            "a call needs at least one row, key, batch item and head.",
        ),
    ):
        with pytest.raises(kind, match=f"{OP}: {re.escape(said)}"):
            operator(*wrong)
