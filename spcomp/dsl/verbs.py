"""The verbs of the pipeline: downsample, score, select, gather, attend, merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import spcomp.dsl.checks as check
from spcomp.dsl.recording import Recording, current, user_line
from spcomp.dsl.selections import as_selection
from spcomp.dsl.trace import trace_score_mod
from spcomp.errors import NotANumber, WrongStage
from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.nodes import (
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

if TYPE_CHECKING:
    from torch import Tensor

Mask = Selection | Literal["causal"] | None
_TENSORS = (Input, Downsample, State)
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
    check.stage("downsample", "x", x, _TENSORS, _SIDES, "pool q, k or v")
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

    q: q or a downsample() of it; units: k or a downsample() of it. By a "minmax" pair the score is
    the upper bound of q·k inside the unit, otherwise the dot product. heads: who shares one list,
    "query" (each query head its own), "group" (the heads of a KV head) or "all"; `reduce` joins
    their scores. mask "causal" leaves out units whose last token is later than the row's last
    query.
    Raises: UnknownChoice, NotANumber, WrongStage.
    """
    check.stage(
        "score", "q", q, _TENSORS, "q or a downsample() of q", "score(q, downsample(k, ...))"
    )
    check.stage(
        "score",
        "units",
        units,
        _TENSORS,
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
    sinks: Tensor | None = None,
) -> Attend:
    """Softmax attention over the gathered keys; one softmax over all streams.

    attend(q, gather(k, sel), gather(v, sel)), attend(q, k, v), or attend(q, [gather(stream(k, v),
    sel), ...]). mask: "causal" (aligned bottom-right), a selection, or None. scale: default
    1/sqrt(D). score_mod(score, b, h, q, k) changes the scaled logit. sinks: a tensor of floats
    [Hq], read at each call; a logit of a head's softmax that has no key and no value (OpenAI,
    gpt-oss, 2025): out is multiplied by sigmoid(lse - sink), and the LSE leaves it out. A sink of
    -inf is none, one of +inf gives 0. Result [B,Hq,Sq,Dv] in q's dtype; a row that sees no key
    gives 0 and LSE -inf.
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
    held = _sinks("attend", sinks)
    return Attend(q, streams, causal, number, traced, tables, held, where=user_line())


def _sinks(verb: str, sinks: Tensor | None) -> Captured | None:
    """Capture the sink logits; their rank and dtype are checked with the types of the program."""
    if sinks is None:
        return None
    if not (hasattr(sinks, "data_ptr") and hasattr(sinks, "shape")):
        raise WrongStage(
            where=user_line(),
            verb=verb,
            argument="sinks",
            wanted="a tensor of one logit a query head, [Hq],",
            given=f"a {type(sinks).__name__}",
            way_out="pass torch.tensor([...]), or the parameter that holds them.",
        )
    return (current() or Recording()).capture(sinks)


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


def merge(*parts: Node, sinks: Tensor | None = None) -> Merge:
    """Join attention over disjoint key sets as if it were one softmax (by their LSE).

    sinks: as in `attend`; they belong to the one softmax, so no part has its own.
    Raises: WrongStage, NegativeCount.
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
        if part.sinks is not None:  # type: ignore[attr-defined]
            raise WrongStage(
                where=user_line(),
                verb="merge",
                argument="parts",
                wanted="parts of one softmax",
                given=f"the result of {type(part).__name__.lower()} with sinks of its own",
                way_out="give the sinks to the merge, which counts them once: merge(..., sinks=s).",
            )
    check.count("merge", "the number of parts", len(parts), least=1, counts="results to join")
    return Merge(parts, sinks=_sinks("merge", sinks), where=user_line())
