"""The verbs of the pipeline: downsample, score, select, gather, attend, merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import spcomp.dsl.checks as check
from spcomp.dsl.recording import current, user_line
from spcomp.dsl.selections import as_selection
from spcomp.dsl.trace import trace_score_mod
from spcomp.errors import NotANumber, WrongStage
from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.nodes import (
    Argument,
    Attend,
    Captured,
    Downsample,
    Gather,
    Input,
    Intersect,
    Local,
    Merge,
    Node,
    Score,
    Selection,
    Sink,
    State,
    Stream,
    TopK,
    Union,
)
from spcomp.ir.nodes.downsample import POOLINGS
from spcomp.ir.nodes.score import REDUCTIONS, SHARINGS

Mask = Selection | Literal["causal"] | None
_TENSORS = (Input, Downsample, State)
_SIDES_OF_SCORE = (*_TENSORS, Argument)
_SIDES = "q, k, v or a downsample() of one"


def downsample(
    x: Node, *, block: int, by: str = "mean", stride: int | None = None, tail: str = "keep"
) -> Downsample:
    """Pool each unit of `block` tokens into one vector.

    x [B,H,S,D] -> [B,H,U,D] in x's dtype; by "mean", "max", "min" or "minmax" (both, for an upper
    bound). Units start every `stride` tokens (default: block). tail "keep" pools a short last unit
    over its real tokens, "drop" leaves it out.
    Raises: NegativeCount, NotANumber, UnknownChoice, WrongStage.
    """
    check.stage("downsample", "x", x, _SIDES_OF_SCORE, _SIDES, "pool q, k or v")
    check.choice("downsample", "by", by, POOLINGS)
    check.choice("downsample", "tail", tail, ("keep", "drop"))
    block = check.count("downsample", "block", block, least=1, counts="the tokens of a unit")
    step = block if stride is None else stride
    step = check.count("downsample", "stride", step, least=1, counts="the tokens between units")
    return Downsample(x, block, step, by, tail, where=user_line())  # type: ignore[arg-type]


def cached(value: Node, *, name: str = "pages") -> State:
    """Keep a downsampled value between decode steps; its meaning stays that of `value` over all
    tokens so far."""
    check.stage("cached", "value", value, (Downsample,), "a downsample()", "cache pooled keys")
    return State(value, name, where=user_line())


def score(
    q: Node,
    units: Node,
    *,
    scale: float = 1.0,
    mask: str | None = "causal",
    heads: str = "query",
    reduce: str = "mean",
) -> Score:
    """Score units of keys for rows of queries, in float32.

    q: q or a downsample() of it; units: k or a downsample() of it; either may be a tensor of the
    call in its place, [B,X,Sq,Y] or [B,X,Skv,Y], or a downsample() of one, where the heads X of the
    units serve as many heads of the rows each. By a "minmax" pair the score is
    the upper bound of q·k inside the unit, otherwise the dot product. heads: who shares one list,
    "query" (each query head its own), "group" (the heads of a KV head) or "all"; `reduce` joins
    their scores. mask "causal" leaves out units whose last token is later than the row's last
    query.
    Raises: UnknownChoice, NotANumber, WrongStage.
    """
    check.stage(
        "score", "q", q, _SIDES_OF_SCORE, "q or a downsample() of q", "score(q, downsample(k, ...))"
    )
    check.stage(
        "score",
        "units",
        units,
        _SIDES_OF_SCORE,
        "k or a downsample() of k",
        "score(q, downsample(k, ...))",
    )
    check.choice("score", "mask", mask, ("causal", None))  # type: ignore[arg-type]
    check.choice("score", "heads", heads, SHARINGS)
    check.choice("score", "reduce", reduce, REDUCTIONS)
    scale = check.number("score", "scale", scale)
    line = user_line()
    return Score(q, units, scale, mask == "causal", heads, reduce, where=line)  # type: ignore[arg-type]


def topk(
    scores: Node,
    *,
    k: int | None = None,
    fraction: float | None = None,
    always: Selection | Sequence[Selection] = (),
) -> TopK:
    """Keep the best units of each row; ties go to the lower index.

    Give `k`, the number of units, or `fraction`, a share of all units in (0, 1]. `always` (sink and
    local, counted in units) is kept whatever the score and counts towards k.
    Raises: NegativeCount, NotANumber, WrongStage; ForcedSetTooLarge when the pattern is compiled.
    """
    check.stage("topk", "scores", scores, (Score,), "a score()", "topk(score(q, units), k=8)")
    unit = unit_stride(scores)
    amount = _amount(k, fraction, unit)
    parts = _anchors(always, unit)
    return TopK(scores, amount, parts, where=user_line())


def _amount(k: int | None, fraction: float | None, unit: int) -> Dim:
    if (k is None) == (fraction is None):
        raise NotANumber(
            where=user_line(),
            verb="topk",
            name="k and fraction",
            value=(k, fraction),
            kind="pair",
            wanted="exactly one of k and fraction",
        )
    if k is not None:
        return check.count("topk", "k", k, least=0, counts="units to keep")
    share = check.number("topk", "fraction", fraction)
    if not 0 < share <= 1:
        raise NotANumber(
            where=user_line(),
            verb="topk",
            name="fraction",
            value=share,
            kind="float",
            wanted="a share above 0 and at most 1",
        )
    ratio = Fraction(share).limit_denominator(1 << 16)
    return dims.ceildiv(dims.ceildiv(dims.Skv, unit) * ratio.numerator, ratio.denominator)


def unit_stride(scores: Node) -> int:
    """Give the tokens between the units a score ranks; 1 for tokens."""
    assert isinstance(scores, Score)
    side = scores.k.value if isinstance(scores.k, State) else scores.k
    return side.stride if isinstance(side, Downsample) else 1


def _anchors(always: Selection | Sequence[Selection], unit: int) -> tuple[Selection, ...]:
    given = (always,) if isinstance(always, Selection) else tuple(always)
    flat: list[Selection] = []
    for part in given:
        flat.extend(part.parts if isinstance(part, Union) else (part,))  # type: ignore[arg-type]
    for part in flat:
        check.stage(
            "topk",
            "always",
            part,
            (Sink, Local),
            "sink(n), local(n) or own()",
            "combine other selections with the result: topk(...) | selection",
        )
    return tuple(_in_units(p, unit) for p in flat)


def _in_units(anchor: Selection, unit: int) -> Selection:
    assert isinstance(anchor, (Sink, Local))
    return replace(anchor, unit=unit)


def gather(x: Node, selection: Selection) -> Gather:
    """Give the part of k, v or a stream that a selection holds."""
    check.stage("gather", "x", x, (*_TENSORS, Stream), "k, v or a stream", "gather(k, topk(...))")
    return Gather(x, as_selection("gather", selection), where=user_line())


def stream(k: Node, v: Node) -> Stream:
    """Pair keys with values: tokens, or units pooled from both with the same block and stride."""
    for name, side in (("k", k), ("v", v)):
        check.stage("stream", name, side, _TENSORS, _SIDES, "stream(k, v)")
    if _units(k) != _units(v):
        raise WrongStage(
            where=user_line(),
            verb="stream",
            argument="v",
            wanted=f"values in the units of its keys ({_described(k)})",
            given=f"values in {_described(v)}",
            way_out="downsample k and v with the same block and stride.",
        )
    return Stream(k, v, where=user_line())


def _units(x: Node) -> tuple[int, int, str]:
    inner = x.value if isinstance(x, State) else x
    return (
        (inner.block, inner.stride, inner.tail) if isinstance(inner, Downsample) else (1, 1, "keep")
    )


def _described(x: Node) -> str:
    block, step, _ = _units(x)
    return "tokens" if block == step == 1 else f"units of {block} tokens every {step}"


def attend(
    q: Node,
    k: Node | Sequence[Node],
    v: Node | None = None,
    *,
    mask: Mask = "causal",
    scale: float | None = None,
    score_mod: Callable[..., Any] | None = None,
) -> Attend:
    """Softmax attention over the gathered keys; one softmax over all streams.

    attend(q, gather(k, sel), gather(v, sel)), attend(q, k, v), or attend(q, [gather(stream(k, v),
    sel), ...]). mask: "causal" (aligned bottom-right), a selection, or None. scale: default
    1/sqrt(D). score_mod(score, b, h, q, k) changes the scaled logit. Result [B,Hq,Sq,Dv] in q's
    dtype; a row that sees no key gives 0 and LSE -inf.
    Raises: WrongStage when the parts do not fit together.
    """
    check.stage("attend", "q", q, (Input,), "q", "attend(q, ...)")
    streams = _streams(k, v)
    causal = mask == "causal" if isinstance(mask, str) or mask is None else False
    if isinstance(mask, str):
        check.choice("attend", "mask", mask, ("causal",))
    elif mask is not None:
        rule = as_selection("attend", mask)
        streams = tuple(_narrow(s, rule) for s in streams)
    traced, tables = (None, ()) if score_mod is None else trace_score_mod(score_mod)
    number = None if scale is None else check.number("attend", "scale", scale)
    return Attend(q, streams, causal, number, traced, tables, where=user_line())


def _streams(k: Node | Sequence[Node], v: Node | None) -> tuple[Node, ...]:
    if v is None:
        parts = (k,) if isinstance(k, Node) else tuple(k)
        for part in parts:
            check.stage(
                "attend",
                "k",
                part,
                (Stream, Gather),
                "streams",
                "attend(q, [gather(stream(k, v), sel)])",
            )
        return parts
    keys, key_selection = _ungathered(k)
    values, value_selection = _ungathered(v)
    if key_selection != value_selection:
        raise WrongStage(
            where=user_line(),
            verb="attend",
            argument="v",
            wanted="values gathered by the selection of its keys",
            given="values gathered by another selection",
            way_out=(
                "name the selection once: s = topk(...); attend(q, gather(k, s), gather(v, s))."
            ),
        )
    pair = stream(keys, values)
    return (pair if key_selection is None else Gather(pair, key_selection, where=user_line()),)


def _ungathered(x: Any) -> tuple[Node, Node | None]:
    return (x.stream, x.selection) if isinstance(x, Gather) else (x, None)


def _narrow(part: Node, rule: Selection) -> Node:
    if isinstance(part, Gather):
        both = Intersect((part.selection, rule), where=user_line())
        return Gather(part.stream, both, where=part.where)
    return Gather(part, rule, where=user_line())


def merge(*parts: Node, gates: Any = None) -> Merge:
    """Join attention results: by their LSE, as if disjoint key sets were one softmax, or by gates.

    gates: [B,Hq,Sq,P], one factor a part in their order: a tensor of the call (`tensor("B Hq Sq
    3")`), or a torch tensor that the pattern keeps. Then out = sum_p gates[..., p] * out_p,
    whatever the values are, and a row that a part leaves empty adds 0; the LSE is that of all keys
    together.
    Raises: WrongStage.
    """
    for part in parts:
        check.stage(
            "merge",
            "parts",
            part,
            (Attend, Merge),
            "results of attend()",
            "merge(attend(...), attend(...))",
        )
    check.count("merge", "the number of parts", len(parts), least=1, counts="results to join")
    if gates is None:
        return Merge(parts, where=user_line())
    held = _gates(gates, len(parts))
    return Merge(parts, "gates", held, where=user_line())


def _gates(gates: Any, parts: int) -> Node:
    record = current()
    if record is not None and not isinstance(gates, Node) and hasattr(gates, "shape"):
        gates = record.capture(gates)
    check.stage(
        "merge",
        "gates",
        gates,
        (Argument, Captured),
        f"a tensor [B, Hq, Sq, {parts}]",
        f"declare it: gates: tensor('B Hq Sq {parts}').",
    )
    assert isinstance(gates, Node)
    return gates
