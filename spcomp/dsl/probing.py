"""The verbs of estimates that a few rows make for all: probe, column_sums, diagonal_sums, needed,
alike, and the selections made of them: diagonals, covered, switch, per_head."""

from __future__ import annotations

from typing import Any

import spcomp.dsl.checks as check
from spcomp.dsl.recording import user_line
from spcomp.dsl.selections import as_selection, captured_row
from spcomp.errors import UnknownChoice
from spcomp.ir.nodes import (
    Alike,
    Covered,
    Diagonals,
    Input,
    Needed,
    Node,
    Probe,
    Regroup,
    Score,
    Selection,
    Softmax,
    Sums,
    Switch,
    TopK,
    TopP,
)
from spcomp.ir.nodes.select import CROSSINGS

_MAPS = (Score, Softmax, Regroup, Sums)
_A_MAP = "a score(), softmax(), regroup() or sums of one"


def probe(q: Node, *, rows: int) -> Probe:
    """Take the last `rows` queries, or all where there are fewer, each at its own position.

    Raises: NegativeCount, NotANumber, WrongStage.
    """
    check.stage("probe", "q", q, (Input,), "q", "probe(q, rows=64)")
    rows = check.count("probe", "rows", rows, least=1, counts="the last query rows")
    return Probe(q, rows, where=user_line())


def column_sums(scores: Node) -> Sums:
    """Add a map of scores over its rows: one sum for each unit of keys, for all queries.

    topk() of it gives one list a head that every query reads.
    Raises: WrongStage.
    """
    return _sums("column_sums", scores, "columns")


def diagonal_sums(scores: Node) -> Sums:
    """Add a causal map of tokens along its diagonals: one sum for each offset t - u.

    diagonals(topk(...)) of it selects.
    Raises: WrongStage; CannotLower for a map of units, or one that is not causal.
    """
    return _sums("diagonal_sums", scores, "diagonals")


def _sums(verb: str, scores: Node, along: str) -> Sums:
    wanted = "a score() or a softmax() of one"
    check.stage(verb, "scores", scores, (Score, Softmax), wanted, f"{verb}(softmax(score(q, k)))")
    return Sums(scores, along, where=user_line())  # type: ignore[arg-type]


def needed(
    scores: Node,
    *,
    p: float,
    crossing: str = "keep",
    per: int = 1,
    extra: int = 0,
    least: int = 0,
    most: int | None = None,
) -> Needed:
    """Count the entries of each row that a share p needs, for topk(k=...).

    As many as topp(p=p, crossing=crossing) would keep, plus `extra`, in units of `per` entries,
    rounded up; at least `least` and, where given, at most `most`.
    Raises: NegativeCount, NotANumber, UnknownChoice, WrongStage.
    """
    check.stage("needed", "scores", scores, _MAPS, _A_MAP, "needed(column_sums(...), p=0.9)")
    check.choice("needed", "crossing", crossing, CROSSINGS)
    share = check.share("needed", "p", p)
    extra = check.count("needed", "extra", extra, least=0, counts="entries beside those needed")
    per = check.count("needed", "per", per, least=1, counts="the entries of a unit")
    least = check.count("needed", "least", least, least=0, counts="units kept at least")
    if most is not None:
        most = check.count("needed", "most", most, least=0, counts="units kept at most")
    line = user_line()
    return Needed(scores, share, crossing, extra, per, least, most, where=line)  # type: ignore[arg-type]


def alike(p: Node, q: Node, *, below: float) -> Alike:
    """Tell for each head whether two estimates of one row agree: the square root of their
    Jensen-Shannon divergence, in natural logarithms, is below a bound.

    Raises: NotANumber, WrongStage; CannotLower where they have other rows or units.
    """
    for name, side in (("p", p), ("q", q)):
        check.stage("alike", name, side, _MAPS, _A_MAP, "alike(softmax(...), column_sums(...))")
    return Alike(p, q, check.number("alike", "below", below), where=user_line())


def diagonals(offsets: Node) -> Diagonals:
    """Select the keys whose distance from the query is in a list of offsets, never a later one.

    offsets: topk() or topp() of diagonal_sums(), or of blocks of them by regroup(), which select
    the block diagonals t // block - u // block.
    Raises: WrongStage; CannotLower for a list of keys.
    """
    wanted = "a topk() or topp() of diagonal_sums()"
    check.stage("diagonals", "offsets", offsets, (TopK, TopP), wanted, "diagonals(topk(...))")
    return Diagonals(offsets, where=user_line())


def covered(columns: Node, offsets: Node, *, block: int) -> Covered:
    """Select lines as MInference's kernel reads them: diagonals covered by blocks of `block` keys
    for each `block` query rows, near ones merged, and the columns beside them; these pairs and a
    few more.

    columns: topk() or topp() of column_sums(); offsets: of diagonal_sums(); both in tokens.
    Raises: NegativeCount, NotANumber, WrongStage; CannotLower for other lists.
    """
    for name, part in (("columns", columns), ("offsets", offsets)):
        wanted = "a topk() or topp() of sums along lines"
        check.stage("covered", name, part, (TopK, TopP), wanted, "covered(keys, distances, ...)")
    block = check.count("covered", "block", block, least=1, counts="the tokens of a block")
    return Covered(columns, offsets, block, where=user_line())


def switch(condition: Node, yes: Selection, no: Selection) -> Switch:
    """For each head `yes` where the condition holds, and `no` elsewhere.

    condition: an alike(). Both are computed; none waits for the host.
    Raises: WrongStage.
    """
    check.stage(
        "switch", "condition", condition, (Alike,), "an alike()", "switch(alike(...), a, b)"
    )
    cases = as_selection("switch", no), as_selection("switch", yes)
    return Switch(condition, cases, where=user_line())


def per_head(which: Any, *cases: Selection) -> Switch:
    """For each query head one of several selections.

    which: int32 tensor [Hq] with the number of each head's case, from 0.
    Raises: ShapeMismatch, UnknownChoice, WrongStage.
    """
    held = tuple(as_selection("per_head", case) for case in cases)
    check.count("per_head", "the number of cases", len(held), least=1, counts="selections")
    table = captured_row("per_head", "which", which, "int32")
    wrong = [int(n) for n in which if not 0 <= n < len(held)]
    if wrong:
        raise UnknownChoice(
            where=user_line(),
            verb="per_head",
            name="a case",
            value=wrong[0],
            choices=f"0 to {len(held) - 1}, as there are {len(held)} selections",
        )
    return Switch(table, held, where=user_line())
