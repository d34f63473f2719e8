"""Types of stages: what each gives, in symbolic dims. Shape checks everywhere derive from here.

| symbol | meaning |
|---|---|
| B, Hq, Hkv, G | batch, query heads, key/value heads, G = Hq / Hkv |
| Sq, Skv | query rows, key tokens |
| D, Dv | head dimension of q and k, of v |
| Nq, Nk, K | rows of a list, units of keys, units kept |
"""

from __future__ import annotations

from dataclasses import dataclass

from spcomp.errors import CannotLower, WrongStage
from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.line_rules import check_offsets, check_ranked, check_tiling
from spcomp.ir.nodes import (
    Alike,
    Argument,
    Attend,
    Captured,
    Centre,
    Downsample,
    Fold,
    Gather,
    Given,
    Input,
    Merge,
    Needed,
    Node,
    Permute,
    Probe,
    Regroup,
    Score,
    Selection,
    Softmax,
    State,
    Stream,
    Sums,
    TopK,
    TopP,
)
from spcomp.ir.nodes.score import SHARINGS
from spcomp.ir.program import Program
from spcomp.ir.score_sides import check_product, check_weights
from spcomp.ir.token_rules import check_tokens
from spcomp.ir.units import (
    TOKENS,
    probe_below,
    rows_ranking,
    score_below,
    sums_below,
    units_of,
    units_ranked,
)

DATA = "data"
SINK_DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True, slots=True)
class TensorType:
    """Dims and dtype of one tensor; dtype "data" is that of q, k and v."""

    dims: tuple[Dim, ...]
    dtype: str = DATA

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(d) for d in self.dims)}]"


@dataclass(frozen=True, slots=True)
class SelectionType:
    """A set of (query, key) pairs; lists also have indices [B,Hs,Nq,K] and counts [B,Hs,Nq]."""

    indices: TensorType | None = None

    def __str__(self) -> str:
        return "pairs" if self.indices is None else f"pairs from {self.indices}"


Type = TensorType | SelectionType

INPUTS: dict[str, TensorType] = {
    "query": TensorType((dims.B, dims.Hq, dims.Sq, dims.D)),
    "key": TensorType((dims.B, dims.Hkv, dims.Skv, dims.D)),
    "value": TensorType((dims.B, dims.Hkv, dims.Skv, dims.Dv)),
}


def types_of(program: Program) -> dict[Node, Type]:
    """Type every stage of a program.

    Raises: WrongStage, CannotLower, at the stage's line, when dims that must agree do not.
    """
    types: dict[Node, Type] = {}
    for node in program.stages():
        check_tokens(node, role_of(node))
        types[node] = _type(node, types)
    return types


def role_of(node: Node) -> str:
    """Give the role of the input a tensor comes from: query, key or value; "table" for what is on
    no side of a product."""
    source = source_of(node)
    if isinstance(source, Input):
        return source.role
    if isinstance(source, Argument) and len(source.dims) == 4 and source.dims[0] == dims.B:
        return {dims.Sq: "query", dims.Skv: "key"}.get(source.dims[2], "table")
    return "table"


def source_of(node: Node) -> Node:
    """Give the input a tensor was made from, or the tensor itself."""
    while isinstance(node, (Downsample, Fold, Permute, Centre, Probe, State)):
        node = node.value if isinstance(node, State) else node.x
    return node


def source_type(node: Node) -> TensorType:
    """Type the input a tensor was pooled from."""
    source = source_of(node)
    if isinstance(source, Input):
        return INPUTS[source.role]
    assert isinstance(source, Argument), source
    return TensorType(source.dims, source.dtype)


def list_heads(node: Node) -> Dim:
    """Give the heads of the lists that a map of scores ranks."""
    while isinstance(node, (Regroup, Sums)):
        node = node.scores
    assert isinstance(node, (Score, Softmax)), node
    score = score_below(node)
    heads = node.heads or score.heads
    sides = {"query": score.q, "group": score.k}
    return source_type(sides[heads]).dims[1] if heads in sides else 1


