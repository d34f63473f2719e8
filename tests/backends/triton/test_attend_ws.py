"""The warp-specialised kernel without a card: when it is chosen, what the compiler makes of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import jinja2.meta
import pytest
import torch

import spcomp as sp
from spcomp import arguments, compiler
from spcomp.backends import registry
from spcomp.backends.base import Specialisation
from spcomp.backends.triton import emit  # registers the filters of the templates
from spcomp.backends.triton.contexts.attend_ws import WarpsContext
from spcomp.backends.triton.offline import BuiltKernel, build_offline
from spcomp.backends.triton.targets import TARGETS
from spcomp.codegen.render import TEMPLATES, environment
from spcomp.dsl.pattern import Pattern
from spcomp.errors import CannotLower
from spcomp.ir.launches import WarpsLaunch
from spcomp.ir.plan import Plan
from spcomp.patterns import block_topk, moba, streaming_llm

TRITON = registry.backend("triton")
BF16 = Specialisation("bfloat16", 128, 128)


@sp.pattern
def softcapped(q, k, v):
    """Attend to the near past with capped logits."""
    near = sp.window(500)
    cap = lambda score, b, h, q_idx, kv_idx: torch.tanh(score / 30.0) * 30.0  # noqa: E731
    return sp.attend(q, sp.gather(k, near), sp.gather(v, near), score_mod=cap)


@sp.pattern
def merged(q, k, v):
    """Merge a window and the first tokens."""
    parts = [sp.attend(q, sp.gather(k, s), sp.gather(v, s)) for s in (sp.window(300), sp.sink(100))]
    return sp.merge(*parts)


@sp.pattern
def sunk(q, k, v, *, heads=8, block=64):
    """Lists of a KV head beside sink logits."""
    rows, units = (sp.downsample(x, block=block) for x in (q, k))
    best = sp.topk(sp.score(rows, units, heads="group"), k=4)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best), sinks=torch.zeros(heads))


def plan_of(pattern: Pattern, spec: Specialisation, target: str = "sm90") -> Plan:
    return compiler.lower(pattern, backend=TRITON, target=TARGETS[target], spec=spec)


def built(pattern: Pattern, spec: Specialisation) -> BuiltKernel:
    source = compiler.emit(plan_of(pattern, spec), TRITON, TARGETS["sm90"], spec)
    return next(k for k in build_offline(source) if k.kernel == "attend_ws")


def test_the_context_has_what_the_template_names() -> None:
    text = (TEMPLATES / "triton/kernels/attend_ws.py.jinja").read_text()
    assert emit.CONTEXTS[WarpsLaunch]
    named = jinja2.meta.find_undeclared_variables(environment().parse(text))
    assert named <= set(WarpsContext.__dataclass_fields__)


@pytest.mark.parametrize(
    ("spec", "target"),
    [
        (BF16, "sm80"),
        (BF16, "sm100"),
        (BF16, "gfx942"),
        (replace(BF16, dtype="float32"), "sm90"),
        (replace(BF16, head_dim=100), "sm90"),
        (replace(BF16, is_aligned=False), "sm90"),
    ],
)
def test_other_chips_and_tensors_take_the_plain_schedule(spec: Specialisation, target: str) -> None:
    plan = plan_of(block_topk(block=128), spec, target)
    assert plan.order == "query_major"
    with pytest.raises(CannotLower, match="this backend has no kernel attend_ws"):
        compiler.lower(
            block_topk(block=128),
            backend=TRITON,
            target=TARGETS[target],
            spec=spec,
            order="query_major_ws",
        )


def test_it_is_chosen_on_hopper_with_its_reason() -> None:
    plan = plan_of(block_topk(block=128), BF16)
    assert plan.order == "query_major_ws"
    assert plan.notes == (
        "query_major_ws: each list serves a whole tile of queries; one warp copies while the "
        "others multiply",
    )


@pytest.mark.parametrize(
    ("block", "heads", "want"),
    [  # block_q, heads, block_k, entries
        (128, (8, 2), (128, 1, 128, 1)),
        (256, (8, 2), (128, 1, 128, 1)),
        (64, (8, 2), (64, 2, 64, 2)),
        (64, (0, 0), (64, 2, 64, 2)),
        (64, (6, 2), (64, 1, 64, 1)),
        (64, (4, 4), (64, 1, 64, 1)),
    ],
)
def test_a_short_tile_is_filled_by_the_heads_of_a_list(
    block: int, heads: tuple[int, int], want: tuple[int, int, int, int]
) -> None:
    plan = plan_of(block_topk(block=block), replace(BF16, heads=heads))
    launch = plan.launches()[-1]
    assert isinstance(launch, WarpsLaunch)
    axes = dict(launch.axes)
    assert (axes["block_q"], axes["heads"], axes["block_k"], launch.entries) == want
    assert launch.rows == want[0] * want[1]


def test_sinks_reach_the_kernel_that_ends_the_softmax_alone() -> None:
    plan = plan_of(sunk(), BF16)
    assert plan.order == "query_major_ws"
    assert [x.kernel for x in plan.launches() if getattr(x, "sinks_buf", "")] == ["attend_ws"]
    parts = [sp.sink(100), sp.window(300)]

    @sp.pattern
    def sunk_merge(q, k, v):
        found = [sp.attend(q, sp.gather(k, s), sp.gather(v, s)) for s in parts]
        return sp.merge(*found, sinks=torch.zeros(8))

    plan = plan_of(sunk_merge(), BF16)
    assert [x.kernel for x in plan.launches()].count("attend_ws") == 2
    assert [x.kernel for x in plan.launches() if getattr(x, "sinks_buf", "")] == ["merge"]


def test_lists_that_change_with_every_query_are_refused_with_the_figures() -> None:
    with pytest.raises(CannotLower) as caught:
        compiler.lower(
            moba(block=128),
            backend=TRITON,
            target=TARGETS["sm90"],
            spec=BF16,
            order="query_major_ws",
        )
    assert (
        "its lists change every 1 query rows and have units of 128 tokens, and a program takes "
        "multiples of 64 of both" in str(caught.value)
    )


def test_tensors_say_whether_hardware_can_copy_their_rows() -> None:
    def is_aligned(k: torch.Tensor) -> bool:
        q = torch.zeros(1, 4, 8, 64, dtype=torch.bfloat16)
        return arguments.specialisation(q, k, k).is_aligned

    k = torch.zeros(1, 2, 8, 72, dtype=torch.bfloat16)
    assert is_aligned(k[..., :64])
    assert is_aligned(k[..., 8:])
    assert not is_aligned(k[..., 4:68])
    assert not is_aligned(torch.zeros(1, 2, 8, 68, dtype=torch.bfloat16)[..., :64])
    assert not is_aligned(k[:, :1, :, :64].expand(-1, 2, -1, -1))
    assert is_aligned(k[:1, :, :1, :64].expand(1, 2, 1, 64))


@pytest.mark.parametrize(
    ("pattern", "spec", "registers"),
    [
        (block_topk(block=128), BF16, 168),
        (block_topk(block=64), BF16, 168),
        (block_topk(block=64), replace(BF16, heads=(4, 4)), 128),
        (block_topk(block=64), replace(BF16, heads=(4, 4), value_dim=256), 168),
        (block_topk(block=64), replace(BF16, heads=(6, 1), value_dim=64), 168),
        (block_topk(block=128), replace(BF16, head_dim=256, value_dim=256), 168),
        (streaming_llm(), Specialisation("float16", 64, 64), 168),
        (streaming_llm(), Specialisation("float16", 96, 96), 168),
        (softcapped(), BF16, 168),
        (merged(), BF16, 168),
        (sunk(), BF16, 168),
        (sunk(heads=6), replace(BF16, heads=(6, 2), value_dim=64), 128),
        (sunk(block=128), replace(BF16, head_dim=256, value_dim=256), 168),
    ],
    ids=str,
)
def test_ptxas_keeps_the_loops_on_chip_and_its_products_apart(
    pattern: Pattern, spec: Specialisation, registers: int
) -> None:
    """No serialised wgmma (C75xx), and what is spilt is touched outside the loops alone: a Triton
    release that spoils the kernel is noticed here."""
    kernel = built(pattern, spec)
    assert kernel.registers == registers
    assert kernel.warnings == ()
    assert kernel.shared_bytes <= TARGETS["sm90"].shared_bytes
    loops = loops_that_multiply(kernel.binary)
    assert loops
    assert [loop.count("LDL") + loop.count("STL") for loop in loops] == [0] * len(loops)


def loops_that_multiply(binary: bytes) -> list[list[str]]:
    """Give the instruction names of each innermost loop with wgmma in it."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    labels = {m[1]: n for n, line in enumerate(lines) if (m := re.match(r"(\.L_x_\d+):", line))}
    found: list[tuple[int, int]] = []
    for n, line in enumerate(lines):
        jump = re.search(r"BRA `\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], n) < n:
            found.append((labels[jump[1]], n))
    inner = [
        (a, b) for a, b in found if not any(a <= c and d < b for c, d in found if (c, d) != (a, b))
    ]
    bodies = [
        [m[1] for line in lines[a:b] if (m := re.search(r"\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", line))]
        for a, b in inner
    ]
    return [body for body in bodies if "HGMMA" in body]
