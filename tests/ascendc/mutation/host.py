"""The host's tiling against the same formulas worked out in Python."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from spcomp import compiler
from spcomp.backends.ascendc.contexts.host import LENGTHS, STRIDES, TilingContext
from spcomp.backends.ascendc.emit import forms, tiling, tiling_header, tiling_source
from spcomp.backends.ascendc.emulate import host_library
from spcomp.backends.ascendc.executor import Host
from spcomp.backends.ascendc.forms import TENSORS, WORKSPACE, Form
from spcomp.backends.base import Specialisation
from spcomp.ir import dims
from spcomp.ir.passes.place_buffers import bytes_of, slab_align
from spcomp.ir.plan import SCRATCH_LIMIT_BYTES
from tests.ascendc.test_plans import BACKEND, PATTERNS, TARGET

PLACE_BYTES = 512
C_TYPES = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
FUNCTIONS = {
    "CeilDiv": lambda a, b: -(-a // b),
    "FloorDiv": lambda a, b: a // b,
    "FloorMod": lambda a, b: a % b,
    "Least": min,
    "Most": max,
}
CALLS = [
    {"B": 1, "Hq": 4, "Hkv": 2, "Sq": 200, "Skv": 300},
    {"B": 3, "Hq": 6, "Hkv": 1, "Sq": 1, "Skv": 1},
    {"B": 2, "Hq": 5, "Hkv": 5, "Sq": 64, "Skv": 65},
    {"B": 64, "Hq": 8, "Hkv": 8, "Sq": 65, "Skv": 64},
    {"B": 64, "Hq": 8, "Hkv": 8, "Sq": 65, "Skv": 65},
    {"B": 64, "Hq": 8, "Hkv": 8, "Sq": 128, "Skv": 128},
    {"B": 16, "Hq": 8, "Hkv": 8, "Sq": 1000, "Skv": 250},  # 4 blocks, as many as are always kept
    {"B": 16, "Hq": 8, "Hkv": 8, "Sq": 1000, "Skv": 300},
    {"B": 1, "Hq": 32, "Hkv": 8, "Sq": 100_000, "Skv": 130_000},  # in slabs
    {"B": 2048, "Hq": 640, "Hkv": 128, "Sq": 128, "Skv": 1280},  # scratch of exactly the limit
    {"B": 64, "Hq": 128, "Hkv": 1, "Sq": 40_000, "Skv": 260_000},
    {"B": 4096, "Hq": 128, "Hkv": 128, "Sq": 300, "Skv": 120_000},  # one row tile is too much
]


def words_of(env: Mapping[str, int], **changed: int) -> dict[str, int]:
    """Give a call's lengths and strides; each stride is another number."""
    words = {name: env[name] for name in LENGTHS}
    for n, (tensor, axes) in enumerate(STRIDES.items()):
        words |= {f"{tensor}_{axis}": 1000 * (n + 1) + 7 * m for m, axis in enumerate(axes)}
    return words | changed


@dataclass(frozen=True)
class HostPlan:
    """A plan whose tiling is judged without running a kernel."""

    pattern: str
    phase: Literal["prefill", "decode"]

    @property
    def spec(self) -> Specialisation:
        return Specialisation("float16", 64, 80)

    @property
    def source(self) -> Any:
        pattern = PATTERNS[self.pattern]
        plan = compiler.lower(
            pattern, backend=BACKEND, target=TARGET, spec=self.spec, phase=self.phase
        )
        return compiler.emit(plan, BACKEND, TARGET, self.spec)

    @property
    def context(self) -> TilingContext:
        source = self.source
        made = forms(source.plan, source.target, source.spec)
        return tiling(source.plan, source.target, source.spec, made)

    def checks(self) -> tuple[Any, ...]:
        """Give what is checked; each compiles the tiling or finds it compiled.

        What is expected is worked out here, once for all mutants.
        """
        model = Model(self)
        calls = [words_of(env) for env in CALLS]
        return (
            *(
                partial(model.check_launches, words, 5, *model.expected(words, 5))
                for words in calls
            ),
            model.check_refusals,
            model.check_short_array,
            model.check_platform,
        )


