"""Element offsets past 2^31, and grids larger than an axis of a launch may be."""

from __future__ import annotations

import ast
import mmap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp import arguments, compiler
from spcomp.backends import registry
from spcomp.backends.base import Source
from spcomp.backends.triton.bind import bind
from spcomp.backends.triton.layouts import Call
from spcomp.codegen.render import TEMPLATES
from spcomp.ir import dims
from spcomp.ir.passes.place_buffers import slab_rows
from spcomp.ir.plan import LoopOrder, Phase, Plan
from spcomp.patterns import block_topk, moba, quest, streaming_llm, xattention
from spcomp.patterns.infllm_v2 import infllm_v2
from tests.bug_reports.make import DEVICE, compiled, qkv, run
from tests.conformance.cases import assert_within

MOST_PROGRAMS = 2**31 - 1  # of axis 0; the other two hold 65535


@sp.pattern
def listed(q, k, v):
    """Make tile lists from several lists at once."""
    rows, units = sp.downsample(q, block=64), sp.downsample(k, block=64)
    best = sp.topk(sp.score(rows, units, heads="all"), k=2) | sp.window(64)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


@sp.pattern
def biased(q, k, v):
    """Read tables of the user's in the mask and in the scores."""
    ids, slope = torch.zeros(2**20, dtype=torch.int32), torch.ones(64)
    same = sp.mask_mod(lambda b, h, q_idx, kv_idx: ids[q_idx] == ids[kv_idx])
    return sp.attend(q, k, v, mask=same, score_mod=lambda s, b, h, q_idx, kv_idx: s * slope[h])


PLANS: dict[str, tuple[sp.Pattern, Phase, LoopOrder | None]] = {
    "block_topk": (block_topk(), "prefill", None),
    "moba": (moba(), "prefill", "key_major"),
    "moba gathered": (moba(), "prefill", "gather"),
    "quest": (quest(heads="group"), "prefill", None),
    "quest decode": (quest(), "decode", None),
    "streaming_llm": (streaming_llm(), "prefill", None),
    "streaming_llm plain": (streaming_llm(), "prefill", "query_major"),
    "streaming_llm decode": (streaming_llm(), "decode", None),
    "listed": (listed(), "prefill", None),
    "xattention": (xattention(), "prefill", None),
    "infllm_v2": (infllm_v2(), "prefill", None),
    "biased": (biased(), "prefill", None),
}


def _source(name: str) -> Source:
    pattern, phase, order = PLANS[name]
    triton, target = registry.backend("triton"), registry.target("sm90")
    spec = arguments.Specialisation("bfloat16", 128, 128)
    plan = compiler.lower(
        pattern, backend=triton, target=target, spec=spec, phase=phase, order=order
    )
    return triton.emit(plan, target, spec)


# ---- the text of kernels -------------------------------------------------------------------------


def _is_stride(node: ast.expr) -> bool:
    """Tell a stride argument (`k_ss`, `table0_stride_1`) or a stride handed to a helper."""
    if not isinstance(node, ast.Name):
        return False
    prefix, _, letters = node.id.rpartition("_")
    named = bool(prefix) and letters.startswith("s") and 1 < len(letters) <= 2
    return named or "stride" in node.id


def _says_int64(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "int64"


class _Widths(ast.NodeVisitor):
    """Which names of one function hold 64-bit integers, and which only lanes of a tile."""

    def __init__(self, function: ast.FunctionDef) -> None:
        self.wide: set[str] = set()
        self.lanes: set[str] = set()
        self.function = function
        for _ in range(3):  # a name may be given its value behind its use in a loop
            self.generic_visit(function)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name):
                if self.is_wide(node.value):
                    self.wide.add(target.id)
                if self.is_lanes(node.value):
                    self.lanes.add(target.id)

    def is_wide(self, node: ast.expr) -> bool:
        """Tell whether an expression is computed in 64 bits."""
        if isinstance(node, ast.Name):
            return node.id in self.wide or node.id.endswith("_64")
        if isinstance(node, ast.BinOp):
            return self.is_wide(node.left) or self.is_wide(node.right)
        if isinstance(node, (ast.Subscript, ast.UnaryOp)):
            return self.is_wide(node.value if isinstance(node, ast.Subscript) else node.operand)
        if isinstance(node, ast.Call):
            return any(_says_int64(a) for a in node.args)
        return False

    def is_lanes(self, node: ast.expr) -> bool:
        """Tell whether an expression counts the lanes of one tile, from 0 to its size."""
        if isinstance(node, ast.Name):
            return node.id in self.lanes
        if isinstance(node, ast.Subscript):
            return self.is_lanes(node.value)
        return (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "arange"
        )


def _narrow_products(text: str) -> Iterator[str]:
    """Yield the products of an index and a stride that are made in 32 bits and may be large."""
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef):
            continue
        widths = _Widths(function)
        for node in ast.walk(function):
            if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
                continue
            for index, stride in ((node.left, node.right), (node.right, node.left)):
                known = widths.is_wide(index) or widths.is_lanes(index)
                if _is_stride(stride) and not known:
                    yield f"{function.name}: {ast.unparse(node)}"


