"""Handles and what keeps them alive, threads, and the capture of a CUDA graph."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp import api, torch_op
from spcomp.api import Attention
from spcomp.errors import NotWarmedUp, UnknownHandle
from spcomp.patterns import block_topk, moba
from tests.api.torch_cases import (
    OP,
    Layer,
    assert_same,
    blocks,
    documents,
    listed,
    tensors,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_graph_of_another_test() -> Iterator[None]:
    torch._dynamo.reset()
    yield


# ---- handles and lifetimes -----------------------------------------------------------------------


def test_a_handle_tells_meanings_apart() -> None:
    patterns = [block_topk(block=16), block_topk(block=32), moba(block=16)]
    patterns += [documents(names=torch.arange(n)) for n in (8, 9)]
    handles = [sp.compile(p, backend="reference").handle for p in patterns]
    handles += [sp.compile(moba(block=16), **o).handle for o in (
        {}, {"backend": "triton"}, {"order": "gather"},
        {"axes": {"attend": {"warps": 4}}}, {"axes": {"attend": {"warps": 8}}},
    )]  # fmt: skip
    assert len(set(handles)) == len(handles)
    assert all(re.fullmatch(r"\w+-[0-9a-f]{20}", h) for h in handles)
    names = [sp.compile(documents(names=torch.full((8,), n))).handle for n in (1, 2)]
    assert names[0] == names[1]  # values of tables are arguments


PROGRAM = """
import sys, torch, spcomp as sp, spcomp.torch_op
from spcomp.patterns import block_topk
program = torch.export.load(sys.argv[1]).module()
q, k, v, want = torch.load(sys.argv[2])
try:
    program(q, k, v)
except sp.SpcompError as error:
    print(type(error).__name__)
attention = sp.compile(block_topk(block=16, budget=2, locals=1), backend="reference")
print(attention.handle, torch.equal(program(q, k, v), want))
"""


def test_an_exported_graph_runs_in_another_process_that_compiled_the_pattern(
    tmp_path: Path,
) -> None:
    layer, qkv = Layer(blocks()), tensors(33, 77)
    files = str(tmp_path / "graph.pt2"), str(tmp_path / "tensors.pt")
    torch.export.save(torch.export.export(layer, qkv), files[0])
    torch.save((*qkv, layer(*qkv)), files[1])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *files],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines == ["UnknownHandle", f"{layer.attention.handle} True"], done.stderr


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_graph_holds_the_op_and_serves_other_lengths(strict: bool) -> None:
    layer, (rows, keys) = Layer(blocks()), (torch.export.Dim(n, min=2) for n in ("rows", "keys"))
    program = torch.export.export(
        layer, tensors(), strict=strict, dynamic_shapes=({2: rows}, {2: keys}, {2: keys})
    )
    assert OP.default in [node.target for node in program.graph.nodes]
    qkv = tensors(33, 77)
    assert torch.equal(program.module()(*qkv), layer(*qkv))


def test_a_graph_outlives_the_object_and_keeps_no_table_alive() -> None:
    qkv = tensors(50, 50)
    names = torch.arange(50) // 9
    died = weakref.ref(names)
    attention = sp.compile(documents(names=names), backend="reference")
    handle = attention.handle
    want = attention(*qkv)
    assert_same(OP(*qkv, attention.tables, handle, None), attention(*qkv, return_lse=True))
    del attention, names
    gc.collect()
    assert died() is None
    assert torch.equal(OP(*qkv, [torch.arange(50) // 9], handle, None)[0], want)
    other = torch.arange(50) // 20
    by_other = sp.compile(documents(names=other), backend="reference")
    assert torch.equal(OP(*qkv, [other.clone()], handle, None)[0], by_other(*qkv))


def test_a_graph_sees_what_is_written_to_tables_and_lists() -> None:
    names, indices = torch.arange(48) // 9, torch.tensor([[[[0, 1], [0, 2], [1, 2]]]]).int()
    for pattern, tensor in ((documents(names=names), names), (listed(indices=indices), indices)):
        attention, qkv = sp.compile(pattern, backend="reference"), tensors(48, 48)
        graph = torch.compile(
            lambda *qkv, a=attention: a(*qkv), fullgraph=True, backend="aot_eager"
        )
        first = graph(*qkv)
        tensor.fill_(0)
        assert torch.equal(graph(*qkv), sp.compile(pattern, backend="reference")(*qkv))
        assert not torch.equal(graph(*qkv), first)


def test_a_graph_sorts_a_list_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sorts: list[str] = []
    canonical = api.canonical_lists
    monkeypatch.setattr(api, "canonical_lists", lambda p: sorts.append(p.name) or canonical(p))
    attention = sp.compile(listed(indices=torch.zeros(1, 1, 3, 2).int()), backend="reference")
    graph = torch.compile(lambda *qkv: attention(*qkv), fullgraph=True, backend="aot_eager")
    for _ in range(3):
        graph(*tensors(48, 48))
    assert sorts == ["listed"]


# ---- threads -------------------------------------------------------------------------------------


def _in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run work(0) … work(count - 1) at once, switching often; raise the first failure."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(count)

    def guarded(number: int) -> None:
        try:
            barrier.wait(60)
            work(number)
        except BaseException as failure:
            failures.append(failure)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]


def test_threads_with_new_shapes_build_each_plan_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps the program it interprets in a global, so this is the reference's;
    the plans of Triton run in threads on a card."""
    builds: list[str] = []
    build = Attention._build
    monkeypatch.setattr(api, "MOST_ADMITTED", 5)
    monkeypatch.setattr(
        Attention, "_build", lambda self, *a: builds.append(a[-2]) or build(self, *a)
    )
    attention = sp.compile(moba(block=16, k_blocks=2), backend="reference", order="gather")
    calls = [tensors(rows, 60, hq=2) for rows in (1, 5, 20, 33, 47, 60)]
    wants = [sp.compile(moba(block=16, k_blocks=2))(*qkv) for qkv in calls]
    builds.clear()

    def work(number: int) -> None:
        for n in range(12):
            which = (number + n) % len(calls)
            torch.testing.assert_close(attention(*calls[which]), wants[which])

    _in_threads(6, work)
    assert sorted(builds) == ["decode", "prefill"]


