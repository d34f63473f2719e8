"""Bindings of the launches that attend, and of the merge of their parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from spcomp.backends.triton.formulas import ceildiv, heads_per_program, shape_of
from spcomp.backends.triton.layouts import Binding, Call, Number
from spcomp.ir import dims
from spcomp.ir.launches import (
    AttendLaunch,
    AttendRule,
    GatherLaunch,
    KeysLaunch,
    MergeLaunch,
    WarpsLaunch,
)
from spcomp.ir.plan import Plan

LOG2_E = math.log2(math.e)
ONE_CONSUMER_PROGRAMS = 2  # programs of one consumer that share a processor


def _pointers(launch: AttendLaunch | GatherLaunch | KeysLaunch) -> tuple[tuple[str, str], ...]:
    """Give the buffers of q, k and v; k and v are those of the stream."""
    return (("q_ptr", launch.q_buf), ("k_ptr", launch.k_buf), ("v_ptr", launch.v_buf))


def _strides(launch: AttendLaunch | GatherLaunch | KeysLaunch) -> tuple[tuple[str, str, str], ...]:
    return (("q", launch.q_buf, "bhs"), ("k", launch.k_buf, "bhs"), ("v", launch.v_buf, "bhs"))


def _scale(rule: AttendRule, env: Mapping[str, int]) -> float:
    scale = 1.0 / math.sqrt(env["D"]) if rule.scale is None else rule.scale
    return scale * LOG2_E


def _with_sinks(binding: Binding, sinks: str) -> Binding:
    """Give a kernel the sink logits it applies, if any: a vector of any stride."""
    if not sinks:
        return binding
    return replace(
        binding,
        pointers=(*binding.pointers, ("sinks_ptr", sinks)),
        strides=(*binding.strides, ("sinks", sinks, "h")),
    )


def bind_attend(launch: AttendLaunch, plan: Plan) -> Binding:
    """Bind attend."""
    block_q = launch.axis("block_q")
    keys = dims.evaluator(launch.keys)

    def scalars(call: Call) -> dict[str, Number]:
        return {
            **shape_of(call.env),
            "n_keys": keys(call.env),
            "list_group": call.list_group(launch.tiles_buf),
            "n_row_tiles": ceildiv(call.env["R"], block_q),
            "store_begin": call.env["R0"] if _is_slab_local(launch.out_buf) else 0,
            "scale_log2": _scale(launch.rule, call.env),
        }

    def grid(call: Call) -> int:
        return call.env["B"] * call.env["Hq"] * ceildiv(call.env["R"], block_q)

    binding = Binding(
        (
            *_pointers(launch),
            ("out_ptr", launch.out_buf),
            ("lse_ptr", launch.lse_buf),
            ("tiles_ptr", launch.tiles_buf),
            ("partial_ptr", launch.partial_buf),
            ("total_ptr", launch.total_buf),
        ),
        (
            *_strides(launch),
            ("out", launch.out_buf, "bhs"),
            ("lse", launch.lse_buf, "bh"),
            ("tiles", launch.tiles_buf, "bhr"),
            ("counts", launch.total_buf, "bh"),
        ),
        scalars,
        grid,
        launch.table_bufs,
    )
    return _with_sinks(binding, launch.sinks_buf)


def bind_attend_ws(launch: WarpsLaunch, plan: Plan) -> Binding:
    """Bind attend_ws."""
    plain = bind_attend(launch, plan)
    heads, block_q = launch.axis("heads"), launch.axis("block_q")

    def scalars(call: Call) -> dict[str, Number]:
        rows = call.env["R" if _is_slab_local(launch.out_buf) else "Sq"]
        return {**plain.scalars(call), "batches": call.env["B"], "out_rows": rows}

    def grid(call: Call) -> int:
        """Give as many programs as run at once, or fewer where there is less work."""
        env = call.env
        head_tiles = env["Hkv"] * ceildiv(env["Hq"] // env["Hkv"], heads)
        items = env["B"] * head_tiles * ceildiv(env["R"], block_q)
        return min(items, env["processors"] * (ONE_CONSUMER_PROGRAMS if launch.rows == 64 else 1))

    return replace(
        plain,
        pointers=(*plain.pointers, ("work_ptr", launch.counter_buf)),
        scalars=scalars,
        grid=grid,
    )


def _is_slab_local(buffer: str) -> bool:
    """Tell whether a result goes to rows of the slab (a stack of parts) or of the whole call."""
    return buffer not in ("out", "lse")


def bind_gather(launch: GatherLaunch, plan: Plan) -> Binding:
    """Bind gather."""
    block_m = launch.axis("block_m")
    stacked = launch.splits != 1
    keys = dims.evaluator(launch.keys)

    def scalars(call: Call) -> dict[str, Number]:
        env = call.env
        shared = call.list_group(launch.list_buf)
        per_program = heads_per_program(shared, env["Hq"] // env["Hkv"])
        rows = min(launch.granule, env["R"]) * per_program
        return {
            **shape_of(env),
            "n_keys": keys(env),
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
    binding = Binding(
        (
            *_pointers(launch),
            ("out_ptr", launch.out_buf),
            ("lse_ptr", launch.lse_buf),
            ("idx_ptr", launch.list_buf),
            ("cnt_ptr", launch.count_buf),
        ),
        (
            *_strides(launch),
            ("out", launch.out_buf, letters),
            ("lse", launch.lse_buf, letters.removesuffix("s")),
            ("idx", launch.list_buf, "bhr"),
            ("cnt", launch.count_buf, "bh"),
        ),
        scalars,
        grid,
        launch.table_bufs,
    )
    return _with_sinks(binding, launch.sinks_buf)


def bind_keys(launch: KeysLaunch, plan: Plan) -> Binding:
    """Bind keys."""
    block_m = launch.axis("block_m")
    keys = dims.evaluator(launch.keys)

    def scalars(call: Call) -> dict[str, Number]:
        env = call.env
        shared = call.list_group(launch.entries_buf)
        per_program = heads_per_program(shared, env["Hq"] // env["Hkv"])
        slots = call.tensors[launch.part_buf].shape[3]
        n_units = call.tensors[launch.unit_start_buf].shape[2] - 1
        return {
            **shape_of(env),
            "n_keys": keys(env),
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
            *_pointers(launch),
            ("part_ptr", launch.part_buf),
            ("plse_ptr", launch.part_lse_buf),
            ("entries_ptr", launch.entries_buf),
            ("unit_start_ptr", launch.unit_start_buf),
            ("tile_start_ptr", launch.tile_start_buf),
        ),
        (
            *_strides(launch),
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


def bind_merge(launch: MergeLaunch, plan: Plan) -> Binding:
    """Bind merge."""
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

    if launch.gates_buf:
        pointers.append(("gate_ptr", launch.gates_buf))
        strides.append(("gate", launch.gates_buf, "bhs"))

    def scalars(call: Call) -> dict[str, Number]:
        parts = call.tensor(launch.part_buf).shape[launch.part_axis]
        shared = call.list_group(launch.count_buf) if launch.count_buf else 1
        return {
            **shape_of(call.env),
            "n_parts": parts,
            "list_group": shared,
            "n_rows": call.env["R"],
            "store_begin": call.env["R0"] if _is_slab_local(launch.out_buf) else 0,
        }

    def grid(call: Call) -> int:
        rows = ceildiv(call.env["R"], launch.axis("block_r"))
        return call.env["B"] * call.env["Hq"] * rows

    binding = Binding(tuple(pointers), tuple(strides), scalars, grid)
    return _with_sinks(binding, launch.sinks_buf)
