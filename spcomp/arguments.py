"""Checks of a call's tensors. What must agree is read off the types of `ir/types.py`, never written
down per tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, is_grad_enabled

from spcomp.backends.base import Specialisation
from spcomp.dsl.pattern import Pattern
from spcomp.dsl.trace import show
from spcomp.errors import (
    DeviceClash,
    DtypeMix,
    DtypeUnsupported,
    HeadsDoNotDivide,
    LastStrideNotOne,
    MaskOfOtherLength,
    NeedsGradient,
    ShapeMismatch,
    StrideTooLarge,
)
from spcomp.ir.dims import evaluate
from spcomp.ir.expr import Expr, Lit, Load, bounds_of, walk
from spcomp.ir.nodes import (
    Attend,
    Captured,
    Given,
    Input,
    Local,
    MaskMod,
    Merge,
    Node,
    Permute,
    Similar,
    Sink,
    Switch,
    TopK,
    TopP,
)
from spcomp.ir.types import INPUTS, list_heads

_ROLES = {"q": "query", "k": "key", "v": "value"}
_FORMS = {"q": "[B, Hq, Sq, D]", "k": "[B, Hkv, Skv, D]", "v": "[B, Hkv, Skv, Dv]"}
_SYMBOLS = {name: tuple(str(d) for d in INPUTS[role].dims) for name, role in _ROLES.items()}
MOST_ROW_STRIDE = (2**31 - 1) // 256  # a tile of 256 rows is addressed by 32-bit offsets
ROW_ALIGN_BYTES = 16
FLOATS = ("float32", "float16", "bfloat16", "float64")


def call_key(
    q: Tensor, k: Tensor, v: Tensor, *tables: Tensor, given: tuple[Tensor, ...] = ()
) -> tuple[object, ...]:
    """Give everything of a call that the checks below look at, so that a call like one that passed
    is not checked again. given: what the call brings beside q, k and v."""
    key = (
        q.shape,
        k.shape,
        v.shape,
        q.stride(),
        k.stride(),
        v.stride(),
        q.dtype,
        k.dtype,
        v.dtype,
        q.device,
        k.device,
        v.device,
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ROW_ALIGN_BYTES,
        is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *tables, *given)),
    )
    return (*key, *[(t.shape, t.stride(), t.dtype, t.device) for t in given]) if given else key


def dims_of(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """Give the symbols of a call: B, Hq, Hkv, Sq, Skv, D, Dv.

    Raises: ShapeMismatch, HeadsDoNotDivide.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ShapeMismatch(
                left=f"{name} with shape {list(tensor.shape)}",
                right=f"the form {_FORMS[name]}",
                problem="4 dimensions are needed",
                way_out=(
                    "add a batch or head dimension with unsqueeze, or transpose [B, S, H, D] "
                    "tensors with .transpose(1, 2)."
                ),
            )
    return sizes_of(_SYMBOLS, {"q": q, "k": k, "v": v})


def sizes_of(
    symbols: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Tensor]
) -> dict[str, int]:
    """Give each symbol the size that all tensors agree on.

    symbols: of the dims of each tensor, Hq and Hkv among them.
    Raises: ShapeMismatch, HeadsDoNotDivide.
    """
    env: dict[str, int] = {}
    first: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        for key, size in zip(symbols[name], tensor.shape, strict=True):
            if env.setdefault(key, size) != size:
                other, held = first[key]
                forms = (f"{n} is [{', '.join(of)}]" for n, of in symbols.items())
                raise ShapeMismatch(
                    left=f"{other} with shape {list(held.shape)}",
                    right=f"{name} with shape {list(tensor.shape)}",
                    problem=f"{key} is {env[key]} in the first and {size} in the second",
                    way_out="; ".join(forms) + ".",
                )
            first.setdefault(key, (name, tensor))
    if env["Hkv"] == 0 or env["Hq"] % env["Hkv"]:
        raise HeadsDoNotDivide(hq=env["Hq"], hkv=env["Hkv"])
    return env


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check dtypes, devices and last strides.

    Raises: DtypeMix, DtypeUnsupported, DeviceClash, LastStrideNotOne.
    """
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise DtypeMix(
                left="q", left_dtype=_short(q.dtype), right=name, right_dtype=_short(tensor.dtype)
            )
        if tensor.device != q.device:
            raise DeviceClash(
                left="q", left_device=q.device, right=name, right_device=tensor.device
            )
    if _short(q.dtype) not in FLOATS:
        raise DtypeUnsupported(
            name="q", dtype=_short(q.dtype), backend="reference", choices=", ".join(FLOATS)
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise LastStrideNotOne(name=name, stride=tensor.stride(-1))


def check_strides(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse rows so far apart that one tile of them passes 2^31 elements.

    Raises: StrideTooLarge.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape[2] > 1 and tensor.stride(2) > MOST_ROW_STRIDE:
            raise StrideTooLarge(name=name, stride=tensor.stride(2), limit=MOST_ROW_STRIDE)


def check_gradients(backend: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a gradient where there is no backward, instead of dropping it.

    Raises: NeedsGradient.
    """
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise NeedsGradient(name=name, backend=backend)


