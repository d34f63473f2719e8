"""Bindings of the launches that make maps of scores and keep a share of them."""

from __future__ import annotations

import math

from spcomp.backends.triton.formulas import ceildiv, shape_of, wide_of
from spcomp.backends.triton.layouts import Binding, Call, Number
from spcomp.ir import dims
from spcomp.ir.launches import (
    BlockScoresLaunch,
    BlockSumsLaunch,
    MapRule,
    PartsLaunch,
    RowLseLaunch,
    TopPLaunch,
)
from spcomp.ir.plan import Plan


def _sides(
    launch: PartsLaunch | BlockScoresLaunch,
) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]:
    pointers = [("q_ptr", launch.rows_buf), ("k_ptr", launch.units_buf)]
    if launch.low_buf:
        pointers.append(("low_ptr", launch.low_buf))
    return pointers, [("q", launch.rows_buf, "bhr"), ("k", launch.units_buf, "bhu")]


def _logits(
    launch: PartsLaunch | BlockScoresLaunch, rule: MapRule, units: int, call: Call
) -> dict[str, Number]:
    """Give the counts of a launch that multiplies; q_len, k_len: rows of its tensors."""
    by_dim = call.env["D"] ** -0.5 if rule.is_head_scaled else 1.0
    return {
        "group": call.env["Hq"] // call.env["Hkv"],
        "sq": call.env["Sq"],
        "skv": call.env["Skv"],
        "n_units": units,
        "q_len": call.tensor(launch.rows_buf).shape[2],
        "k_len": call.tensor(launch.units_buf).shape[2],
        "scale": rule.scale * by_dim,
    }


def bind_parts(launch: PartsLaunch, plan: Plan) -> Binding:
    """Bind part_lse."""
    pointers, strides = _sides(launch)
    pointers.append(("parts_ptr", launch.parts_buf))
    strides.append(("parts", launch.parts_buf, "bhr"))
    units = dims.evaluator(launch.units)

    def scalars(call: Call) -> dict[str, Number]:
        parts = call.tensors[launch.parts_buf]
        return {
            **_logits(launch, launch.rule, units(call.env), call),
            "n_heads": parts.shape[1],
            "row_begin": call.env["R0"] // launch.rule.granule,
            "n_rows": ceildiv(call.env["R"], launch.rule.granule),
            "n_parts": parts.shape[3],
        }

    part = launch.axis("part")
    wide = wide_of(part, launch.axis("block_u"))
    run = launch.axis("block_u") // wide * launch.axis("tiles")

    def grid(call: Call) -> int:
        batch, heads, _, parts = call.tensors[launch.parts_buf].shape
        rows = ceildiv(call.env["R"], launch.rule.granule)
        return batch * heads * ceildiv(rows, launch.axis("block_r")) * ceildiv(parts, run)

    return Binding(tuple(pointers), tuple(strides), scalars, grid)


def bind_row_lse(launch: RowLseLaunch, plan: Plan) -> Binding:
    """Bind row_lse."""

    def scalars(call: Call) -> dict[str, Number]:
        _, heads, rows, parts = call.tensors[launch.parts_buf].shape
        return {"n_heads": heads, "n_rows": rows, "n_parts": parts}

    def grid(call: Call) -> int:
        batch, heads, rows = call.tensors[launch.lse_buf].shape
        return batch * heads * ceildiv(rows, launch.axis("block_r"))

    return Binding(
        (("parts_ptr", launch.parts_buf), ("lse_ptr", launch.lse_buf)),
        (("parts", launch.parts_buf, "bhr"), ("lse", launch.lse_buf, "bh")),
        scalars,
        grid,
    )


def _blocks(
    launch: BlockSumsLaunch | BlockScoresLaunch, fine: int, call: Call
) -> dict[str, Number]:
    """Give the counts of a launch that writes block scores."""
    scores, env, granule = call.tensors[launch.scores_buf], call.env, launch.rule.granule
    shape = shape_of(env)
    return {
        "sq": shape["sq"],
        "skv": shape["skv"],
        "list_group": call.list_group(launch.scores_buf),
        "n_lists": scores.shape[1],
        "row_begin": env["R0"] // granule,
        "n_rows": ceildiv(env["R"], granule),
        "n_fine": ceildiv(env["R"], fine),
        "n_blocks": scores.shape[3],
    }


def _block_grid(launch: BlockSumsLaunch | BlockScoresLaunch, call: Call) -> int:
    batch, lists, _, blocks = call.tensors[launch.scores_buf].shape
    rows = ceildiv(call.env["R"], launch.rule.granule)
    tiles = ceildiv(rows, launch.axis("block_r")) * ceildiv(blocks, launch.axis("block_n"))
    return batch * lists * tiles


def bind_block_sums(launch: BlockSumsLaunch, plan: Plan) -> Binding:
    """Bind block_sums."""
    return Binding(
        (
            ("parts_ptr", launch.parts_buf),
            ("lse_ptr", launch.lse_buf),
            ("scores_ptr", launch.scores_buf),
        ),
        (
            ("parts", launch.parts_buf, "bhr"),
            ("lse", launch.lse_buf, "bh"),
            ("scores", launch.scores_buf, "bhr"),
        ),
        lambda call: _blocks(launch, launch.fine, call),
        lambda call: _block_grid(launch, call),
    )


def bind_block_scores(launch: BlockScoresLaunch, plan: Plan) -> Binding:
    """Bind block_scores."""
    pointers, strides = _sides(launch)
    if launch.lse_buf:
        pointers.append(("lse_ptr", launch.lse_buf))
        strides.append(("lse", launch.lse_buf, "bh"))
    pointers.append(("scores_ptr", launch.scores_buf))
    strides.append(("scores", launch.scores_buf, "bhr"))
    units = dims.evaluator(launch.units)

    def scalars(call: Call) -> dict[str, Number]:
        return {
            **_logits(launch, launch.logits, units(call.env), call),
            **_blocks(launch, launch.logits.granule, call),
        }

    return Binding(tuple(pointers), tuple(strides), scalars, lambda call: _block_grid(launch, call))


def bind_topp(launch: TopPLaunch, plan: Plan) -> Binding:
    """Bind topp."""

    def scalars(call: Call) -> dict[str, Number]:
        scores = call.tensors[launch.scores_buf]
        return {
            "sq": call.env["Sq"],
            "skv": call.env["Skv"],
            "n_lists": scores.shape[1],
            "row_begin": call.env["R0"] // launch.granule,
            "n_rows": scores.shape[2],
            "n_units": scores.shape[3],
            "width": call.tensors[launch.indices_buf].shape[3],
            "share": launch.p,
        }

    def grid(call: Call) -> int:
        return math.prod(call.tensors[launch.scores_buf].shape[:3])

    return Binding(
        (
            ("scores_ptr", launch.scores_buf),
            ("idx_ptr", launch.indices_buf),
            ("cnt_ptr", launch.counts_buf),
        ),
        (
            ("scores", launch.scores_buf, "bhr"),
            ("idx", launch.indices_buf, "bhr"),
            ("cnt", launch.counts_buf, "bh"),
        ),
        scalars,
        grid,
        (launch.share_buf,) if launch.share_buf else (),
    )
