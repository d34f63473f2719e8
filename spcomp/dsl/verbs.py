"""The verbs of the pipeline: downsample, score, select, gather, attend, merge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import spcomp.dsl.checks as check
from spcomp.dsl.recording import Recording, current, user_line
from spcomp.dsl.selections import as_selection
from spcomp.dsl.tokens import number_or_row
from spcomp.dsl.trace import trace_score_mod
from spcomp.errors import WrongStage
from spcomp.ir.nodes import (
    Argument,
    Attend,
    Captured,
    Centre,
    Downsample,
    Fold,
    Gather,
    Input,
    Intersect,
    Merge,
    Node,
    Permute,
    Probe,
    Selection,
    State,
    Stream,
)
from spcomp.ir.nodes.attend import QUANTISATIONS
from spcomp.ir.nodes.downsample import POOLINGS

if TYPE_CHECKING:
    from torch import Tensor

Mask = Selection | Literal["causal"] | None
_TENSORS = (Input, Permute, Centre, Downsample, State)
_SIDES = "q, k, v or a downsample() of one"


def downsample(
    x: Node, *, block: int, by: str = "mean", stride: int | None = None, tail: str = "keep"
) -> Downsample:
    """Pool each unit of `block` tokens into one vector.

    x [B,H,S,D] -> [B,H,U,D] in x's dtype; by "mean", "max", "min" or "minmax" (both, for an upper
    bound). Units start every `stride` tokens (default: block). tail "keep" pools a short last unit
    over its real tokens, "drop" leaves it out, "pad" takes the mean with zeros in it.
    Raises: NegativeCount, NotANumber, UnknownChoice, WrongStage.
    """
    check.stage("downsample", "x", x, (*_TENSORS, Argument, Probe), _SIDES, "pool q, k or v")
    check.choice("downsample", "by", by, POOLINGS)
    check.choice("downsample", "tail", tail, ("keep", "drop", "pad"))
    block = check.count("downsample", "block", block, least=1, counts="the tokens of a unit")
    step = block if stride is None else stride
    step = check.count("downsample", "stride", step, least=1, counts="the tokens between units")
    return Downsample(x, block, step, by, tail, where=user_line())  # type: ignore[arg-type]


def cached(value: Node, *, name: str = "pages") -> State:
    """Keep a downsampled value between decode steps; its meaning stays that of `value` over all
    tokens so far."""
    check.stage("cached", "value", value, (Downsample,), "a downsample()", "cache pooled keys")
    return State(value, name, where=user_line())


def fold(x: Node, *, size: int, reverse: bool = False) -> Fold:
    """Lay the vectors of `size` tokens side by side, the last one first with `reverse`.

    x [B,H,S,D] -> [B,H,ceil(S/size),size*D]; tokens past the end are zero. score(fold(q, size=s,
    reverse=True), fold(k, size=s)) sums the antidiagonals of s x s tiles (XAttention,
    arXiv:2503.16428).
    Raises: NegativeCount, NotANumber, WrongStage.
    """
    check.stage("fold", "x", x, (Input,), "q or k", "fold(q, size=8, reverse=True)")
    size = check.count("fold", "size", size, least=1, counts="the tokens of a unit")
    return Fold(x, size, bool(reverse), where=user_line())


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
    tile: tuple[int, int] | None = None,
    skip: Any = None,
    quantise: str | None = None,
) -> Attend:
    """Softmax attention over the gathered keys; one softmax over all streams.

    attend(q, gather(k, sel), gather(v, sel)), attend(q, k, v), or attend(q, [gather(stream(k, v),
    sel), ...]). mask: "causal" (aligned bottom-right), a selection, or None. scale: default
    1/sqrt(D). score_mod(score, b, h, q, k) changes the scaled logit. sinks: a tensor of floats
    [Hq], read at each call; a logit of a head's softmax that has no key and no value (OpenAI,
    gpt-oss, 2025): out is multiplied by sigmoid(lse - sink), and the LSE leaves it out. A sink of
    -inf is none, one of +inf gives 0. Result [B,Hq,Sq,Dv] in q's dtype; a row that sees no key
    gives 0 and LSE -inf.

    tile: (query rows, key tokens) of the tiles that `skip` and `quantise` speak of. skip: leave out
    a tile when each row's highest logit in it, in units of log 2, is at least this far below the
    highest of the tiles before it; a number, 0 or more, or a float32 tensor with one for each query
    or KV head. quantise: "int8" multiplies q and k in whole numbers, one scale for the rows of q,
    and one for the keys, of a tile. `ir/nodes/attend.py` has both to the bit.
    Raises: WrongStage when the parts do not fit together; NegativeCount, NotANumber, ShapeMismatch,
    UnknownChoice; CannotLower, when the pattern is compiled, for tiles of several streams.
    """
    check.stage("attend", "q", q, (Input, Permute), "q", "attend(q, ...)")
    streams = _streams(k, v)
    causal = mask == "causal" if isinstance(mask, str) or mask is None else False
    if isinstance(mask, str):
        check.choice("attend", "mask", mask, ("causal",))
    elif mask is not None:
        rule = as_selection("attend", mask)
        streams = tuple(_narrow(s, rule) for s in streams)
    traced, tables = (None, ()) if score_mod is None else trace_score_mod(score_mod)
    number = None if scale is None else check.number("attend", "scale", scale)
    least, by_head = (None, None) if skip is None else _distance(skip)
    if quantise is not None:
        check.choice("attend", "quantise", quantise, QUANTISATIONS)
    return Attend(
        q,
        streams,
        causal,
        number,
        traced,
        tables,
        _sinks("attend", sinks),
        tile=None if tile is None else _tile(tile),
        skip=least,
        skip_by_head=by_head,
        quantise=quantise,  # type: ignore[arg-type]
        where=user_line(),
    )


def _distance(skip: Any) -> tuple[float | None, Node | None]:
    return number_or_row("attend", "skip", skip, (0.0, math.inf), "a number of 0 or more")


def _tile(tile: Any) -> tuple[int, int]:
    wanted = "a pair of (query rows, key tokens)"
    check.pair("attend", "tile", tile, wanted)
    rows, keys = (check.count("attend", "tile", n, least=1, counts="tokens") for n in tile)
    return rows, keys


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


def merge(*parts: Node, gates: Any = None, sinks: Tensor | None = None) -> Merge:
    """Join attention results: by their LSE, as if disjoint key sets were one softmax, or by gates.

    gates: [B,Hq,Sq,P], one factor a part in their order: a tensor of the call (`tensor("B Hq Sq
    3")`), or a torch tensor that the pattern keeps. Then out = sum_p gates[..., p] * out_p,
    whatever the values are, and a row that a part leaves empty adds 0; the LSE is that of all keys
    together. sinks: as in `attend`; they belong to the one softmax of a merge by LSE, so that no
    part of it has its own, while each part that gates join may.
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
        if gates is None and part.sinks is not None:  # type: ignore[attr-defined]
            raise WrongStage(
                where=user_line(),
                verb="merge",
                argument="parts",
                wanted="parts of one softmax",
                given=f"the result of {type(part).__name__.lower()} with sinks of its own",
                way_out="give the sinks to the merge, which counts them once: merge(..., sinks=s).",
            )
    check.count("merge", "the number of parts", len(parts), least=1, counts="results to join")
    if gates is None:
        return Merge(parts, sinks=_sinks("merge", sinks), where=user_line())
    if sinks is not None:
        raise WrongStage(
            where=user_line(),
            verb="merge",
            argument="sinks",
            wanted="none beside gates",
            given="sinks of results that are added, which no softmax joins",
            way_out="give the sinks to the attends: merge(attend(..., sinks=s), ..., gates=g).",
        )
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