def _type(node: Node, types: dict[Node, Type]) -> Type:
    if isinstance(node, Input):
        return INPUTS[node.role]
    if isinstance(node, (Captured, Argument)):
        return TensorType(node.dims, node.dtype)
    if isinstance(node, (Permute, Centre)):
        return types[node.x]
    if isinstance(node, Downsample):
        return _pooled(node, _tensor(types[node.x]))
    if isinstance(node, Fold):
        return _folded(node, _tensor(types[node.x]))
    if isinstance(node, Probe):
        batch, heads, rows, width = _tensor(types[node.x]).dims
        return TensorType((batch, heads, dims.least(node.rows, rows), width))
    if isinstance(node, State):
        return types[node.value]
    if isinstance(node, Score):
        return _scored(node, types)
    if isinstance(node, Softmax):
        return _probabilities(node, types)
    if isinstance(node, Regroup):
        return _regrouped(node, _tensor(types[node.scores]))
    if isinstance(node, (Sums, Needed, Alike)):
        return _of_a_map(node, types)
    check_offsets(node)
    if isinstance(node, (TopK, TopP)):
        check_ranked(node)
        scores = _tensor(types[node.scores])
        kept = dims.least(node.k, scores.dims[3]) if isinstance(node, TopK) else scores.dims[3]
        return SelectionType(TensorType((*scores.dims[:3], kept), "int32"))
    if isinstance(node, Given):
        return SelectionType(_tensor(types[node.tensor]))
    if isinstance(node, Selection):
        return SelectionType()
    return _attention(node, types)


def _tensor(kind: Type) -> TensorType:
    assert isinstance(kind, TensorType)
    return kind


def _pooled(node: Downsample, x: TensorType) -> TensorType:
    if role_of(node.x) == "table":
        raise WrongStage(
            where=node.where,
            verb="downsample",
            argument="x",
            wanted="tokens, [B, heads, Sq or Skv, width],",
            given=f"a tensor of {x}",
            way_out="declare it with tensor('B Hi Skv Di').",
        )
    batch, heads, tokens, width = x.dims
    probe = probe_below(node.x)
    is_one = probe is not None and probe.rows <= node.block
    return TensorType((batch, heads, 1 if is_one else units_of(node).count(tokens), width), x.dtype)


def _scored(node: Score, types: dict[Node, Type]) -> TensorType:
    q, k = _tensor(types[node.q]), _tensor(types[node.k])
    for argument, side, role in (("q", node.q, "query"), ("units", node.k, "key")):
        if role_of(side) != role:
            raise WrongStage(
                where=node.where,
                verb="score",
                argument=argument,
                wanted=f"{'queries' if role == 'query' else 'keys'}",
                given=f"something made from the {role_of(side)} input",
                way_out="score(q side, k side): the first ranks, the second is ranked.",
            )
    rows = units_of(node.q)
    if rows.block != rows.stride or rows.tail == "drop":
        raise CannotLower(
            where=node.where,
            what=f"a score of query blocks of {rows.block} every {rows.stride} tokens",
            why="the blocks of queries must tile the sequence, so that each query has one list",
            way_out="downsample q with stride equal to block and tail='keep'.",
        )
    check_product(node, q, k, list_heads(node))
    if node.weights is not None:
        check_weights(node, q, _tensor(types[node.weights]))
    return TensorType((dims.B, list_heads(node), q.dims[2], k.dims[2]), "float32")


def _folded(node: Fold, x: TensorType) -> TensorType:
    batch, heads, tokens, width = x.dims
    return TensorType((batch, heads, dims.ceildiv(tokens, node.size), width * node.size), x.dtype)


def _probabilities(node: Softmax, types: dict[Node, Type]) -> TensorType:
    scores = _tensor(types[node.scores])
    if node.over is not None:
        over = _tensor(types[node.over])
        if over.dims[:3] != scores.dims[:3]:
            raise CannotLower(
                where=node.where,
                what=f"scores {scores} divided by the log-sum-exp of {over}",
                why="both need the same heads and rows",
                way_out="score both with the same q side and the same heads.",
            )
    if node.heads is None:
        return scores
    inner = score_below(node).heads
    if SHARINGS.index(node.heads) < SHARINGS.index(inner):
        raise CannotLower(
            where=node.where,
            what=f'probabilities with heads="{node.heads}" of scores with heads="{inner}"',
            why="heads that were joined cannot be told apart again",
            way_out=f'give the score heads="{node.heads}".',
        )
    return TensorType((scores.dims[0], list_heads(node), *scores.dims[2:]), scores.dtype)


def _regrouped(node: Regroup, scores: TensorType) -> TensorType:
    rows, units = rows_ranking(node.scores), units_ranked(node.scores)
    sums = sums_below(node)
    if sums is None:
        check_tiling(node, node.scores)
    if node.from_end and (sums is None or sums.along != "diagonals"):
        raise CannotLower(
            where=node.where,
            what="scores regrouped from the end",
            why="only offsets may be counted from the other end; blocks of keys begin at token 0",
            way_out="regroup diagonal_sums(), or leave from_end out.",
        )
    for name, value, grain in (
        ("rows", node.rows, rows.stride),
        ("block", node.block, units.stride),
    ):
        if value % grain:
            raise CannotLower(
                where=node.where,
                what=f"scores regrouped with {name}={value}",
                why=f"they come every {grain} tokens, and {value} is no multiple of {grain}",
                way_out=f"give {name} a multiple of {grain}.",
            )
    return TensorType(
        (
            *scores.dims[:2],
            1 if sums is not None else dims.ceildiv(dims.Sq, node.rows),
            dims.ceildiv(dims.Skv, node.block),
        ),
        scores.dtype,
    )


