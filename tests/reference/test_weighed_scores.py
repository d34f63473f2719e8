"""Scores whose heads are changed before they are joined: the ReLU and the weights of an indexer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp import compiler
from spcomp.backends import registry
from spcomp.backends.base import Specialisation
from spcomp.backends.reference.pattern import lists
from spcomp.ir import dims
from spcomp.ir.cost import replaced
from spcomp.ir.launches import SelectLaunch
from spcomp.ir.passes.place_buffers import E, scratch_bytes, slab_rows
from spcomp.ir.plan import Slabs
from spcomp.ir.spec import faults
from spcomp.ir.text import parse_program, print_program
from spcomp.patterns.dsa import dsa
from tests.api.input_cases import text_of

JOINED = {"sum": Tensor.sum, "mean": Tensor.mean, "max": Tensor.amax}


@sp.pattern
def weighed(q, k, v, w: sp.tensor("B Hq Sq"), *, heads="group", reduce="sum", by="mean", scale=0.5):
    units = sp.downsample(k, block=8, by=by)
    options = {"heads": heads, "reduce": reduce, "scale": scale}
    scores = sp.score(q, units, activation="relu", weights=w, **options)
    best = sp.topk(scores, k=2)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


def call(sq: int = 20, skv: int = 37) -> dict[str, Tensor]:
    torch.manual_seed(sq)
    q, k = torch.randn(2, 6, sq, 8).double(), torch.randn(2, 2, skv, 8).double()
    return {"q": q, "k": k, "v": k, "w": torch.randn(2, 6, sq).double()}


@pytest.mark.parametrize("by", ["mean", "minmax"])
@pytest.mark.parametrize("reduce", JOINED)
@pytest.mark.parametrize(("heads", "lists_of"), [("query", 6), ("group", 2), ("all", 1)])
def test_each_head_is_changed_before_heads_are_joined(
    heads: str, lists_of: int, reduce: str, by: str
) -> None:
    given = call()
    q, k, w = (given[n] for n in "qkw")
    (found,) = lists(weighed(heads=heads, reduce=reduce, by=by).program, given)
    each = []
    for h in range(6):
        blocks = k[:, h // 3].split(8, dim=1)
        if by == "mean":
            unit = torch.stack([b.mean(1) for b in blocks], 1)
            product = torch.einsum("btd,bud->btu", q[:, h], unit)
        else:  # the largest product any key between the extremes of a block can have
            ends = [torch.stack([b.amax(1), b.amin(1)], -1) for b in blocks]
            terms = [(q[:, h, :, :, None] * e[:, None]).amax(-1).sum(-1) for e in ends]
            product = torch.stack(terms, -1)
        each.append(torch.where(product > 0, product, 0.0) * w[:, h, :, None])
    grouped = torch.stack(each, 1).unflatten(1, (lists_of, 6 // lists_of))
    want = JOINED[reduce](grouped, 2) if heads != "query" else grouped[:, :, 0]
    torch.testing.assert_close(found.scores, 0.5 * want)


@pytest.mark.parametrize("order", ["gather", None])
def test_weights_alone_and_a_relu_alone_mean_what_they_say(order: Any) -> None:
    given = call()

    @sp.pattern
    def by_weights(q, k, v, w: sp.tensor("B Hq Sq")):
        best = sp.topk(sp.score(q, k, weights=w, heads="all", reduce="sum"), k=3)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    @sp.pattern
    def by_relu(q, k, v):
        best = sp.topk(sp.score(q, k, activation="relu", heads="all", reduce="sum"), k=3)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    q, k, _, w = given.values()
    products = q @ k.repeat_interleave(3, 1).mT
    causal = torch.arange(37) <= torch.arange(20)[:, None] + 17
    wanted = {
        by_weights: (products * w[..., None]).sum(1),
        by_relu: products.relu().sum(1),
    }
    for made, scores in wanted.items():
        extra = {"w": w} if made is by_weights else {}
        kept = scores.masked_fill(~causal, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        mask = torch.zeros(2, 20, 37, dtype=torch.bool).scatter(-1, kept[..., :3], True)
        eye = torch.eye(37).double().expand(2, 2, -1, -1).contiguous()
        out = sp.compile(made(), backend="reference", order=order)(q, k, eye, **extra)
        assert torch.equal(out > 0, (mask & causal)[:, None].expand_as(out))


def test_the_text_of_a_weighed_score_reads_back() -> None:
    program = dsa().program
    text = print_program(program)
    assert 'activation="relu", weights=%' in text.replace("\n    ", " ")
    assert parse_program(text) == program
    assert "activation" not in print_program(weighed_not())


def weighed_not() -> Any:
    @sp.pattern
    def plain(q, k, v):
        best = sp.topk(sp.score(q, k, heads="all"), k=3)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    return plain().program


def test_weights_are_a_tensor_of_the_call_of_the_heads_and_queries_scored() -> None:
    @sp.pattern
    def of_keys(q, k, v):
        best = sp.topk(sp.score(q, k, weights=k), k=3)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    assert text_of(lambda: of_keys().program) == (
        "WrongStage: score takes a tensor of the call as its weights, but was given the result of "
        "input.\n"
        "  help: score(iq, ik, weights=iw), with iw: tensor('B Hi Sq')"
    )

    @sp.pattern
    def of_other_heads(q, k, v, w: sp.tensor("B Hi Sq")):
        best = sp.topk(sp.score(q, k, weights=w), k=3)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    assert text_of(lambda: sp.compile(of_other_heads(), backend="reference")) == (
        "WrongStage: score takes a float tensor [B, Hq, Sq], one value for each head and query "
        "scored, as its weights, but was given a tensor of data[B, Hi, Sq].\n"
        "  help: declare it with tensor('B Hq Sq')."
    )

    @sp.pattern
    def of_blocks(q, k, v, w: sp.tensor("B Hq Sq")):
        best = sp.topk(sp.score(sp.downsample(q, block=4), k, weights=w), k=3)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    assert text_of(lambda: sp.compile(of_blocks(), backend="reference")) == (
        "CannotLower: weights of queries for rows of ceiling(Sq/4) cannot be lowered: a weight "
        "belongs to one query of a head, and these rows are not all queries.\n"
        "  help: score q itself, or leave weights out."
    )


def test_an_unknown_activation_is_refused() -> None:
    @sp.pattern
    def gelu(q, k, v):
        best = sp.topk(sp.score(q, k, activation="gelu"), k=3)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    text = text_of(lambda: gelu().program)
    assert "activation" in text and "'none', 'relu'" in text


def plan_of_dsa(phase: Any = "prefill") -> Any:
    backend, target = registry.backend("triton"), registry.target("sm90")
    spec = Specialisation("bfloat16", 128, 128, widths=(("Di", 128),))
    return compiler.lower(dsa(), backend=backend, target=target, spec=spec, phase=phase)


def test_a_plan_whose_weights_are_not_those_of_its_rows_is_found() -> None:
    plan = plan_of_dsa()
    assert not faults(plan)
    (slabs,) = plan.steps
    assert isinstance(slabs, Slabs)
    select = slabs.launches[0]
    assert isinstance(select, SelectLaunch) and select.weights_buf == "index_w"
    wrong = replace(select, rows_buf="q")
    broken = replace(plan, steps=(replace(slabs, launches=(wrong, *slabs.launches[1:])),))
    assert "by the weights 'index_w'" in faults(broken)["weights_fit_rows"][0]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_scratch_of_131072_tokens_stays_below_a_gibibyte(phase: Any) -> None:
    """A row has 512 KiB of scores and a list of 8 KiB: a slab has as many rows as fit."""
    plan = plan_of_dsa(phase)
    env = {"B": 2, "Hq": 128, "Hkv": 1, "G": 128, "Sq": 131072, "Skv": 131072, "D": 128, "Dv": 128}
    env |= {"Hi": 64, "Di": 128, "R0": 0} | ({"Sq": 8} if phase == "decode" else {})
    rows = slab_rows(plan, env, 2)
    assert rows >= 512 or rows == env["Sq"]
    size = dims.evaluate(replaced(scratch_bytes(plan), {E: 2}), {**env, "R": rows})
    assert size <= 1 << 30
    assert not any({dims.Sq, dims.Skv} <= set(b.dims) for b in plan.scratch())


def test_a_backend_without_the_template_refuses_by_name() -> None:
    @sp.pattern
    def blocks(q, k, v):
        best = sp.topk(sp.score(q, sp.downsample(k, block=16), activation="relu"), k=2)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    q = torch.randn(1, 2, 32, 64).half()
    text = text_of(lambda: sp.compile(blocks(), backend="ascendc")(q, q, q))
    assert "the ascendc backend refuses scores with an activation or weights" in text