class Model:
    """The plan's launches in Python."""

    def __init__(self, plan: HostPlan) -> None:
        source = plan.source
        self.source = source
        self.plan, self.spec = source.plan, source.spec
        self.forms = forms(source.plan, source.target, source.spec)
        self.context = plan.context
        self.align = slab_align(source.plan)

    def host(self) -> Host:
        return Host(self.source, self.forms)

    def env(self, words: Mapping[str, int], first: int, rows: int) -> dict[str, int]:
        fixed = {"D": self.spec.head_dim, "Dv": self.spec.value_dim}
        return {**words, **fixed, "E": self.spec.element_bytes, "R0": first, "R": rows}

    def places(self, words: Mapping[str, int], rows: int) -> dict[str, int]:
        """Give the first byte of each scratch buffer, and of what the cores keep."""
        at, end = {}, 0
        for buffer in self.plan.scratch():
            at[buffer.name] = end
            size = dims.evaluate(bytes_of(buffer), self.env(words, 0, rows))
            end += -(-size // PLACE_BYTES) * PLACE_BYTES
        return at | {WORKSPACE: end}

    def rows(self, words: Mapping[str, int]) -> int:
        rows = -(-words["Sq"] // self.align) * self.align
        while rows > self.align:
            if self.places(words, min(rows, words["Sq"]))[WORKSPACE] <= SCRATCH_LIMIT_BYTES:
                break
            rows = -(-(rows // 2) // self.align) * self.align
        return rows

    def tiling(self, form: Form, env: Mapping[str, int]) -> bytes:
        fields = [(field.name, C_TYPES[field.c_type]) for field in form.fields]
        struct = type("Tiling", (ctypes.Structure,), {"_fields_": fields})
        made = struct()
        for field in form.fields:
            is_float = field.c_type == "float"
            text = field.value.rstrip("f") if is_float else field.value.replace("/", "//")
            setattr(made, field.name, eval(text, {**FUNCTIONS, **env}))
        return bytes(made)

    def launches(self, words: Mapping[str, int], cores: int) -> list[tuple[Any, ...]]:
        rows = self.rows(words)
        at = self.places(words, min(rows, words["Sq"]))
        places = {name: -n - 1 for n, name in enumerate(TENSORS)} | at
        slabs = [(first, min(rows, words["Sq"] - first)) for first in range(0, words["Sq"], rows)]
        runs = [((0, words["Sq"]), form) for form in self.forms if not form.is_in_slab]
        runs += [(slab, form) for slab in slabs for form in self.forms if form.is_in_slab]
        return [
            (
                form.number,
                cores if form.kind == "mix" else 2 * cores,
                tuple(places[buffer] for buffer in form.buffers),
                self.tiling(form, self.env(words, *slab)),
            )
            for slab, form in runs
        ]

    def expected(self, words: Mapping[str, int], cores: int) -> tuple[list[tuple[Any, ...]], int]:
        """Give the launches of a call and the bytes of its workspace."""
        at = self.places(words, min(self.rows(words), words["Sq"]))
        own = max(form.workspace_bytes for form in self.forms)
        return self.launches(words, cores), at[WORKSPACE] + own * cores

    def check_launches(
        self,
        words: Mapping[str, int],
        cores: int,
        launches: list[tuple[Any, ...]],
        workspace: int,
    ) -> None:
        host, values = self.host(), [*words.values()]
        try:
            got = [(s.kernel, s.blocks, s.places, s.tiling) for s in host.steps(values, cores)]
        except IndexError as error:
            raise AssertionError("a launch names a kernel that is not there") from error
        assert got == launches
        assert host.workspace_bytes(values, cores) == workspace

    def check_refusals(self) -> None:
        """At the edge of each rule the host says what the rule says."""
        host, base = self.host(), CALLS[0]
        changes: list[dict[str, int]] = [{}]
        for tensor in ("q", "k", "v"):
            changes += [{f"{tensor}_s": stride} for stride in (-1, 0, 1, 2, 65535, 65536)]
            length = "Sq" if tensor == "q" else "Skv"
            changes += [{f"{tensor}_s": 0, length: n} for n in (1, 2)]
        changes += [{name: n} for name in ("B", "Sq", "Skv") for n in (-1, 0, 1, 2)]
        changes += [{"Hq": heads} for heads in (3, 256, 258)]
        changes += [{"Hq": 1, "Hkv": 1}, {"Hq": 0}, {"Hkv": 0}]
        changes += [{"Hkv": 3}, {"Hq": 128, "Hkv": 1}, {"Hq": 129, "Hkv": 1}, {"Hq": 2, "Hkv": 2}]
        changes += [{"Skv": 64 * blocks + n} for blocks in (4092, 4093, 4094, 4095) for n in (0, 1)]
        for changed in changes:
            words = words_of(base, **changed)
            assert host.refusal([*words.values()]) == self.refusal(words), changed

    def refusal(self, words: Mapping[str, int]) -> str:
        for rule in self.context.rules:
            broken = rule.broken.replace("||", "or").replace("&&", "and").replace("/", "//")
            if eval(broken, {**FUNCTIONS, **self.env(words, 0, words["Sq"])}):
                return rule.sentence
        return ""

    def check_short_array(self) -> None:
        """An array that is too short gets the first launches and nothing behind them."""
        host, words = self.host(), words_of(CALLS[0])
        call, platform = ctypes.byref(host._of([*words.values()])), host._platform(5)
        for most in (0, 1, 3):
            laid = (host._laid * (most + 1))()
            ctypes.memset(laid, 77, ctypes.sizeof(laid))
            count = host._launches(call, ctypes.byref(platform), laid, ctypes.c_int64(most))
            assert count == len(self.launches(words, 5))
            assert bytes(laid[most]) == bytes([77]) * ctypes.sizeof(host._laid)
            assert [one.kernel for one in laid][:most] == list(range(most))

    def check_platform(self) -> None:
        """A platform that nobody filled in has the cores of the target."""
        op = self.context.op
        header, text = tiling_header(self.context), tiling_source(self.context)
        text = text.replace(f'#include "{op}_tiling.h"', header)
        text += f'\nextern "C" int32_t cores() {{ return {op}_platform{{}}.ai_cores; }}\n'
        assert host_library(text).cores() == TARGET.multiprocessors
