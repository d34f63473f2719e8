"""The verbs that give tokens for tokens, permute and centre, and the judgement similar."""

from __future__ import annotations

from typing import Any

import spcomp.dsl.checks as check
from spcomp.dsl.recording import user_line
from spcomp.dsl.selections import captured_order, captured_row
from spcomp.errors import NotANumber
from spcomp.ir.nodes import Captured, Centre, Input, Node, Permute, Similar

TOKENS = (Input, Permute, Centre)


def permute(x: Node, order: Any) -> Permute:
    """Take the tokens of q, k or v in another order: token i of the result is token order[i] of x.

    order: int32 or int64 [S], each number below S once. attend() gives its rows back in the order
    of the q that was permuted. Sinks, mask_mods and lists count by the new places.
    Raises: NotAPermutation, ShapeMismatch, WrongStage; CannotLower, when the pattern is compiled,
    for a causal mask, or where k and v are in different orders.
    """
    check.stage("permute", "x", x, (Input,), "q, k or v", "permute(q, order)")
    return Permute(x, captured_order("permute", order), where=user_line())


def centre(x: Node) -> Centre:
    """Subtract from the keys of each head their mean over all tokens; softmax is unchanged by it
    but for rounding, and so is the LSE.

    Raises: WrongStage.
    """
    check.stage("centre", "x", x, (Input, Permute), "k", "centre(k)")
    return Centre(x, where=user_line())


def similar(x: Node, *, block: int, least: Any) -> Similar:
    """The pairs whose token of x lies in a block of like tokens; ~similar(...) the others.

    x: q, or k, permuted or centred or neither. A block of `block` tokens is alike iff the mean
    cosine over all pairs of its tokens is above `least`: a number from -1 to 1, or a float32 tensor
    with one for each query or KV head. A short last block never is, nor one with a token of zeros.
    Joins other selections by | and &, and names the units a score is among: score(..., among=...).
    Raises: NegativeCount, NotANumber, ShapeMismatch, WrongStage.
    """
    check.stage("similar", "x", x, TOKENS, "q or k", "similar(k, block=64, least=0.6)")
    block = check.count("similar", "block", block, least=1, counts="the tokens of a block")
    number, table = number_or_row("similar", "least", least, (-1.0, 1.0), "a cosine from -1 to 1")
    return Similar(x, block, number, table, where=user_line())


def number_or_row(
    verb: str, name: str, value: Any, ends: tuple[float, float], wanted: str
) -> tuple[float | None, Captured | None]:
    """Take a number within two ends, or a table of one for each head.

    Raises: NotANumber, ShapeMismatch, WrongStage.
    """
    if hasattr(value, "shape"):
        return None, captured_row(verb, name, value)
    number = check.number(verb, name, value)
    if not ends[0] <= number <= ends[1]:
        raise NotANumber(
            where=user_line(), verb=verb, name=name, value=number, kind="float", wanted=wanted
        )
    return number, None
