"""Bindings of the launches that make lists: pooling, scores, top-k, tile lists, inversion."""

from __future__ import annotations

import math

from spcomp.backends.triton.formulas import ceildiv, heads_per_program, shape_of
from spcomp.backends.triton.layouts import Binding, Call, Number
from spcomp.ir import dims
from spcomp.ir.launches import (
    InvertLaunch,
    PoolLaunch,
    ScoreLaunch,
    SelectLaunch,
    TilesLaunch,
    TopKLaunch,
)
from spcomp.ir.plan import Plan


def bind_pool(launch: PoolLaunch, plan: Plan) -> Binding:
    """Bind pool."""
    pointers = [("x_ptr", launch.x_buf), ("out_ptr", launch.out_buf)]
    if launch.low_buf:
        pointers.append(("low_ptr", launch.low_buf))
    tile = launch.axis("unit_tile")

    def scalars(call: Call) -> dict[str, Number]:
        x, out = call.tensor(launch.x_buf), call.tensor(launch.out_buf)
        begin = call.env.get("unit_begin", 0)
        return {
            "heads": x.shape[1],
            "n_tokens": call.env.get("tokens", x.shape[2]),
            "unit_begin": begin,
            "n_units": call.env.get("unit_end", out.shape[2]) - begin,
        }

    def grid(call: Call) -> int:
        x = call.tensor(launch.x_buf)
        return call.env["B"] * x.shape[1] * ceildiv(int(scalars(call)["n_units"]), tile)

    strides = (("x", launch.x_buf, "bhs"), ("out", launch.out_buf, "bhu"))
    return Binding(tuple(pointers), strides, scalars, grid)


def _scoring(
    launch: SelectLaunch | ScoreLaunch,
) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]:
    pointers = [("q_ptr", launch.rows_buf), ("k_ptr", launch.units_buf)]
    if launch.low_buf:
        pointers.append(("low_ptr", launch.low_buf))
    strides = [("q", launch.rows_buf, "bhr"), ("k", launch.units_buf, "bhu")]
    if launch.weights_buf:
        pointers.append(("w_ptr", launch.weights_buf))
        strides.append(("w", launch.weights_buf, "bh"))
    return pointers, strides


def _score_scalars(launch: SelectLaunch | ScoreLaunch, lists: str, call: Call) -> dict[str, Number]:
    env, granule = call.env, launch.rule.granule
    heads, shared = (call.tensor(n).shape[1] for n in (launch.rows_buf, launch.units_buf))
    return {
        **shape_of(env),
        "group": heads // shared,  # those of q and k, or of tensors the call brings beside them
        "list_group": heads // call.tensor(lists).shape[1],
        "n_lists": call.tensors[lists].shape[1],
        "row_begin": env["R0"] // granule,
        "n_rows": ceildiv(env["R"], granule),
        "n_units": call.tensor(launch.units_buf).shape[2],
        "scale": launch.rule.scale,
    }


def bind_select(launch: SelectLaunch, plan: Plan) -> Binding:
    """Bind select."""
    pointers, strides = _scoring(launch)
    pointers += [
        ("scratch_ptr", launch.keys_buf),
        ("idx_ptr", launch.indices_buf),
        ("cnt_ptr", launch.counts_buf),
    ]
    strides += [
        ("idx", launch.indices_buf, "bhr"),
        ("cnt", launch.counts_buf, "bh"),
        ("scratch", launch.keys_buf, "r"),
    ]
    k = dims.evaluator(launch.k)

    def scalars(call: Call) -> dict[str, Number]:
        return {
            **_score_scalars(launch, launch.indices_buf, call),
            "k": k(call.env),
            "width": call.tensors[launch.indices_buf].shape[3],
        }

    def grid(call: Call) -> int:
        lists = call.tensors[launch.indices_buf]
        rows = ceildiv(call.env["R"], launch.rule.granule)
        return lists.shape[0] * lists.shape[1] * ceildiv(rows, launch.axis("block_r"))

    return Binding(tuple(pointers), tuple(strides), scalars, grid)


def bind_score(launch: ScoreLaunch, plan: Plan) -> Binding:
    """Bind score."""
    pointers, strides = _scoring(launch)
    pointers.append(("scores_ptr", launch.scores_buf))
    strides.append(("scores", launch.scores_buf, "bhr"))

    is_shared = launch.rule.heads != "query"

    def scalars(call: Call) -> dict[str, Number]:
        lists = call.tensors[launch.scores_buf].shape[1]
        shared = _score_scalars(launch, launch.scores_buf, call)
        groups = lists if is_shared else call.tensor(launch.units_buf).shape[1]
        return {**shared, "n_groups": groups, "n_runs": runs(call, groups)}

    def runs(call: Call, groups: int) -> int:
        """Cut the units of a row into runs of tiles, so that the programs wanted come about."""
        batch, _, rows, units = call.tensors[launch.scores_buf].shape
        tiles = ceildiv(units, launch.axis("block_u"))
        return max(1, min(tiles, ceildiv(launch.axis("programs"), batch * groups * rows)))

    def grid(call: Call) -> int:
        numbers = scalars(call)
        rows = int(numbers["n_rows"])
        return call.env["B"] * int(numbers["n_groups"]) * rows * int(numbers["n_runs"])

    return Binding(tuple(pointers), tuple(strides), scalars, grid)