def specialisation(q: Tensor, k: Tensor, v: Tensor) -> Specialisation:
    """Give what kernels are specialised on."""
    return Specialisation(
        _short(q.dtype),
        int(q.shape[-1]),
        int(v.shape[-1]),
        is_aligned=all(map(_is_aligned, (q, k, v))),
        heads=(q.shape[1], k.shape[1]),
    )


def _is_aligned(tensor: Tensor) -> bool:
    """Tell whether hardware that copies tiles by itself can read a tensor's rows."""
    steps = [s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1][:-1]
    bits = tensor.data_ptr()
    for step in steps:
        bits |= step * tensor.element_size()
    return bits % ROW_ALIGN_BYTES == 0 and all(steps)


def check_masks(pattern: Pattern, env: Mapping[str, int], device: str) -> None:
    """Check that masks, lists and tables the pattern brought fit the lengths, heads and device of
    the call.

    Raises: MaskOfOtherLength, ShapeMismatch, DeviceClash.
    """
    for node in pattern.program.stages():
        if isinstance(node, (Given, MaskMod)) and node.built_for is not None:
            _built_for(node, env)
        if isinstance(node, Given):
            _given(node, pattern, env)
        if isinstance(node, Merge) and isinstance(node.gates, Captured):
            _gates(node, node.gates, pattern, env)
        for expr in _expressions(node):
            _tables(node, expr, pattern, env)
        if isinstance(node, (Attend, Merge)) and isinstance(node.sinks, Captured):
            _sinks(node, pattern.tensors[node.sinks.name], env)
        _head_table(node, env)
        if isinstance(node, Permute):
            _order(node, env)
    for name, tensor in pattern.tensors.items():
        if str(tensor.device) != device:
            raise DeviceClash(
                left=f"the pattern's tensor {name}",
                left_device=tensor.device,
                right="q",
                right_device=device,
            )


def _built_for(node: Given | MaskMod, env: Mapping[str, int]) -> None:
    assert node.built_for is not None
    if tuple(node.built_for) != (env["Sq"], env["Skv"]):
        raise MaskOfOtherLength(
            where=node.where,
            mask="the mask",
            built="Sq = {} and Skv = {}".format(*node.built_for),
            given=f"Sq = {env['Sq']} and Skv = {env['Skv']}",
        )


