"""Selections as values: rules over tokens, lists the user brings, and FlexAttention's masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import spcomp.dsl.checks as check
from spcomp.dsl.recording import Recording, current, user_line
from spcomp.dsl.trace import trace_mask_mod
from spcomp.errors import NegativeCount, NotAPermutation, ShapeMismatch, WrongStage
from spcomp.ir.nodes import Captured, Causal, Everything, Given, Local, MaskMod, Selection, Sink

if TYPE_CHECKING:
    from torch import Tensor


def sink(count: Any) -> Sink:
    """The first `count` units: tokens in attend, the scorer's units in topk(always=...).

    A count for each query head, int32 [Hq], is taken in attend.
    """
    if hasattr(count, "shape"):
        table, most = captured_counts("sink", "count", count, least=0)
        return Sink(most, by_head=table, where=user_line())
    number = check.count("sink", "count", count, least=0, counts="units at the start")
    return Sink(number, where=user_line())


def local(count: int) -> Local:
    """The last `count` units up to and including the query's own."""
    number = check.count("local", "count", count, least=1, counts="units, the query's own included")
    return Local(number, where=user_line())


def own() -> Local:
    """The query's own unit."""
    return Local(1, where=user_line())


def window(size: Any) -> Local:
    """The last `size` tokens, the query's own included: t - size < u <= t; a number, or one for
    each query head, int32 [Hq]."""
    if hasattr(size, "shape"):
        table, most = captured_counts("window", "size", size, least=1)
        return Local(most, by_head=table, where=user_line())
    number = check.count("window", "size", size, least=1, counts="tokens, the query's own included")
    return Local(number, where=user_line())


def causal() -> Causal:
    """Keys not later than the query, aligned bottom-right."""
    return Causal(where=user_line())


def everything() -> Everything:
    """All pairs."""
    return Everything(where=user_line())


def mask_mod(rule: Callable[..., Any]) -> MaskMod:
    """A FlexAttention `mask_mod(b, h, q_idx, kv_idx)`, traced into an expression.

    The rule sees plain row and key numbers. Tensors it indexes become inputs of the kernels,
    numbers it closes over enter the generated text.
    Raises: ControlFlowOnData, NotTraceable.
    """
    predicate, tables = trace_mask_mod(rule)
    name = getattr(rule, "__name__", "mask_mod")
    return MaskMod(predicate, tables, name, where=user_line())


def block_indices(
    indices: Tensor, counts: Tensor | None = None, *, block: int | tuple[int, int]
) -> Given:
    """Units of keys listed by the user.

    indices [B|1, Hs, Nq, K] int32, -1 for no unit; counts [B|1, Hs, Nq] int32 (default: the entries
    that are not -1). Hs is 1, Hkv or Hq. block: tokens of a (query row, key unit), or one number
    for both.
    Raises: ShapeMismatch on wrong ranks.
    """
    _rank("block_indices", "indices", indices, 4)
    if counts is not None:
        _rank("block_indices", "counts", counts, 3)
    sizes = _blocks("block_indices", block)
    record = _record("block_indices")
    held = None if counts is None else record.capture(counts)
    return Given("indices", record.capture(indices), held, *sizes, where=user_line())


def block_mask(mask: Tensor, *, block: int | tuple[int, int]) -> Given:
    """Units of keys marked in a boolean mask [B|1, Hs, Nq, Nk]; Hs is 1, Hkv or Hq.

    Raises: ShapeMismatch on wrong ranks.
    """
    _rank("block_mask", "mask", mask, 4)
    sizes = _blocks("block_mask", block)
    return Given("mask", _record("block_mask").capture(mask), None, *sizes, where=user_line())


def flex_block_mask(mask: Any) -> Selection:
    """A `torch.nn.attention.flex_attention.BlockMask`: its full blocks, and its partial blocks
    under its mask_mod."""
    if not _is_block_mask(mask):
        raise WrongStage(
            where=user_line(),
            verb="flex_block_mask",
            argument="mask",
            wanted="a FlexAttention BlockMask",
            given=f"a {type(mask).__name__}",
            way_out="torch.nn.attention.flex_attention.create_block_mask makes one.",
        )
    record = _record("flex_block_mask")
    lengths = int(mask.seq_lengths[0]), int(mask.seq_lengths[1])
    rule, tables = trace_mask_mod(mask.mask_mod)

    def listed(indices: Tensor, counts: Tensor) -> Given:
        rows, keys = (int(n) for n in mask.BLOCK_SIZE)
        held = record.capture(counts)
        return Given(
            "indices", record.capture(indices), held, rows, keys, lengths, where=user_line()
        )

    partial = listed(mask.kv_indices, mask.kv_num_blocks)
    inside = MaskMod(rule, tables, "BlockMask.mask_mod", lengths, where=user_line())
    selection: Selection = partial & inside
    if mask.full_kv_indices is not None:
        selection = listed(mask.full_kv_indices, mask.full_kv_num_blocks) | selection
    return selection


