"""What the backend builds: a plan, or a pattern itself, ready to run in plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from spcomp.backends.reference.attending import Result
from spcomp.backends.reference.pattern import run_program
from spcomp.backends.reference.plan import run_plan
from spcomp.backends.reference.pooling import pool
from spcomp.ir.launches import PoolLaunch
from spcomp.ir.nodes import Argument, Downsample, Input, State
from spcomp.ir.nodes.downsample import Pooling
from spcomp.ir.plan import Plan
from spcomp.ir.program import Program


class PlanExecutable:
    """A plan, run launch by launch (see `Executable`)."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def run(
        self, tensors: Mapping[str, Tensor], dims: Mapping[str, int], kept: Mapping[str, Tensor]
    ) -> Result:
        """Run the plan; `dims` is read off the tensors."""
        return run_plan(self.plan, tensors, kept=kept)

    def update(
        self,
        tensors: Mapping[str, Tensor],
        dims: Mapping[str, int],
        kept: Mapping[str, Tensor],
        begin: int,
    ) -> None:
        """Bring states up to date for the tokens from `begin` on."""
        for launch in self.plan.launches():
            if not isinstance(launch, PoolLaunch):
                continue
            high = kept.get(self.plan.buffer(launch.out_buf).state)
            low = kept.get(self.plan.buffer(launch.low_buf).state) if launch.low_buf else None
            if high is not None:
                x = tensors[launch.x_buf]
                renew(x, high, low, launch.by, launch.block, launch.stride, begin)


class ProgramExecutable:
    """A pattern, run stage by stage without a plan (see `Executable`).

    It computes what no plan says, keeps no list, and is differentiable with the memory of a few
    chunks.
    """

    def __init__(self, program: Program) -> None:
        self.program = program

    def run(
        self, tensors: Mapping[str, Tensor], dims: Mapping[str, int], kept: Mapping[str, Tensor]
    ) -> Result:
        """Run the pattern; `dims` is read off the tensors."""
        return run_program(self.program, tensors, kept=kept)

    def update(
        self,
        tensors: Mapping[str, Tensor],
        dims: Mapping[str, int],
        kept: Mapping[str, Tensor],
        begin: int,
    ) -> None:
        """Bring states up to date for the tokens from `begin` on."""
        for node, value, source in self._states():
            high, low = (kept.get(f"{node.name}.{side}") for side in ("max", "min"))
            if high is not None:
                x = tensors[source.name]
                renew(x, high, low, value.by, value.block, value.stride, begin)

    def _states(self) -> Iterator[tuple[State, Downsample, Input | Argument]]:
        for node in self.program.stages():
            if isinstance(node, State):
                assert isinstance(node.value, Downsample)
                assert isinstance(node.value.x, (Input, Argument))
                yield node, node.value, node.value.x


def renew(
    x: Tensor,
    high: Tensor,
    low: Tensor | None,
    by: Pooling,
    block: int,
    stride: int,
    begin: int,
) -> None:
    """Pool again, in place, the units that hold a token from `begin` on.

    x [B,H,S,D] holds all tokens; high, and low of a minmax pair, are [B,H,U,D] with the units of
    all of them.
    """
    first = max(0, (begin - block) // stride + 1)
    count = high.shape[2] - first
    values, lows = pool(x[:, :, first * stride :], by, block, stride, count)
    high[:, :, first:].copy_(values)
    if low is not None:
        assert lows is not None
        low[:, :, first:].copy_(lows)