def test_threads_never_see_a_list_as_it_was_before_a_write() -> None:
    indices = torch.zeros(1, 1, 3, 1).int()
    attention = sp.compile(listed(indices=indices), backend="reference")
    q, k, v = tensors(48, 48, hq=1, hkv=1)
    for n in (1, 2, 0, 2, 1):
        indices.fill_(n)
        want = sp.compile(listed(indices=indices.clone()), backend="reference")(q, k, v)

        def work(_: int, want: Tensor = want) -> None:
            for _ in range(3):
                torch.testing.assert_close(attention(q, k, v), want)

        _in_threads(4, work)


def test_threads_that_compile_one_pattern_share_its_plans() -> None:
    made: list[Attention] = []
    _in_threads(6, lambda _: made.append(blocks()))
    assert len({id(a.compiled) for a in made}) == 1


# ---- capture -------------------------------------------------------------------------------------


def test_a_capture_refuses_what_was_not_made_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card: `_is_captured` answers for a stream that is being captured."""
    ready, cold = (sp.compile(moba(block=16, k_blocks=n), backend="reference") for n in (2, 3))
    lists = sp.compile(listed(indices=torch.zeros(1, 1, 3, 1).int()), backend="reference")
    qkv = tensors(48, 48)
    want = ready(*qkv)
    monkeypatch.setattr(api, "_is_captured", lambda x: True)
    assert torch.equal(ready(*qkv), want)
    ready(*tensors(47, 47))  # another length needs nothing new
    with pytest.raises(NotWarmedUp) as caught:
        cold(*qkv)
    assert str(caught.value) == (
        "NotWarmedUp: no kernel of the pattern 'moba' is compiled for prefill in float32 with "
        "D = 16 and Dv = 16, and a CUDA graph is being captured.\n"
        "  help: make the same call once before the capture, on tensors of the same dtype, head "
        "dimensions and device."
    )
    with pytest.raises(NotWarmedUp, match="the lists of the pattern 'listed' are not sorted yet"):
        lists(*qkv)
    monkeypatch.undo()
    cold(*qkv)
    lists(*qkv)


def test_a_process_keeps_what_was_traced_and_forgets_the_rest() -> None:
    kept, forgotten = (sp.compile(moba(block=n), backend="reference") for n in (17, 19))
    handles = kept.handle, forgotten.handle
    kept(*(x.to("meta") for x in tensors()))  # as a trace does
    forgotten(*tensors())
    del kept, forgotten
    gc.collect()
    assert torch_op.meaning_of(handles[0]).table_names == ()
    with pytest.raises(UnknownHandle):
        torch_op.meaning_of(handles[1])