def _of_a_map(node: Sums | Needed | Alike, types: dict[Node, Type]) -> TensorType:
    """Type what is made from whole rows of a map."""
    if isinstance(node, Alike):
        return _agreement(node, _tensor(types[node.p]), _tensor(types[node.q]))
    batch, heads, rows, units = _tensor(types[node.scores]).dims
    if isinstance(node, Needed):
        return TensorType((batch, heads, rows), "int32")
    if node.along == "columns":
        return TensorType((batch, heads, 1, units), "float32")
    score = score_below(node.scores)
    in_tokens = units_of(score.k) == TOKENS == units_of(score.q) == units_ranked(node.scores)
    if not (in_tokens and score.causal):
        raise CannotLower(
            where=node.where,
            what="sums along diagonals of this map",
            why="an offset is a query's position less a key's, and none is below 0"
            if in_tokens
            else "its rows or units are no tokens, so its entries have no one offset",
            way_out="diagonal_sums(softmax(score(probe(q, rows=64), k))) sums such a map.",
        )
    return TensorType((batch, heads, 1, dims.Skv), "float32")


def _agreement(node: Alike, p: TensorType, q: TensorType) -> TensorType:
    if p.dims != q.dims or p.dims[2] != 1:
        raise CannotLower(
            where=node.where,
            what=f"comparing {p} with {q}",
            why="two estimates are alike where both are one row a head over the same units",
            way_out="give both one row: sums along columns, or a score of a probe pooled to one.",
        )
    return TensorType(p.dims[:2], "bool")


def _attention(node: Node, types: dict[Node, Type]) -> Type:
    if isinstance(node, Stream):
        return types[node.k]
    if isinstance(node, Gather):
        return types[node.stream]
    assert isinstance(node, (Attend, Merge)), node
    if node.sinks is not None:
        _check_sinks(node, _tensor(types[node.sinks]))
    if isinstance(node, Attend):
        return _attended(node)
    if node.by == "gates":
        _check_gates(node, None if node.gates is None else _tensor(types[node.gates]))
    return types[node.parts[0]]


def _check_sinks(node: Attend | Merge, sinks: TensorType) -> None:
    if len(sinks.dims) != 1 or sinks.dtype not in SINK_DTYPES:
        raise WrongStage(
            where=node.where,
            verb=type(node).__name__.lower(),
            argument="sinks",
            wanted=f"one logit a query head, [Hq] of {', '.join(SINK_DTYPES)},",
            given=f"a tensor {sinks}",
            way_out="a sink logit is a float and is the same for every query row of its head.",
        )


def _check_gates(node: Merge, gates: TensorType | None) -> None:
    """Check the form of gates; the sizes of captured ones are checked at a call."""
    if gates is not None and _are_gates(node, gates):
        return
    raise WrongStage(
        where=node.where,
        verb="merge",
        argument="gates",
        wanted=f"a float tensor [B, Hq, Sq, {len(node.parts)}], one value for each part,",
        given="none" if gates is None else f"a tensor of {gates}",
        way_out=f"declare it with tensor('B Hq Sq {len(node.parts)}').",
    )


def _are_gates(node: Merge, gates: TensorType) -> bool:
    rows = gates.dims[:3] == (dims.B, dims.Hq, dims.Sq) or isinstance(node.gates, Captured)
    is_float = gates.dtype == DATA or "float" in gates.dtype
    return rows and len(gates.dims) == 4 and gates.dims[3] == len(node.parts) and is_float


def _attended(node: Attend) -> TensorType:
    for part in node.streams:
        pair = part.stream if isinstance(part, Gather) else part
        assert isinstance(pair, Stream)
        sides = (source_of(pair.k), source_of(pair.v))
        if [s.role for s in sides if isinstance(s, Input)] != ["key", "value"]:
            raise WrongStage(
                where=node.where,
                verb="attend",
                argument="streams",
                wanted="keys and values",
                given=(
                    f"a {_origin(pair.k)} tensor as keys and a {_origin(pair.v)} tensor as values"
                ),
                way_out="attend(q, k, v): the keys come from k and the values from v.",
            )
    return TensorType((dims.B, dims.Hq, dims.Sq, dims.Dv))


def _origin(node: Node) -> str:
    source = source_of(node)
    return source.role if isinstance(source, Input) else "further"


def is_token_stream(stream: Node) -> bool:
    """Tell whether a stream's entries are tokens, not units."""
    assert isinstance(stream, Stream)
    return units_of(stream.k) == TOKENS
