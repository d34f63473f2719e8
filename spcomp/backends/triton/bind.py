"""From a launch to kernel arguments: which buffer each pointer and stride is of, counts, the grid.

A binding is made once a launch. Its functions read layouts and evaluate small integer formulas,
once for each new shape of a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from spcomp.backends.triton.layouts import Binding, Call, Number
from spcomp.ir import dims
from spcomp.ir.launches import (
    AttendLaunch,
    AttendRule,
    GatherLaunch,
    InvertLaunch,
    KeysLaunch,
    MergeLaunch,
    PoolLaunch,
    ScoreLaunch,
    SelectLaunch,
    TilesLaunch,
    TopKLaunch,
)
from spcomp.ir.plan import Launch, Plan

LOG2_E = math.log2(math.e)


def ceildiv(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)


def bind(launch: Launch, plan: Plan) -> Binding:
    """Give the binding of a launch."""
    return BINDINGS[type(launch)](launch, plan)


_QKV = (("q_ptr", "q"), ("k_ptr", "k"), ("v_ptr", "v"))
_QKV_STRIDES = (("q", "q", "bhs"), ("k", "k", "bhs"), ("v", "v", "bhs"))


def _scale(rule: AttendRule, env: Mapping[str, int]) -> float:
    scale = 1.0 / math.sqrt(env["D"]) if rule.scale is None else rule.scale
    return scale * LOG2_E


def _shape(env: Mapping[str, int]) -> dict[str, Number]:
    return {
        "sq": env["Sq"],
        "skv": env["Skv"],
        "hq": env["Hq"],
        "group": env["Hq"] // env["Hkv"],
        "row_begin": env["R0"],
    }


def _pool(launch: PoolLaunch, plan: Plan) -> Binding:
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
        return x.shape[0] * x.shape[1] * ceildiv(int(scalars(call)["n_units"]), tile)

    strides = (("x", launch.x_buf, "bhs"), ("out", launch.out_buf, "bhu"))
    return Binding(tuple(pointers), strides, scalars, grid)


def _scoring(
    launch: SelectLaunch | ScoreLaunch,
) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]:
    pointers = [("q_ptr", launch.rows_buf), ("k_ptr", launch.units_buf)]
    if launch.low_buf:
        pointers.append(("low_ptr", launch.low_buf))
    return pointers, [("q", launch.rows_buf, "bhr"), ("k", launch.units_buf, "bhu")]


def _score_scalars(launch: SelectLaunch | ScoreLaunch, lists: str, call: Call) -> dict[str, Number]:
    env, granule = call.env, launch.rule.granule
    return {
        **_shape(env),
        "list_group": call.list_group(lists),
        "n_lists": call.tensors[lists].shape[1],
        "row_begin": env["R0"] // granule,
        "n_rows": ceildiv(env["R"], granule),
        "n_units": call.tensor(launch.units_buf).shape[2],
        "scale": launch.rule.scale,
    }


def _select(launch: SelectLaunch, plan: Plan) -> Binding:
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


def _score(launch: ScoreLaunch, plan: Plan) -> Binding:
    pointers, strides = _scoring(launch)
    pointers.append(("scores_ptr", launch.scores_buf))
    strides.append(("scores", launch.scores_buf, "bhr"))

    is_shared = launch.rule.heads != "query"

    def scalars(call: Call) -> dict[str, Number]:
        lists = call.tensors[launch.scores_buf].shape[1]
        shared = _score_scalars(launch, launch.scores_buf, call)
        groups = lists if is_shared else call.env["Hkv"]
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


def _topk(launch: TopKLaunch, plan: Plan) -> Binding:
    k = dims.evaluator(launch.k)

    def scalars(call: Call) -> dict[str, Number]:
        scores = call.tensors[launch.scores_buf]
        return {
            "n_lists": scores.shape[1],
            "n_rows": scores.shape[2],
            "n_units": scores.shape[3],
            "k": k(call.env),
            "width": call.tensors[launch.indices_buf].shape[3],
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


def _tiles(launch: TilesLaunch, plan: Plan) -> Binding:
    pointers = [
        ("tiles_ptr", launch.tiles_buf),
        ("partial_ptr", launch.partial_buf),
        ("total_ptr", launch.total_buf),
    ]
    strides = [("tiles", launch.tiles_buf, "bhr"), ("counts", launch.total_buf, "bh")]
    for n, (listed, count) in enumerate(zip(launch.list_bufs, launch.count_bufs, strict=True)):
        pointers += [(f"idx{n}_ptr", listed), (f"cnt{n}_ptr", count)]
        strides += [(f"idx{n}", listed, "bhr"), (f"cnt{n}", count, "bh")]
    block_q, block_k = launch.axis("block_q"), launch.axis("block_k")

    def scalars(call: Call) -> dict[str, Number]:
        tiles = call.tensors[launch.tiles_buf]
        values: dict[str, Number] = {
            **_shape(call.env),
            "heads": tiles.shape[1],
            "n_row_tiles": ceildiv(call.env["R"], block_q),
            "n_key_tiles": ceildiv(call.env["Skv"], block_k),
            "capacity": tiles.shape[3],
        }
        for n, listed in enumerate(launch.list_bufs):
            values[f"leaf{n}_group"] = tiles.shape[1] // call.tensors[listed].shape[1] or 1
        return values

    def grid(call: Call) -> int:
        tiles = call.tensors[launch.tiles_buf]
        return tiles.shape[0] * tiles.shape[1] * ceildiv(call.env["R"], block_q)

    return Binding(tuple(pointers), tuple(strides), scalars, grid, launch.table_bufs)


def _attend(launch: AttendLaunch, plan: Plan) -> Binding:
    block_q = launch.axis("block_q")

    def scalars(call: Call) -> dict[str, Number]:
        return {
            **_shape(call.env),
            "list_group": call.list_group(launch.tiles_buf),
            "n_row_tiles": ceildiv(call.env["R"], block_q),
            "store_begin": call.env["R0"] if _is_slab_local(launch.out_buf) else 0,
            "scale_log2": _scale(launch.rule, call.env),
        }

    def grid(call: Call) -> int:
        return call.env["B"] * call.env["Hq"] * ceildiv(call.env["R"], block_q)

    return Binding(
        (
            *_QKV,
            ("out_ptr", launch.out_buf),
            ("lse_ptr", launch.lse_buf),
            ("tiles_ptr", launch.tiles_buf),
            ("partial_ptr", launch.partial_buf),
            ("total_ptr", launch.total_buf),
        ),
        (
            *_QKV_STRIDES,
            ("out", launch.out_buf, "bhs"),
            ("lse", launch.lse_buf, "bh"),
            ("tiles", launch.tiles_buf, "bhr"),
            ("counts", launch.total_buf, "bh"),
        ),
        scalars,
        grid,
        launch.table_bufs,
    )


def _is_slab_local(buffer: str) -> bool:
    """Tell whether a result goes to rows of the slab (a stack of parts) or of the whole call."""
    return buffer not in ("out", "lse")


def heads_per_program(list_group: int, group: int) -> int:
    """Give the query heads one program serves: those of a KV head when they share a list, else
    one."""
    return group if list_group >= group else 1


def _gather(launch: GatherLaunch, plan: Plan) -> Binding:
    block_m = launch.axis("block_m")
    stacked = launch.splits != 1

    def scalars(call: Call) -> dict[str, Number]:
        env = call.env
        shared = call.list_group(launch.list_buf)
        per_program = heads_per_program(shared, env["Hq"] // env["Hkv"])
        rows = min(launch.granule, env["R"]) * per_program
        return {
            **_shape(env),
            "list_group": shared,
            "heads_per_program": per_program,
            "granule": launch.granule,
            "n_list_rows": ceildiv(env["R"], launch.granule),
            "n_row_tiles": ceildiv(rows, block_m),
            "splits": call.tensor(launch.out_buf).shape[0] if stacked else 1,
            **({} if stacked else {"out_sp": 0, "lse_sp": 0}),
            "store_begin": env["R0"] if _is_slab_local(launch.out_buf) else 0,
            "scale_log2": _scale(launch.rule, env),
        }

    def grid(call: Call) -> int:
        v = scalars(call)
        blocks = call.env["B"] * call.env["Hq"] // int(v["heads_per_program"])
        return blocks * int(v["n_list_rows"]) * int(v["n_row_tiles"]) * int(v["splits"])

    letters = "pbhs" if stacked else "bhs"
    return Binding(
        (
            *_QKV,
            ("out_ptr", launch.out_buf),
            ("lse_ptr", launch.lse_buf),
            ("idx_ptr", launch.list_buf),
            ("cnt_ptr", launch.count_buf),
        ),
        (
            *_QKV_STRIDES,
            ("out", launch.out_buf, letters),
            ("lse", launch.lse_buf, letters.removesuffix("s")),
            ("idx", launch.list_buf, "bhr"),
            ("cnt", launch.count_buf, "bh"),
        ),
        scalars,
        grid,
        launch.table_bufs,
    )


def _invert(launch: InvertLaunch, plan: Plan) -> Binding:
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


def rows_per_chunk(plan: Plan) -> int:
    """Give the rows of a chunk of the inversion, which all three of its launches share."""
    counts = (n for n in plan.launches() if isinstance(n, InvertLaunch) and n.step == "count")
    return next(counts).axis("rows")


def _keys(launch: KeysLaunch, plan: Plan) -> Binding:
    block_m = launch.axis("block_m")

    def scalars(call: Call) -> dict[str, Number]:
        env = call.env
        shared = call.list_group(launch.entries_buf)
        per_program = heads_per_program(shared, env["Hq"] // env["Hkv"])
        slots = call.tensors[launch.part_buf].shape[3]
        n_units = call.tensors[launch.unit_start_buf].shape[2] - 1
        return {
            **_shape(env),
            "list_group": shared,
            "heads_per_program": per_program,
            "n_units": n_units,
            "slots": slots,
            "max_tiles": ceildiv(env["R"] * slots * per_program, block_m) + n_units,
            "scale_log2": _scale(launch.rule, env),
        }

    def grid(call: Call) -> int:
        v = scalars(call)
        blocks = call.env["B"] * call.env["Hq"] // int(v["heads_per_program"])
        return blocks * int(v["max_tiles"])

    return Binding(
        (
            *_QKV,
            ("part_ptr", launch.part_buf),
            ("plse_ptr", launch.part_lse_buf),
            ("entries_ptr", launch.entries_buf),
            ("unit_start_ptr", launch.unit_start_buf),
            ("tile_start_ptr", launch.tile_start_buf),
        ),
        (
            *_QKV_STRIDES,
            ("part", launch.part_buf, "bhrk"),
            ("plse", launch.part_lse_buf, "bh"),
            ("entries", launch.entries_buf, "bh"),
            ("unit_start", launch.unit_start_buf, "bh"),
            ("tile_start", launch.tile_start_buf, "bh"),
        ),
        scalars,
        grid,
        launch.table_bufs,
    )


def _merge(launch: MergeLaunch, plan: Plan) -> Binding:
    letters = "pbhs" if launch.part_axis == 0 else "bhsp"
    pointers = [
        ("part_ptr", launch.part_buf),
        ("plse_ptr", launch.part_lse_buf),
        ("out_ptr", launch.out_buf),
        ("lse_ptr", launch.lse_buf),
    ]
    strides = [
        ("part", launch.part_buf, letters),
        ("plse", launch.part_lse_buf, letters),
        ("out", launch.out_buf, "bhs"),
        ("lse", launch.lse_buf, "bh"),
    ]
    if launch.count_buf:
        pointers.append(("cnt_ptr", launch.count_buf))
        strides.append(("cnt", launch.count_buf, "bh"))
    else:  # the kernel does not read it
        pointers.append(("cnt_ptr", launch.part_lse_buf))
        strides.append(("cnt", launch.part_lse_buf, "bh"))

    def scalars(call: Call) -> dict[str, Number]:
        parts = call.tensor(launch.part_buf).shape[launch.part_axis]
        shared = call.list_group(launch.count_buf) if launch.count_buf else 1
        return {
            **_shape(call.env),
            "n_parts": parts,
            "list_group": shared,
            "n_rows": call.env["R"],
            "store_begin": call.env["R0"] if _is_slab_local(launch.out_buf) else 0,
        }

    def grid(call: Call) -> int:
        rows = ceildiv(call.env["R"], launch.axis("block_r"))
        return call.env["B"] * call.env["Hq"] * rows

    return Binding(tuple(pointers), tuple(strides), scalars, grid)


BINDINGS: dict[type[Launch], Callable[..., Binding]] = {
    PoolLaunch: _pool,
    SelectLaunch: _select,
    ScoreLaunch: _score,
    TopKLaunch: _topk,
    TilesLaunch: _tiles,
    AttendLaunch: _attend,
    GatherLaunch: _gather,
    InvertLaunch: _invert,
    KeysLaunch: _keys,
    MergeLaunch: _merge,
}
