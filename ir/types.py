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
from spcomp.ir.nodes import (
    Attend,
    Captured,
    Centre,
    Downsample,
    Fold,
    Gather,
    Given,
    Input,
    Merge,
    Node,
    Permute,
    Regroup,
    Score,
    Selection,
    Softmax,
    State,
    Stream,
    TopK,
    TopP,
)
from spcomp.ir.program import Program
from spcomp.ir.token_rules import check_tokens
from spcomp.ir.units import TOKENS, rows_ranking, units_of, units_ranked

DATA = "data"


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

HEADS: dict[str, Dim] = {"query": dims.Hq, "group": dims.Hkv, "all": 1}


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
    """Give the role of the input a tensor comes from: query, key or value."""
    while isinstance(node, (Downsample, Fold, State, Permute, Centre)):
        node = node.value if isinstance(node, State) else node.x
    return node.role if isinstance(node, Input) else "table"


def _type(node: Node, types: dict[Node, Type]) -> Type:
    if isinstance(node, Input):
        return INPUTS[node.role]
    if isinstance(node, Captured):
        return TensorType(node.dims, node.dtype)
    if isinstance(node, (Permute, Centre)):
        return types[node.x]
    if isinstance(node, Downsample):
        return _pooled(node, _tensor(types[node.x]))
    if isinstance(node, Fold):
        return _folded(node, _tensor(types[node.x]))
    if isinstance(node, State):
        return types[node.value]
    if isinstance(node, Score):
        return _scored(node, _tensor(types[node.q]), _tensor(types[node.k]))
    if isinstance(node, Softmax):
        return _probabilities(node, types)
    if isinstance(node, Regroup):
        return _regrouped(node, _tensor(types[node.scores]))
    if isinstance(node, (TopK, TopP)):
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
    batch, heads, tokens, width = x.dims
    return TensorType((batch, heads, units_of(node).count(tokens), width), x.dtype)


def _scored(node: Score, q: TensorType, k: TensorType) -> TensorType:
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
    if q.dims[3] != k.dims[3]:
        raise CannotLower(
            where=node.where,
            what=f"a score of vectors of {q.dims[3]} and of {k.dims[3]} numbers",
            why="a dot product needs as many on both sides",
            way_out="fold both sides by the same size, or neither.",
        )
    return TensorType((dims.B, HEADS[node.heads], q.dims[2], k.dims[2]), "float32")


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
    return TensorType((scores.dims[0], HEADS[node.heads], *scores.dims[2:]), scores.dtype)


def _regrouped(node: Regroup, scores: TensorType) -> TensorType:
    rows, units = rows_ranking(node.scores), units_ranked(node.scores)
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
            dims.ceildiv(dims.Sq, node.rows),
            dims.ceildiv(dims.Skv, node.block),
        ),
        scores.dtype,
    )


def _attention(node: Node, types: dict[Node, Type]) -> Type:
    if isinstance(node, Stream):
        return types[node.k]
    if isinstance(node, Gather):
        return types[node.stream]
    if isinstance(node, Attend):
        return _attended(node)
    assert isinstance(node, Merge), node
    return types[node.parts[0]]


def _attended(node: Attend) -> TensorType:
    for part in node.streams:
        pair = part.stream if isinstance(part, Gather) else part
        assert isinstance(pair, Stream)
        if role_of(pair.k) != "key" or role_of(pair.v) != "value":
            raise WrongStage(
                where=node.where,
                verb="attend",
                argument="streams",
                wanted="keys and values",
                given=(
                    f"a {role_of(pair.k)} tensor as keys and a {role_of(pair.v)} tensor as values"
                ),
                way_out="attend(q, k, v): the keys come from k and the values from v.",
            )
    return TensorType((dims.B, dims.Hq, dims.Sq, dims.Dv))


def is_token_stream(stream: Node) -> bool:
    """Tell whether a stream's entries are tokens, not units."""
    assert isinstance(stream, Stream)
    return units_of(stream.k) == TOKENS
