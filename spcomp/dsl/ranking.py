"""The verbs that rank and choose: score, softmax, regroup, topk, topp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import spcomp.dsl.checks as check
from spcomp.dsl.recording import user_line
from spcomp.dsl.selections import captured_counts, captured_row
from spcomp.errors import NotANumber
from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.nodes import (
    Argument,
    Centre,
    Downsample,
    Fold,
    Input,
    Local,
    Needed,
    Node,
    Permute,
    Probe,
    Regroup,
    Score,
    Selection,
    Similar,
    Sink,
    Softmax,
    State,
    Sums,
    TopK,
    TopP,
    Union,
)
from spcomp.ir.nodes.score import ACTIVATIONS, JOININGS, REDUCTIONS, SHARINGS
from spcomp.ir.nodes.select import CROSSINGS, EXTENTS
from spcomp.ir.units import units_ranked

_SIDES = (Input, Argument, Permute, Centre, Downsample, Fold, Probe, State)
_SCORES = (Score, Softmax, Regroup, Sums)


def score(
    q: Node,
    units: Node,
    *,
    scale: float = 1.0,
    mask: str | None = "causal",
    heads: str = "query",
    reduce: str = "mean",
    activation: str = "none",
    weights: Node | None = None,
    among: Node | None = None,
) -> Score:
    """Score units of keys for rows of queries, in float32.

    q: q or a downsample() of it; units: k or a downsample() of it; either may be a tensor of the
    call in its place, [B,X,Sq,Y] or [B,X,Skv,Y], or a downsample() of one, where the heads X of the
    units serve as many heads of the rows each. By a "minmax" pair the score is the upper bound of
    q·k inside the unit, otherwise the dot product. heads: who shares one list, "query" (each query
    head its own), "group" (the heads of a KV head) or "all"; `reduce` joins their scores.
    activation "relu" sets scores below 0 to 0, and weights, a tensor of the call with one value for
    each head and query, tensor('B Hi Sq'), multiply them; both before heads are joined. mask
    "causal" leaves out units whose last token is later than the row's last query, "begun" only
    those whose first token is. among: the keys in blocks that are alike, similar(k, ...); other
    units are no candidates.
    Raises: UnknownChoice, NotANumber, WrongStage; CannotLower, when the pattern is compiled, where
    the units and the blocks differ.
    """
    check.stage("score", "q", q, _SIDES, "q or a downsample() of q", "score(q, downsample(k, ...))")
    check.stage(
        "score",
        "units",
        units,
        _SIDES,
        "k or a downsample() of k",
        "score(q, downsample(k, ...))",
    )
    check.choice("score", "mask", mask, ("causal", "begun", None))  # type: ignore[arg-type]
    check.choice("score", "heads", heads, SHARINGS)
    check.choice("score", "reduce", reduce, REDUCTIONS)
    check.choice("score", "activation", activation, ACTIVATIONS)
    if weights is not None:
        wanted = "a tensor of the call"
        example = "score(iq, ik, weights=iw), with iw: tensor('B Hi Sq')"
        check.stage("score", "weights", weights, (Argument,), wanted, example)
    scale = check.number("score", "scale", scale)
    if among is not None:
        way_out = "score(q, units, among=similar(k, ...))"
        check.stage("score", "among", among, (Similar,), "a similar() of keys", way_out)
    return Score(
        q,
        units,
        scale,
        mask is not None,
        heads,  # type: ignore[arg-type]
        reduce,  # type: ignore[arg-type]
        activation,  # type: ignore[arg-type]
        weights,
        begun=mask == "begun",
        among=among,
        where=user_line(),
    )


def softmax(
    scores: Node,
    *,
    scale: float | None = None,
    over: Node | None = None,
    heads: str | None = None,
    reduce: str = "sum",
) -> Softmax:
    """Turn the scores of each row into probabilities over its candidates.

    scale: what scores are multiplied by first; default 1/sqrt(D), D the head dimension of q.
    over: a score() of the same rows whose log-sum-exp divides instead of the row's own. heads,
    reduce: as in score(), joining probabilities. A row without candidates has probability 0
    everywhere.
    Raises: NotANumber, UnknownChoice, WrongStage; CannotLower where `over` has other rows or heads.
    """
    check.stage("softmax", "scores", scores, (Score,), "a score()", "softmax(score(q, units))")
    if over is not None:
        check.stage("softmax", "over", over, (Score,), "a score()", "softmax(a, over=score(q, b))")
    if heads is not None:
        check.choice("softmax", "heads", heads, SHARINGS)
    check.choice("softmax", "reduce", reduce, REDUCTIONS)
    number = None if scale is None else check.number("softmax", "scale", scale)
    line = user_line()
    return Softmax(scores, number, over, heads, reduce, where=line)  # type: ignore[arg-type]


def regroup(
    scores: Node, *, block: int, rows: int = 1, by: str = "sum", from_end: bool = False
) -> Regroup:
    """Carry scores to blocks of `block` key tokens and of `rows` query rows.

    By "sum" a unit counts for each block by the share of it that lies inside, by "max" the highest
    unit that touches a block counts. Sums along lines stay one row. from_end, for diagonal_sums()
    alone: blocks of offsets are counted from the largest.
    Raises: NegativeCount, NotANumber, UnknownChoice, WrongStage; CannotLower where a size is no
    multiple of what the scores come in.
    """
    check.stage(
        "regroup",
        "scores",
        scores,
        (Score, Softmax, Sums),
        "a score(), a softmax() or sums of one",
        "regroup(p, ...)",
    )
    block = check.count("regroup", "block", block, least=1, counts="the key tokens of a block")
    rows = check.count("regroup", "rows", rows, least=1, counts="the query rows of a block")
    check.choice("regroup", "by", by, JOININGS)
    line = user_line()
    return Regroup(scores, rows, block, by, bool(from_end), where=line)  # type: ignore[arg-type]


def topp(
    scores: Node,
    *,
    p: Any,
    crossing: str = "keep",
    always: Selection | Sequence[Selection] = (),
    least: int = 0,
    over: str = "row",
) -> TopP:
    """Keep the best units of each row that together hold a share `p` of its scores.

    scores: none below 0, such as a softmax(). p: a share from 0 to 1, or a float32 tensor with one
    for each head of the list. crossing: whether the unit that reaches the share is kept ("keep") or
    not ("drop"). always (sink and local, counted in units) is taken first and counts. least: units
    kept at least. over "map": all rows of a head share p, so one may keep many and another none.
    Raises: NegativeCount, NotANumber, UnknownChoice, ShapeMismatch, WrongStage.
    """
    check.stage(
        "topp", "scores", scores, _SCORES, "a score(), softmax() or regroup()", "topp(..., p=0.9)"
    )
    check.choice("topp", "crossing", crossing, CROSSINGS)
    least = check.count("topp", "least", least, least=0, counts="units kept at least")
    parts = _anchors(always, unit_stride(scores))
    is_table = hasattr(p, "shape")
    table = captured_row("topp", "p", p) if is_table else None
    number = None if is_table else check.share("topp", "p", p)
    line = user_line()
    check.choice("topp", "over", over, EXTENTS)
    return TopP(scores, number, table, crossing, parts, least, over, where=line)  # type: ignore[arg-type]


def topk(
    scores: Node,
    *,
    k: Any = None,
    fraction: float | None = None,
    always: Selection | Sequence[Selection] = (),
    round: str = "up",
) -> TopK:
    """Keep the best units of each row; ties go to the lower index.

    Give `k`, the number of units, or `fraction`, a share of all units in (0, 1], rounded "up" or
    "down", and then to 1 at least. k is a number, an int32 tensor with one for each head of the
    list, or a needed(). `always` (sink and local, counted in units) is kept whatever the score and
    counts towards k.
    Raises: NegativeCount, NotANumber, WrongStage; ForcedSetTooLarge when the pattern is compiled.
    """
    check.stage(
        "topk",
        "scores",
        scores,
        _SCORES,
        "a score(), softmax() or regroup()",
        "topk(score(q, units), k=8)",
    )
    unit = unit_stride(scores)
    check.choice("topk", "round", round, ("up", "down"))
    parts = _anchors(always, unit)
    if isinstance(k, Needed):
        every = dims.ceildiv(dims.Skv, unit)
        most = every if k.most is None else dims.least(k.most, every)
        return TopK(scores, most, parts, k, where=user_line())
    if hasattr(k, "shape"):
        table, most = captured_counts("topk", "k", k, least=_forced(parts))
        return TopK(scores, most, parts, table, where=user_line())
    amount = _amount(k, fraction, unit, round == "up")
    return TopK(scores, amount, parts, where=user_line())


def _forced(parts: tuple[Selection, ...]) -> int:
    return sum(p.count for p in parts if isinstance(p, (Sink, Local)))


def _amount(k: Any, fraction: float | None, unit: int, up: bool) -> Dim:
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
    wanted = dims.ceildiv(dims.Skv, unit) * ratio.numerator
    if up:
        return dims.ceildiv(wanted, ratio.denominator)
    # floor(a / b) is ceil((a + 1) / b) - 1.
    return dims.largest(1, dims.ceildiv(wanted + 1, ratio.denominator) - 1)


def unit_stride(scores: Node) -> int:
    """Give the tokens between the units a score ranks; 1 for tokens."""
    return units_ranked(scores).stride


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
