"""The case a project proves itself with: random tensors and what the reference makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spcomp.backends import registry
from spcomp.backends.ascendc.contexts.host import LENGTHS, STRIDES
from spcomp.backends.base import Executable, Source
from spcomp.errors import SpcompError
from spcomp.ir.launches import GatherLaunch, PoolLaunch
from spcomp.ir.plan import Plan
from spcomp.ir.program import Program

TOLERANCE = {"float16": (2e-3, 1e-3), "bfloat16": (1.6e-2, 1e-2)}
"""Relative and absolute, by dtype: of values and of the logarithm of their weights."""

SEED = 20260101
GROUP = 2
ROWS = {"prefill": 70, "decode": 3}
FEWEST_KEYS = 200
MOST_BYTES = 1 << 20


class ProjectIsWrong(SpcompError):
    """The emulator and the reference disagree on the case."""

    message = (
        "the emulated kernels of {pattern} are {error:.3g} away from the reference in {tensor}, "
        "where {allowed:.3g} is allowed."
    )
    help = "nothing was written; this is a fault of spcomp: please report the command."


@dataclass(frozen=True, slots=True)
class Case:
    """Dense tensors of a call, and the results of the reference."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor

    @property
    def dims(self) -> dict[str, int]:
        """Give the lengths by the symbols of `ir/dims.py`."""
        batch, heads, rows, head_dim = self.q.shape
        _, kv_heads, keys, value_dim = self.v.shape
        return {
            **{"B": batch, "Hq": heads, "Hkv": kv_heads, "Sq": rows, "Skv": keys},
            **{"D": head_dim, "Dv": value_dim},
        }

    def files(self, op: str) -> dict[str, bytes]:
        """Give the files of the case's folder."""
        dims, held = self.dims, {name: getattr(self, name) for name in STRIDES}
        words = {"op": op, "dtype": str(self.q.dtype).removeprefix("torch.")}
        words |= {name: str(dims[name]) for name in ("D", "Dv", *LENGTHS)}
        words |= {
            f"{name}_{axis}": str(held[name].stride(n))
            for name, axes in STRIDES.items()
            for n, axis in enumerate(axes)
        }
        text = "".join(f"{name} {value}\n" for name, value in words.items())
        return {
            "case.txt": text.encode(),
            **{f"{name}.bin": raw(held[name]) for name in ("q", "k", "v")},
            **{f"expected_{name}.bin": raw(held[name]) for name in ("out", "lse")},
        }

    def check(self, run: Executable, pattern: str) -> None:
        """Run the case.

        Raises: ProjectIsWrong, and what the executable raises.
        """
        got = run.run({"q": self.q, "k": self.k, "v": self.v}, self.dims, {})
        relative, absolute = TOLERANCE[str(self.q.dtype).removeprefix("torch.")]
        for name, one, want in zip(("out", "lse"), got, (self.out, self.lse), strict=True):
            whole, right = one.double(), want.double()
            same = whole == right  # of infinities too, whose difference is no number
            error = (whole - right).abs().masked_fill(same, 0.0).nan_to_num(nan=torch.inf)
            allowed = torch.where(right.isfinite(), absolute + relative * right.abs(), 0.0)
            if bool((error > allowed).any()):
                worst = int((error - allowed).argmax())
                raise ProjectIsWrong(
                    pattern=pattern,
                    tensor=name,
                    error=float(error.flatten()[worst]),
                    allowed=float(allowed.flatten()[worst]),
                )


def case_of(source: Source, program: Program) -> Case:
    """Make the case of a plan: some whole units of keys and a ragged one, a group of two heads."""
    spec, keys = source.spec, _keys(source)
    seeded = torch.Generator().manual_seed(SEED)
    dtype = getattr(torch, spec.dtype)

    def drawn(heads: int, rows: int, dim: int) -> Tensor:
        return torch.randn(1, heads, rows, dim, generator=seeded).to(dtype)

    heads = 2 if 2 * _bytes_of(keys, source) <= MOST_BYTES else 1
    q = drawn(GROUP * heads, ROWS[source.plan.phase], spec.head_dim)
    k, v = drawn(heads, keys, spec.head_dim), drawn(heads, keys, spec.value_dim)
    told = registry.backend("reference").interpret(program)
    assert told is not None, "the reference interprets patterns"
    out, lse = told.run({"q": q, "k": k, "v": v}, Case(q, k, v, q, q).dims, {})
    return Case(q, k, v, out.contiguous(), lse.float().contiguous())


def _keys(source: Source) -> int:
    unit = _unit(source.plan)
    most = MOST_BYTES // _bytes_of(1, source)
    return min(max(FEWEST_KEYS, 3 * unit + unit // 2 + 5), most)


def _bytes_of(keys: int, source: Source) -> int:
    return keys * (source.spec.head_dim + source.spec.value_dim) * source.spec.element_bytes


def _unit(plan: Plan) -> int:
    """Give the largest unit of keys that a launch works in."""
    units = [launch.block for launch in plan.launches() if isinstance(launch, PoolLaunch)]
    units += [launch.unit for launch in plan.launches() if isinstance(launch, GatherLaunch)]
    return max(units, default=1)


def raw(tensor: Tensor) -> bytes:
    """Give the bytes of a dense tensor."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