def captured_row(verb: str, name: str, tensor: Any, wanted: str = "float32") -> Captured:
    """Take a tensor of rank 1 in a dtype, one number a head, as a table of the pattern.

    Raises: ShapeMismatch, WrongStage.
    """
    shape, kind = list(tensor.shape), str(getattr(tensor, "dtype", "")).removeprefix("torch.")
    if len(shape) != 1 or kind != wanted:
        raise ShapeMismatch(
            where=user_line(),
            left=f"{verb}'s {name} of shape {shape} in {kind}",
            right=f"one {wanted} number a head, [Hs]",
            problem=f"{len(shape)} dimensions in {kind}"
            if len(shape) != 1
            else f"its dtype is {kind}",
            way_out="give a tensor such as torch.full((heads,), 0.9)."
            if wanted == "float32"
            else "give a tensor such as torch.full((heads,), 8, dtype=torch.int32).",
        )
    return _record(verb).capture(tensor)


def captured_counts(verb: str, name: str, tensor: Any, *, least: int) -> tuple[Captured, int]:
    """Take an int32 tensor [heads] of counts as a table; also give the largest of them.

    Raises: ShapeMismatch, WrongStage, and NegativeCount for a count below `least`.
    """
    table = captured_row(verb, name, tensor, "int32")
    counts = [int(n) for n in tensor]
    if min(counts, default=least) < least:
        head = counts.index(min(counts))
        raise NegativeCount(
            where=user_line(),
            verb=verb,
            name=f"{name}[{head}]",
            value=min(counts),
            least=least,
            counts="units of one head",
        )
    return table, max(counts, default=0)


def captured_order(verb: str, order: Any) -> Captured:
    """Take an integer tensor of rank 1 that holds each of its places once, as a table.

    Raises: NotAPermutation, ShapeMismatch, WrongStage.
    """
    shape = list(getattr(order, "shape", []))
    kind = str(getattr(order, "dtype", type(order).__name__)).removeprefix("torch.")
    if len(shape) != 1 or kind not in ("int32", "int64"):
        raise ShapeMismatch(
            where=user_line(),
            left=f"{verb}'s order of shape {shape} in {kind}",
            right="one place a token, [S] in int32 or int64",
            problem=f"{len(shape)} dimensions" if len(shape) != 1 else f"its dtype is {kind}",
            way_out="give a tensor such as torch.randperm(tokens).",
        )
    places = order.new_ones(shape).cumsum(0) - 1
    wrong = (order.sort().values != places).nonzero()
    if len(wrong):
        missing = int(places[wrong[0, 0]])
        raise NotAPermutation(where=user_line(), verb=verb, tokens=shape[0], missing=missing)
    return _record(verb).capture(order)


def _is_block_mask(value: Any) -> bool:
    """Tell by name, so that the language needs no torch."""
    return type(value).__name__ == "BlockMask" and hasattr(value, "kv_num_blocks")


def as_selection(verb: str, value: Any) -> Selection:
    """Check that a value is a selection; a BlockMask is taken as one."""
    if _is_block_mask(value):
        return flex_block_mask(value)
    check.stage(
        verb,
        "selection",
        value,
        (Selection,),
        "a selection",
        "use topk(...), window(...), sink(...), mask_mod(fn), block_mask(t, block=...), "
        "or a | or & of them.",
    )
    assert isinstance(value, Selection)
    return value


def _record(verb: str) -> Recording:
    record = current()
    if record is None:
        raise WrongStage(
            where=user_line(),
            verb=verb,
            argument="place",
            wanted="a call inside a function under @pattern",
            given="a call outside one",
            way_out="move the call into the pattern; pass the tensor as a keyword argument.",
        )
    return record


def _rank(verb: str, name: str, tensor: Any, rank: int) -> None:
    shape = getattr(tensor, "shape", None)
    if shape is None or len(shape) != rank:
        shown = f"a {type(tensor).__name__}" if shape is None else f"shape {list(shape)}"
        form = "[B, Hs, Nq, K]" if rank == 4 else "[B, Hs, Nq]"
        raise ShapeMismatch(
            where=user_line(),
            left=f"{verb}'s {name} with {shown}",
            right=f"the form {form}",
            problem=f"{rank} dimensions are needed",
            way_out="add dimensions of size 1 for a batch or head axis that is shared.",
        )


def _blocks(verb: str, block: Any) -> tuple[int, int]:
    pair = block if isinstance(block, tuple) else (block, block)
    rows, keys = (
        check.count(verb, "block", n, least=1, counts="the tokens of a block") for n in pair
    )
    return rows, keys