def bind_topk(launch: TopKLaunch, plan: Plan) -> Binding:
    """Bind topk."""
    k = dims.evaluator(launch.k)
    granule = scored_granule(plan, launch.scores_buf)

    def scalars(call: Call) -> dict[str, Number]:
        scores = call.tensors[launch.scores_buf]
        return {
            "n_lists": scores.shape[1],
            "n_rows": scores.shape[2],
            "n_units": scores.shape[3],
            "k": k(call.env),
            "width": call.tensors[launch.indices_buf].shape[3],
            "row_begin": call.env["R0"] // granule,
            "granule": granule,
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
    )


def bind_tiles(launch: TilesLaunch, plan: Plan) -> Binding:
    """Bind tiles."""
    pointers = [
        ("tiles_ptr", launch.tiles_buf),
        ("partial_ptr", launch.partial_buf),
        ("total_ptr", launch.total_buf),
    ]
    if launch.counter_buf:
        pointers.append(("work_ptr", launch.counter_buf))
    strides = [("tiles", launch.tiles_buf, "bhr"), ("counts", launch.total_buf, "bh")]
    for n, (listed, count) in enumerate(zip(launch.list_bufs, launch.count_bufs, strict=True)):
        pointers += [(f"idx{n}_ptr", listed), (f"cnt{n}_ptr", count)]
        strides += [(f"idx{n}", listed, "bhr"), (f"cnt{n}", count, "bh")]
    block_q, block_k = launch.axis("block_q"), launch.axis("block_k")
    keys = dims.evaluator(launch.keys)

    def scalars(call: Call) -> dict[str, Number]:
        tiles = call.tensors[launch.tiles_buf]
        values: dict[str, Number] = {
            **shape_of(call.env),
            "n_keys": keys(call.env),
            "heads": tiles.shape[1],
            "n_row_tiles": ceildiv(call.env["R"], block_q),
            "n_key_tiles": ceildiv(keys(call.env), block_k),
            "capacity": tiles.shape[3],
        }
        for n, listed in enumerate(launch.list_bufs):
            values[f"leaf{n}_group"] = tiles.shape[1] // call.tensors[listed].shape[1] or 1
        return values

    def grid(call: Call) -> int:
        tiles = call.tensors[launch.tiles_buf]
        return tiles.shape[0] * tiles.shape[1] * ceildiv(call.env["R"], block_q)

    return Binding(tuple(pointers), tuple(strides), scalars, grid, launch.table_bufs)


def bind_invert(launch: InvertLaunch, plan: Plan) -> Binding:
    """Bind invert."""
    chunk = rows_per_chunk(plan)
    lists = (("idx_ptr", launch.list_buf), ("cnt_ptr", launch.count_buf))
    list_strides = (("idx", launch.list_buf, "bhr"), ("cnt", launch.count_buf, "bh"))
    pointers, strides = {
        "count": (
            (*lists, ("counts_ptr", launch.prefix_buf)),
            (*list_strides, ("counts", launch.prefix_buf, "bh")),
        ),
        "scan": (
            (
                ("counts_ptr", launch.prefix_buf),
                ("unit_start_ptr", launch.unit_start_buf),
                ("tile_start_ptr", launch.tile_start_buf),
            ),
            (("counts", launch.prefix_buf, "bh"), ("starts", launch.unit_start_buf, "bh")),
        ),
        "fill": (
            (*lists, ("positions_ptr", launch.prefix_buf), ("entries_ptr", launch.entries_buf)),
            (
                *list_strides,
                ("positions", launch.prefix_buf, "bh"),
                ("entries", launch.entries_buf, "bh"),
            ),
        ),
    }[launch.step]

    def scalars(call: Call) -> dict[str, Number]:
        listed, env = call.tensors[launch.list_buf], call.env
        group = env["Hq"] // env["Hkv"]
        return {
            "n_lists": listed.shape[1],
            "n_rows": env["R"],
            "row_begin": env["R0"],
            "n_units": call.tensors[launch.prefix_buf].shape[2],
            "n_chunks": ceildiv(env["R"], chunk),
            "slots": listed.shape[3],
            "block_m": dict(launch.axes).get("block_m", 0),
            "heads_per_program": heads_per_program(env["Hq"] // listed.shape[1], group),
        }

    def grid(call: Call) -> int:
        listed = call.tensors[launch.list_buf]
        each = 1
        if launch.step != "scan":
            units = call.tensors[launch.prefix_buf].shape[2]
            each = ceildiv(call.env["R"], launch.axis("rows")) * ceildiv(
                units, launch.axis("block_u")
            )
        return listed.shape[0] * listed.shape[1] * each

    return Binding(pointers, strides, scalars, grid)


def scored_granule(plan: Plan, scores: str) -> int:
    """Give the query rows of a row of scores, by the launch that writes them."""
    launches = (n for n in plan.launches() if isinstance(n, ScoreLaunch))
    return next((n.rule.granule for n in launches if n.scores_buf == scores), 1)


def rows_per_chunk(plan: Plan) -> int:
    """Give the rows of a chunk of the inversion, which all three of its launches share."""
    counts = (n for n in plan.launches() if isinstance(n, InvertLaunch) and n.step == "count")
    return next(counts).axis("rows")
