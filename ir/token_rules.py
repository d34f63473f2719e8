"""What must agree where tokens are permuted, centred or judged, and where an attend has tiles."""

from __future__ import annotations

from typing import NoReturn

from spcomp.errors import CannotLower, WrongStage
from spcomp.ir.nodes import (
    Attend,
    Causal,
    Centre,
    Downsample,
    Fold,
    Gather,
    Input,
    Local,
    Merge,
    Node,
    Permute,
    Score,
    Similar,
    State,
    Stream,
    topological,
)
from spcomp.ir.units import TOKENS, units_of


def permutation_of(node: Node) -> Permute | None:
    """Give the stage that permutes the tokens of a tensor, a pair of tensors or a result."""
    while not isinstance(node, (Input, Permute)):
        if isinstance(node, (Attend, Score)):
            node = node.q
        elif isinstance(node, Merge):
            node = node.parts[0]
        elif isinstance(node, Gather):
            node = node.stream
        elif isinstance(node, Stream):
            node = node.k
        elif isinstance(node, State):
            node = node.value
        elif isinstance(node, (Downsample, Fold, Centre, Similar)):
            node = node.x
        else:
            return None
    return node if isinstance(node, Permute) else None


def check_tokens(node: Node, role: str) -> None:
    """Check one stage; role: that of the input it is made from, where it is made from one.

    Raises: WrongStage, CannotLower, at the stage's line.
    """
    if isinstance(node, Centre) and role != "key":
        raise WrongStage(
            where=node.where,
            verb="centre",
            argument="x",
            wanted="keys",
            given=f"something made from the {role} input",
            way_out="only the mean of the keys moves all scores of a row alike: centre(k).",
        )
    if isinstance(node, Similar) and _input_of(node.x).role == "value":
        raise WrongStage(
            where=node.where,
            verb="similar",
            argument="x",
            wanted="queries or keys",
            given="something made from the value input",
            way_out="judge what is scored: similar(q, ...) or similar(k, ...).",
        )
    if isinstance(node, State):
        _check_state(node)
    elif isinstance(node, Score):
        _check_score(node)
    elif isinstance(node, Stream):
        _check_same_order(node, node.k, node.v, "values", "their keys")
    elif isinstance(node, Attend):
        _check_attend(node)
    elif isinstance(node, Merge):
        for part in node.parts:
            _check_same_order(node, node.parts[0], part, "a part of a merge", "its first part")


def _check_state(node: State) -> None:
    inner = node.value.x if isinstance(node.value, Downsample) else node.value
    if isinstance(inner, (Permute, Centre)):
        _refuse(
            node,
            f"a cache of something made from a {type(inner).__name__.lower()}",
            "its units would all change with every token appended",
            "pool k itself, or do without cached().",
        )


def _check_score(node: Score) -> None:
    permuted = permutation_of(node.q) or permutation_of(node.k)
    if node.causal and permuted:
        _refuse_causal(node, "a causal score")
    if node.among is None:
        return
    held = node.among
    assert isinstance(held, Similar)
    units = units_of(node.k)
    if _input_of(held.x).role != "key" or (units.block, units.stride) != (held.block,) * 2:
        side = "keys" if _input_of(held.x).role == "key" else "queries"
        _refuse(
            node,
            f"a score of units of {units.block} keys every {units.stride} among blocks of "
            f"{held.block} {side}",
            "each unit is left out or not as one",
            "judge the keys in the blocks they are pooled in: similar(k, block=...).",
        )
    _check_same_order(node, node.k, held.x, "the keys that are judged", "those that are scored")
    if node.heads == "all":
        _refuse(
            node,
            "a score that all heads share among keys that are judged for each head",
            "a unit may be alike in one head and not in another",
            "score with heads='query' or heads='group'.",
        )


def _check_attend(node: Attend) -> None:
    pairs = [(p.stream if isinstance(p, Gather) else p, p) for p in node.streams]
    permuted = permutation_of(node.q) or next(
        filter(None, (permutation_of(s) for s, _ in pairs)), None
    )
    if node.causal and permuted:
        _refuse_causal(node, "causal attention")
    for stream, part in pairs:
        if isinstance(part, Gather):
            _check_selection(node, stream, part.selection, permuted)
    if not (node.skips or node.quantise):
        return
    named = "a skip of tiles" if node.skips else "quantised products"
    if node.tile is None or min(node.tile) < 1:
        _refuse(
            node, named, "no tile of query rows and key tokens is given", "give tile=(rows, keys)."
        )
    if len(pairs) > 1 or units_of(pairs[0][0].k) != TOKENS:  # type: ignore[attr-defined]
        _refuse(
            node,
            f"{named} over {len(pairs)} streams" if len(pairs) > 1 else f"{named} of units",
            "their tiles are those of one stream of tokens",
            "attend to one stream of tokens, and merge() the results.",
        )


def _check_selection(node: Attend, stream: Node, chosen: Node, permuted: Node | None) -> None:
    for inner in topological(chosen):
        if isinstance(inner, (Causal, Local)) and permuted:
            _refuse_causal(node, f"the selection {type(inner).__name__.lower()}()")
        if isinstance(inner, Score):
            _check_same_order(node, node.q, inner.q, "queries that are scored", "those that attend")
            _check_same_order(node, stream, inner.k, "keys that are scored", "those attended to")
        if isinstance(inner, Similar):
            is_query = _input_of(inner.x).role == "query"
            _check_same_order(
                node,
                node.q if is_query else stream,
                inner.x,
                f"{'queries' if is_query else 'keys'} that are judged",
                "those that attend" if is_query else "those attended to",
            )


def _input_of(node: Node) -> Input:
    while not isinstance(node, Input):
        assert isinstance(node, (Centre, Permute))
        node = node.x
    return node


def _check_same_order(node: Node, first: Node, second: Node, what: str, other: str) -> None:
    orders = [None if p is None else p.order for p in map(permutation_of, (first, second))]
    if orders[0] != orders[1]:
        _refuse(
            node,
            f"{what} in another order than {other}",
            "a place would then mean two tokens",
            "permute once, and go on with what permute() gave.",
        )


def _refuse_causal(node: Node, what: str) -> NoReturn:
    _refuse(
        node,
        f"{what} over permuted tokens",
        "a place in the new order tells nothing of what is past",
        "permute only under mask=None, where every query may see every key.",
    )


def _refuse(node: Node, what: str, why: str, way_out: str) -> NoReturn:
    raise CannotLower(where=node.where, what=what, why=why, way_out=way_out)
