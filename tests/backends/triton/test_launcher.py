"""What is compiled when, and what a launch is given; on a card that is not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from spcomp import compiler
from spcomp.backends import registry
from spcomp.backends.base import Specialisation
from spcomp.backends.triton import launcher
from spcomp.backends.triton.bind import bind
from spcomp.backends.triton.launcher import (
    ArgumentClass,
    Kernel,
    Loaded,
    Manifest,
    Shot,
    best_class,
    manifest_of,
)
from spcomp.ir.launches import AttendLaunch
from spcomp.patterns import streaming_llm
from tests.backends.triton import pretend


@dataclass(frozen=True)
class Parameter:
    name: str
    do_not_specialize: bool


class Function:
    """As much of a `@triton.jit` function as compiling asks for."""

    arg_names = ("x_ptr", "bias_ptr", "x_sb", "x_sr", "bias_stride_0", "n", "scale")
    params = tuple(Parameter(n, n in ("x_sb", "n", "scale")) for n in arg_names)


MANIFEST = Manifest(
    pointers=(("x_ptr", "*bf16"), ("bias_ptr", "*fp32")),
    strides=(("x_sb", "x_ptr"), ("x_sr", "x_ptr")),
    last=("bias_stride_0",),
)


def compiled_as(monkeypatch: pytest.MonkeyPatch, chosen: ArgumentClass) -> Any:
    """Give the source that Triton's compiler would get."""
    import triton

    monkeypatch.setattr(triton.compiler, "ASTSource", lambda **fields: fields)
    monkeypatch.setattr(triton, "compile", lambda source, target, options: source)
    return launcher.compile_kernel(Function(), MANIFEST, chosen, None, {"num_warps": 4})


def test_aligned_tensors_have_divisible_pointers_and_strides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = compiled_as(monkeypatch, ArgumentClass(("x_ptr",)))
    assert set(source["attrs"]) == {(0,), (3,)}, "x_sb is a count, bias is not aligned"
    assert source["constexprs"] == {}
    assert source["signature"] == {
        "x_ptr": "*bf16",
        "bias_ptr": "*fp32",
        "x_sb": "i32",
        "x_sr": "i32",
        "bias_stride_0": "i32",
        "n": "i32",
        "scale": "fp32",
    }


def test_long_strides_have_64_bits_and_a_last_stride_of_one_is_a_constant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = compiled_as(monkeypatch, ArgumentClass((), ("x_sb",), ("bias_stride_0",)))
    assert source["signature"]["x_sb"] == "i64" and source["signature"]["x_sr"] == "i32"
    assert source["signature"]["bias_stride_0"] == "constexpr"
    assert source["constexprs"] == {(4,): 1}
    assert source["attrs"] == {}


def test_a_class_compiles_once_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled:
        run, function, packed_metadata = None, 1, ()

    monkeypatch.setattr(launcher, "compile_kernel", lambda *_: Compiled())
    monkeypatch.setattr(launcher, "current_target", lambda: None)
    kernel, before = Kernel(Function(), MANIFEST, ()), launcher.STATS.compiled
    first = kernel.form(0, ArgumentClass(("x_ptr",)))
    assert kernel.form(0, ArgumentClass(("x_ptr",))) is first
    assert launcher.STATS.compiled - before == 1
    assert kernel.form(0, ArgumentClass()) is not first
    assert kernel.form(1, ArgumentClass(("x_ptr",))) is not first
    assert launcher.STATS.compiled - before == 3


def test_a_launch_fills_in_addresses_and_leaves_its_arguments_for_the_next() -> None:
    seen: list[tuple[Any, ...]] = []
    loaded = Loaded(None, lambda *a: seen.append(a), "function", "packed")
    shot = Shot(loaded, 6, [0, 11, 0], [(0, 1, 32), (2, 0, 0)])
    shot.fire([1000, 2000], 5, None)
    shot.fire([3000, 4000], 5, None)
    head = (6, 1, 1, 5, "function", "packed", None, None, None)
    assert seen == [(*head, 2032, 11, 1000), (*head, 4032, 11, 3000)]


def test_a_profiler_hook_gets_the_metadata_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    class Compiled:
        def launch_metadata(self, grid: tuple[int, ...], stream: int, *rest: int) -> object:
            return (grid, stream, rest)

    assert launcher.hooks() is None
    calls: list[Any] = []
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [calls.append])
    hooked = launcher.hooks()
    assert hooked is not None and hooked[0] is knobs.runtime.launch_enter_hook
    seen: list[tuple[Any, ...]] = []
    shot = Shot(Loaded(Compiled(), lambda *a: seen.append(a), 1, 2), 6, [0], [(0, 0, 0)])
    shot.fire([1000], 5, hooked)
    assert seen == [(6, 1, 1, 5, 1, 2, ((6, 1, 1), 5, (1000,)), *hooked, 1000)]


def test_a_manifest_names_every_stride_but_the_unit_one() -> None:
    backend, chip = registry.backend("triton"), registry.target("sm90")
    spec = Specialisation("float16", 64, 64)
    plan = compiler.lower(streaming_llm(), backend=backend, target=chip, spec=spec, phase="prefill")
    launch = next(n for n in plan.launches() if isinstance(n, AttendLaunch))
    manifest = manifest_of(bind(launch, plan), plan, spec.dtype)
    assert dict(manifest.pointers)["q_ptr"] == "*fp16"
    assert dict(manifest.pointers)["tiles_ptr"] == "*i32"
    owners = dict(manifest.strides)
    assert (owners["k_ss"], owners["out_sh"], owners["tiles_sr"]) == (
        "k_ptr",
        "out_ptr",
        "tiles_ptr",
    )
    assert best_class(manifest).aligned == tuple(a for a, _ in manifest.pointers)


def test_a_new_length_compiles_nothing() -> None:
    """Head dimensions 64 and 80 have aligned rows, 17 has not; scratch is padded so that its own
    strides say nothing of the length."""
    seen = pretend.run("lengths")
    assert len(seen) == 24
    assert all(counts[0] > 0 for counts in seen.values()), "kernels of their own for each"
    assert {name: counts for name, counts in seen.items() if any(counts[1:])} == {}


def test_a_tensor_of_other_alignment_compiles_its_readers_once_more() -> None:
    """A row stride of 72 elements and a start off 16 bytes are one class: rows not aligned."""
    seen = pretend.run("strides")
    assert seen["first"] == 2
    assert seen["loose"] == seen["kernels that read k"] == 1
    assert seen["loose again"] == 0
    assert seen["moved"] == 0


def test_a_warm_call_prepares_nothing_and_launches_on_the_given_tensors() -> None:
    seen = pretend.run("warm")
    once, again, planned = seen["launches"]
    assert once == again == planned
    assert seen["more"] == [0, 0]
    assert seen["streams"] == [7]
    assert all(seen["is_given"])


def test_threads_share_one_compiled_pattern() -> None:
    seen = pretend.run("threads")
    assert seen == {"failures": [], "compiled": 0, "launches": 2 + 4 * 300 * 2}


def test_decoding_with_a_cache_compiles_nothing_after_the_first_steps() -> None:
    """It reads the pages the cache keeps: nothing is pooled in `attend`."""
    seen = pretend.run("cache")
    assert seen["compiled"] == 0
    assert seen["kernels"][0] == "score_kernel"