def _given(node: Given, pattern: Pattern, env: Mapping[str, int]) -> None:
    assert isinstance(node.tensor, Captured)
    shape = [int(n) for n in pattern.tensors[node.tensor.name].shape]
    batch, heads, rows, units = shape
    expected = -(-env["Sq"] // node.block_q), -(-env["Skv"] // node.block_k)
    verb = "block_mask" if node.form == "mask" else "block_indices"
    found = [rows, units] if node.form == "mask" else [rows]
    if found != list(expected)[: len(found)]:
        raise MaskOfOtherLength(
            where=node.where,
            mask=f"the {verb} tensor of shape {shape}",
            built=f"{' x '.join(str(n) for n in found)} blocks of {node.block_q} x {node.block_k}",
            given=(
                f"Sq = {env['Sq']} and Skv = {env['Skv']}, which make {expected[0]} x {expected[1]}"
            ),
        )
    if batch not in (1, env["B"]) or heads not in (1, env["Hkv"], env["Hq"]):
        raise ShapeMismatch(
            where=node.where,
            left=f"the {verb} tensor of shape {shape}",
            right=f"q and k with B = {env['B']}, Hq = {env['Hq']}, Hkv = {env['Hkv']}",
            problem="its batch must be 1 or B, its heads 1, Hkv or Hq",
            way_out="expand the mask, or build it for these heads.",
        )


def _gates(node: Merge, held: Captured, pattern: Pattern, env: Mapping[str, int]) -> None:
    """Check gates that the pattern kept, as `call_tensors` checks those of a call."""
    tensor = pattern.tensors[held.name]
    wanted = [*(env[n] for n in ("B", "Hq", "Sq")), len(node.parts)]
    if list(tensor.shape) != wanted:
        raise ShapeMismatch(
            where=node.where,
            left=f"the gates of shape {list(tensor.shape)}",
            right=f"{len(node.parts)} parts and q",
            problem=f"[B, Hq, Sq, parts] is {wanted}",
            way_out="declare them as a tensor of the call where they change with it.",
        )
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise LastStrideNotOne(where=node.where, name="gates", stride=tensor.stride(-1))


_HEAD_TABLES: Mapping[type[Node], tuple[str, str]] = {
    Sink: ("by_head", "count"),
    Local: ("by_head", "count"),
    Switch: ("by", "cases"),
    TopK: ("k_from", "k"),
    TopP: ("p_by_head", "p"),
    Similar: ("least_by_head", "least"),
    Attend: ("skip_by_head", "skip"),
}
"""The operand of a stage that may be a table of one number a head, and what it is a table of."""


def _head_table(node: Node, env: Mapping[str, int]) -> None:
    """Refuse a table of numbers, one a head, for other heads than those there are."""
    field, name = _HEAD_TABLES.get(type(node), ("", ""))
    table = getattr(node, field, None)
    if not isinstance(table, Captured):
        return
    found, allowed = table.dims[0], {"Hq": env["Hq"]}
    if isinstance(node, (TopK, TopP)):
        heads = list_heads(node.scores)
        allowed = {str(heads): evaluate(heads, env)}
    elif isinstance(node, (Similar, Attend)):
        allowed["Hkv"] = env["Hkv"]
    if found not in allowed.values():
        raise ShapeMismatch(
            where=node.where,
            left=f"the table of {name} with {found} numbers",
            right=f"q and k with Hq = {env['Hq']} and Hkv = {env['Hkv']}",
            problem="it should have one for each of the "
            + " or ".join(f"{symbol} = {count}" for symbol, count in allowed.items())
            + " heads",
            way_out="give a number for all heads, or a tensor of that length.",
        )


def _order(node: Permute, env: Mapping[str, int]) -> None:
    assert isinstance(node.order, Captured) and isinstance(node.x, Input)
    symbol = "Sq" if node.x.role == "query" else "Skv"
    if node.order.dims[0] != env[symbol]:
        raise MaskOfOtherLength(
            where=node.where,
            mask=f"the order that permutes {node.x.name}",
            built=f"{node.order.dims[0]} tokens",
            given=f"Sq = {env['Sq']} and Skv = {env['Skv']}",
        )


def _expressions(node: Node) -> Iterator[Expr]:
    if isinstance(node, MaskMod):
        yield node.predicate
    if isinstance(node, Attend) and node.score_mod is not None:
        yield node.score_mod


def _tables(node: Node, expr: Expr, pattern: Pattern, env: Mapping[str, int]) -> None:
    """Refuse a table that the rule would read past its end."""
    last = {"b": env["B"] - 1, "h": env["Hq"] - 1, "q": env["Sq"] - 1, "k": env["Skv"] - 1}
    ranges = {n: (Lit(0), Lit(v)) for n, v in last.items()}
    ranges |= {n: (Lit(env[n]), Lit(env[n])) for n in ("Sq", "Skv")}
    for load in walk(expr):
        if not isinstance(load, Load):
            continue
        shape = pattern.tensors[load.tensor].shape
        for axis, index in enumerate(load.index):
            bounds = bounds_of(index, ranges)
            if bounds is None or not all(isinstance(x, Lit) for x in bounds):
                continue
            low, high = (x.value for x in bounds if isinstance(x, Lit))
            if low < 0 or high >= shape[axis]:
                raise MaskOfOtherLength(
                    where=node.where,
                    mask=(
                        f"the tensor {load.tensor} of shape {list(shape)}, read at [{show(index)}],"
                    ),
                    built=f"indices 0 to {shape[axis] - 1} on axis {axis}",
                    given=(
                        f"Sq = {env['Sq']} and Skv = {env['Skv']}, which read {int(low)} to "
                        f"{int(high)}"
                    ),
                )


def _sinks(node: Node, sinks: Tensor, env: Mapping[str, int]) -> None:
    if sinks.shape != (env["Hq"],):
        raise ShapeMismatch(
            where=node.where,
            left=f"the sinks of shape {list(sinks.shape)}",
            right=f"q with Hq = {env['Hq']}",
            problem="a sink is one logit of one query head",
            way_out=f"pass {env['Hq']} sinks; sink.expand({env['Hq']}) shares one between heads.",
        )


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
