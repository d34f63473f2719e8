"""The passes and the text of programs with probes, sums along lines and choices by head."""

from __future__ import annotations

import pytest
import torch

import spcomp as sp
from spcomp.backends import registry
from spcomp.backends.base import Specialisation, default_schedule
from spcomp.compiler import lower, normalise
from spcomp.errors import CannotLower
from spcomp.ir.nodes import Attend, Gather, Given, Region
from spcomp.ir.passes import PATTERN_PIPELINE
from spcomp.ir.spec import faults
from spcomp.ir.text import parse_program, print_program
from spcomp.patterns.flexprefill import flexprefill
from spcomp.patterns.minference import minference
from tests.passes.meaning import assert_same_meaning

SMALL = {"block": 16, "last_q": 16, "sinks": 2, "nearest": 3}


def table(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@sp.pattern
def by_head(q, k, v, *, which, sizes):
    """Rules alone, one of three by head, one with a count by head: kernels can read it."""
    chosen = sp.per_head(which, sp.window(sizes), sp.sink(5) | sp.window(3), sp.everything())
    return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))


@sp.pattern
def chosen(q, k, v, *, way):
    """One stage that no kernel makes, and nothing else."""
    down = sp.column_sums(sp.score(sp.probe(q, rows=8), k))
    far = sp.diagonal_sums(sp.score(sp.probe(q, rows=8), k))
    part = {
        "estimate": lambda: sp.switch(sp.alike(down, down, below=1), sp.sink(4), sp.window(9)),
        "diagonal": lambda: sp.diagonals(sp.topk(far, k=9)),
        "map": lambda: sp.topp(
            sp.softmax(sp.score(sp.downsample(q, block=16), sp.downsample(k, block=16))),
            p=0.5,
            over="map",
        ),
        "count": lambda: sp.topk(sp.score(q, sp.downsample(k, block=16)), k=table(1, 2, 1, 3)),
    }[way]()
    return sp.attend(q, sp.gather(k, part), sp.gather(v, part))


PATTERNS = {
    "lines": minference(columns=9, offsets=12, **SMALL),
    "covered": minference(columns=9, offsets=12, variant="official", **SMALL),
    "blocks": minference(kind="block_sparse", blocks=2, variant="official", **SMALL),
    "heads": minference(
        kind=table(0, 1, 2, 1), initial=table(4, 0, 0, 0), recent=table(9, 1, 1, 1),
        columns=table(2, 9, 2, 5), offsets=table(3, 4, 3, 30), blocks=table(0, 0, 2, 0), **SMALL,
    ),
    "flexprefill": flexprefill(block=16, min_budget=16, tau=0.3),
    "flexprefill-official": flexprefill(block=16, min_budget=16, tau=0.3, variant="official"),
    **{f"by_{way}": chosen(way=way) for way in ("estimate", "diagonal", "map", "count")},
    "by_head": by_head(which=table(2, 0, 1, 0), sizes=table(1, 7, 1, 40)),
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pass_keeps_the_meaning(name: str) -> None:
    program = PATTERNS[name].program
    for step in PATTERN_PIPELINE:
        before, program = program, step(program)
        assert_same_meaning(PATTERNS[name], before, program)
        assert not faults(program, step.__name__)
    assert isinstance(program.result, Attend)
    assert all(isinstance(p, Gather) and isinstance(p.selection, Region) for p in
               program.result.streams)  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("stop", [0, len(PATTERN_PIPELINE)])
def test_text_reads_back(name: str, stop: int) -> None:
    program = PATTERNS[name].program
    for step in PATTERN_PIPELINE[:stop]:
        program = step(program)
    assert parse_program(print_program(program)) == program


LACKING = {
    "lines": "a list for all queries, chosen by sums along lines of a map",
    "covered": "a cover of diagonals by blocks of keys",
    "blocks": "pooling a short last unit with zeros",
    "heads": "a list",
    "flexprefill": "a list for all queries, chosen by sums along lines of a map",
    "by_estimate": "a choice between selections by what two estimates say",
    "by_diagonal": "a selection of diagonals",
    "by_map": "a list that holds a share of a whole map",
    "by_count": "a list whose length is not the same for every head",
}


@pytest.mark.parametrize("target", ["sm90", "ascend910b"])
@pytest.mark.parametrize("name", LACKING)
def test_what_no_kernel_makes_is_refused_by_its_name(name: str, target: str) -> None:
    chip = registry.target(target)
    backend = registry.backend(chip.backend)
    with pytest.raises(CannotLower) as caught:
        lower(PATTERNS[name], backend=backend, target=chip, spec=Specialisation("float16", 64, 64))
    assert f"CannotLower: {LACKING[name]}" in str(caught.value)
    assert "no kernel" in str(caught.value)


def test_rules_by_head_need_no_new_kernel() -> None:
    chip = registry.target("sm90")
    backend = registry.backend(chip.backend)
    spec = Specialisation("float16", 64, 64)
    plan = lower(PATTERNS["by_head"], backend=backend, target=chip, spec=spec)
    assert not any(isinstance(n, Given) for n in normalise(PATTERNS["by_head"].program).stages())
    assert {b.name for b in plan.buffers if b.kind == "captured"} == {"table0", "table1"}
    assert default_schedule(backend, chip, spec).order in {plan.order, "query_major"}