@pytest.mark.parametrize("name", PLANS)
def test_an_index_is_widened_before_it_meets_a_stride(name: str) -> None:
    """B23, in the text of every kernel; lanes of a tile are the test below."""
    for file in _source(name).files:
        assert list(_narrow_products(file.text)) == [], file.kernel
        assert "int64" in file.text


def test_the_reader_of_texts_finds_a_product_of_32_bits() -> None:
    """B23. The check above can fail."""
    text = (
        "def kernel(x_ptr, x_sb, x_ss, n):\n"
        "    b = tl.program_id(0)\n"
        "    wide = tl.cast(b, tl.int64)\n"
        "    lanes = tl.arange(0, 16)[:, None]\n"
        "    return x_ptr + b * x_sb + wide * x_sb + lanes * x_ss + (n + lanes) * x_ss\n"
    )
    assert sorted(_narrow_products(text)) == ["kernel: (n + lanes) * x_ss", "kernel: b * x_sb"]


# ---- large strides -------------------------------------------------------------------------------


def _far_apart(x: Tensor, stride: int) -> Tensor:
    """Copy x [1,1,S,D] to rows `stride` elements apart, in memory that only touched pages take.

    The rows begin 2^31 elements behind the start of what is mapped, so that an offset that lost
    its upper bits still reads memory, of zeros.
    """
    elements = 2**31 + x.shape[2] * stride
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    held = mmap.mmap(-1, elements * x.element_size(), flags=flags)
    flat = torch.frombuffer(held, dtype=x.dtype)
    far = flat.as_strided(x.shape, (stride, stride, stride, 1), 2**31)
    return far.copy_(x)


@pytest.mark.skipif(DEVICE != "cpu", reason="the card has its own test, tests/gpu")
@pytest.mark.parametrize("name", ["block_topk", "moba", "streaming_llm", "quest"])
@pytest.mark.parametrize(("skv", "stride"), [(300, 2**23 - 64)])
def test_rows_past_two_to_the_31_elements_are_read(name: str, skv: int, stride: int) -> None:
    """B23."""
    assert (skv - 1) * stride > 2**31
    pattern, rows = {
        "block_topk": (block_topk(block=32, budget=2, locals=1), 100),
        "moba": (moba(block=64, k_blocks=1), 20),
        "streaming_llm": (streaming_llm(sinks=4, recent=90), 40),
        "quest": (quest(page=16, budget=64), 1),
    }[name]
    q, k, v = qkv(1, 1, 1, rows, skv, 16, torch.float16)
    attention = compiled(pattern)
    out, lse = run(attention, q, _far_apart(k, stride), _far_apart(v, stride))
    assert_within(out, lse, q, k, v, attention.to_mask(q, k))


# ---- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_every_program_is_on_axis_0(name: str) -> None:
    """B26, B28."""
    for file in _source(name).files:
        calls = [n for n in ast.walk(ast.parse(file.text)) if isinstance(n, ast.Call)]
        axes = [
            ast.unparse(n.args[0]) if n.args else ast.unparse(n.keywords[0].value)
            for n in calls
            if isinstance(n.func, ast.Attribute) and n.func.attr == "program_id"
        ]
        if file.kernel == "attend_ws":  # its programs draw their work from a counter
            assert not axes
        else:
            assert axes and set(axes) == {"0"}, file.kernel


def _call(plan: Plan, env: dict[str, int]) -> Call:
    """Make the first slab of a call out of tensors without memory."""
    rows = min(slab_rows(plan, env, 2), env["Sq"])
    here = {**env, "R": rows, "R0": 0, "processors": 132}
    tensors = {
        b.name: torch.empty([dims.evaluate(d, here) for d in b.dims], device="meta")
        for b in plan.buffers
    }
    return Call(tensors, here)


LARGE = {
    "65540 heads in all": {"B": 4097, "Hq": 16, "Hkv": 16, "Sq": 16, "Skv": 16, "D": 16, "Dv": 16},
    "more than 65535 query tiles": {
        "B": 1, "Hq": 1, "Hkv": 1, "Sq": 2**24, "Skv": 256, "D": 16, "Dv": 16,
    },
    "three million active blocks": {
        "B": 1, "Hq": 32, "Hkv": 32, "Sq": 65536, "Skv": 65536, "D": 64, "Dv": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("sizes", LARGE)
@pytest.mark.parametrize("name", [n for n in PLANS if n != "biased"])
def test_large_calls_have_grids_that_a_device_takes(name: str, sizes: str) -> None:
    """B26, B28."""
    plan, env = _source(name).plan, LARGE[sizes]
    call = _call(plan, env)
    programs = {launch.kernel: bind(launch, plan).grid(call) for launch in plan.launches()}
    least = 0 if name == "infllm_v2" else 1  # 16 keys make no window of 32
    assert all(least <= n <= MOST_PROGRAMS for n in programs.values()), programs


def test_the_plans_above_hold_every_kernel_there_is() -> None:
    """B23, B26, B28."""
    kernels = {f.kernel for name in PLANS for f in _source(name).files}
    known = {p.name.partition(".")[0] for p in (TEMPLATES / "triton" / "kernels").iterdir()}
    assert kernels == known
