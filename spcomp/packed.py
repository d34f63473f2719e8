"""Packed sequences: tensors without a batch axis, in which sequences lie one behind the other.

Kernels read where a sequence begins and how long it is. The reference backend runs a call for each
sequence, which is what `Attention.varlen` means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from spcomp import arguments, call_tensors, compiler, torch_op
from spcomp.backends.base import Executable, Specialisation
from spcomp.dsl.pattern import Pattern
from spcomp.errors import (
    CannotPack,
    DeviceClash,
    LengthMissing,
    ShapeMismatch,
    WrongLengths,
)
from spcomp.ir.expr import Expr, Lit, substitute, symbols
from spcomp.ir.nodes import Argument, Attend, Given, MaskMod, Merge, Node
from spcomp.ir.nodes.base import rebuild
from spcomp.ir.plan import Phase

FORMS = {"q": ("Tq", "Hq", "D"), "k": ("Tk", "Hkv", "D"), "v": ("Tk", "Hkv", "Dv")}
ONE_BY_ONE = "the reference backend runs the packed sequences one by one"
Result: TypeAlias = tuple[Tensor, Tensor]
Admitted: TypeAlias = tuple[dict[str, int], Executable, dict[str, Tensor]]


class Attends(Protocol):
    """What packed calls need of a compiled pattern (`spcomp.api.Attention`)."""

    @property
    def pattern(self) -> Pattern:
        """The pattern."""
        ...

    @property
    def tables(self) -> list[Tensor]:
        """Its tensors."""
        ...

    @property
    def compiled(self) -> torch_op.Meaning:
        """What equal compiles share."""
        ...

    def now(self) -> Any:
        """Give the time between two writes to its lists."""
        ...

    def tables_of(self, epoch: Any) -> dict[str, Tensor]:
        """Give its tensors by the names that plans have for them."""
        ...

    def built_as(
        self, epoch: Any, q: Tensor, phase: Phase, spec: Specialisation, scale: float | None
    ) -> Any:
        """Give the plan, source and executable of calls of one kind."""
        ...

    def admit(self, epoch: Any, key: tuple[object, ...], known: Admitted) -> None:
        """Keep a call that passed its checks."""
        ...

    def attend_kept(
        self, q: Tensor, k: Tensor, v: Tensor, kept: dict[str, Tensor], *, scale: float | None
    ) -> Result:
        """Attend to a batch."""
        ...

    def of(self, pattern: Pattern) -> Attends:
        """Give another pattern compiled with the same options."""
        ...


@dataclass(frozen=True, slots=True)
class Lengths:
    """Where packed sequences begin, int32 [B+1] for q and for k and v, and the longest lengths;
    None where the caller left them out."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int | None
    max_k: int | None

    def sides(self) -> tuple[tuple[str, Tensor, int | None], ...]:
        """Give name, starts and longest length of the queries and of the keys."""
        return ("q", self.cu_q, self.max_q), ("k", self.cu_k, self.max_k)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def outside_the_graph(
    attention: Attends, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float | None
) -> Result:
    """Attend outside a graph of torch.compile, which is cut here."""
    return attend(attention, q, k, v, lengths, scale)


def attend(
    attention: Attends, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float | None
) -> Result:
    """Attend to packed sequences (see `Attention.varlen`): out [Tq,Hq,Dv] and lse [Hq,Tq]."""
    _check_forms(q, k, v)
    q, k, v, _ = call_tensors.autocast((), q, k, v, ())
    with torch_op.without_autocast(q):
        if attention.compiled.backend_name(q.device) == "reference" or q.is_meta:
            return _one_by_one(attention, q, k, v, lengths, scale)
        env, executable, tables = _admitted(attention, q, k, v, lengths, scale)
        if 0 in (env["B"], env["Tq"], env["Tk"]):
            return _nothing(q, v)
        views = dict(zip("qkv", map(_viewed, (q, k, v)), strict=True))
        starts = {"cu_q": lengths.cu_q, "cu_k": lengths.cu_k}
        out, lse = executable.run({**views, **tables, **starts}, env, {})
    return out, lse[0]


def built_for(
    attention: Attends,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    scale: float | None,
) -> tuple[Any, dict[str, int]]:
    """Give what a call runs and its symbols; nothing where sequences run one by one."""
    _check_forms(q, k, v)
    name = attention.compiled.backend_name(q.device)
    env = _checked(attention, q, k, v, lengths, name)
    if name == "reference":
        return None, env
    q, k, v = map(_viewed, (q, k, v))
    spec = replace(arguments.specialisation(q, k, v), is_packed=True)
    phase = compiler.phase_for(env["Sq"])
    return attention.built_as(attention.now(), q, phase, spec, scale), env


def _admitted(
    attention: Attends, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float | None
) -> Admitted:
    """Give what runs a call; on a device, one like it that passed is not checked again."""
    epoch = attention.now()
    key: tuple[object, ...] | None = None
    if q.is_cuda and not lengths.cu_q.is_cpu and not lengths.cu_k.is_cpu:
        traits = ((c.shape, c.stride(), c.dtype, c.device) for c in (lengths.cu_q, lengths.cu_k))
        rest = arguments.call_key(q, k, v, *attention.tables)
        key = ("packed", scale, lengths.max_q, lengths.max_k, *traits, *rest)
        found: Admitted | None = epoch.admitted.get(key)
        if found is not None:
            return found
    built, env = built_for(attention, q, k, v, lengths, scale)
    assert built is not None
    known = env, built.executable, attention.tables_of(epoch)
    if key is not None:
        attention.admit(epoch, key, known)
    return known


# ---- one by one ----------------------------------------------------------------------------------


def _one_by_one(
    attention: Attends, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float | None
) -> Result:
    """Run a call for each sequence; differentiable. It reads the lengths, and so waits for a
    device."""
    _checked(attention, q, k, v, lengths, "reference")
    if q.is_meta:
        return _nothing(q, v)
    q4, k4, v4 = map(_viewed, (q, k, v))
    spans = zip(*(pairwise(c.tolist()) for c in (lengths.cu_q, lengths.cu_k)), strict=True)
    outs, lses = [], []
    for item, ((q_begin, q_end), (k_begin, k_end)) in enumerate(spans):
        if q_begin == q_end:
            continue
        keys, values = (x[:, :, k_begin:k_end] for x in (k4, v4))
        rows = q4[:, :, q_begin:q_end]
        out, lse = _of_item(attention, item).attend_kept(rows, keys, values, {}, scale=scale)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return (torch.cat(outs), torch.cat(lses, dim=1)) if outs else _nothing(q, v)


def _of_item(attention: Attends, item: int) -> Attends:
    """Give the pattern of one sequence: a rule that reads the batch item reads its number."""
    pattern = attention.pattern
    if not any("b" in symbols(e) for n in pattern.program.stages() for e in _rules(n)):
        return attention
    number: dict[str, Expr] = {"b": Lit(item)}

    def visit(node: Node) -> Node:
        changed = rebuild(node, visit)
        if isinstance(changed, MaskMod):
            return replace(changed, predicate=substitute(changed.predicate, number))
        if isinstance(changed, Attend) and changed.score_mod is not None:
            return replace(changed, score_mod=substitute(changed.score_mod, number))
        return changed

    program = replace(pattern.program, result=visit(pattern.program.result))
    return attention.of(Pattern(program, pattern.tensors))


def _rules(node: Node) -> Iterable[Expr]:
    if isinstance(node, MaskMod):
        yield node.predicate
    if isinstance(node, Attend) and node.score_mod is not None:
        yield node.score_mod


def _nothing(q: Tensor, v: Tensor) -> Result:
    """Give the result of a call without queries or without keys."""
    rows = q.shape[1], q.shape[0]
    out = q.new_zeros((q.shape[0], q.shape[1], v.shape[-1]))
    return out, torch.full(rows, -torch.inf, dtype=torch.float32, device=q.device)


def _viewed(x: Tensor) -> Tensor:
    """Give [T,H,D] as [1,H,T,D]."""
    return x.transpose(0, 1).unsqueeze(0)


# ---- checks --------------------------------------------------------------------------------------


def _check_forms(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what has no rows of its own, or a batch axis."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        form = f"[{', '.join(FORMS[name])}]"
        if not isinstance(x, Tensor):
            raise CannotPack(
                what=f"a {type(x).__name__} in the place of {name}",
                why="a cache holds a batch of one length, with the state of its pattern",
                way_out=f"pass the tensor {name} {form}, or attend with the cache, `cache.attend`.",
            )
        if x.dim() != 3:
            raise ShapeMismatch(
                left=f"{name} with shape {list(x.shape)}",
                right=f"the form {form}",
                problem="3 dimensions are needed",
                way_out="packed tensors have no batch axis; call the pattern itself on a batch.",
            )


def _checked(
    attention: Attends, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, name: str
) -> dict[str, int]:
    """Check a call and give its symbols; Sq and Skv are the longest lengths."""
    arguments.check_tensors(q, k, v)
    env = arguments.sizes_of(FORMS, {"q": q, "k": k, "v": v})
    env["B"] = _check_starts(lengths, q)
    waits = q.device.type not in ("cpu", "meta") and name != "reference"
    totals = {"q": env["Tq"], "k": env["Tk"]}
    for (side, starts, longest), symbol in zip(lengths.sides(), ("Sq", "Skv"), strict=True):
        if longest is not None and longest < 1:
            raise WrongLengths(
                name=f"max_seqlen_{side} = {longest}",
                problem="is below 1",
                way_out="give the longest length, or leave it out on the CPU.",
            )
        if starts.is_meta or waits:
            if longest is None and waits:
                raise LengthMissing(
                    name=f"max_seqlen_{side}", source=f"cu_seqlens_{side}", device=starts.device
                )
            env[symbol] = longest or 1
        else:
            env[symbol] = _read(side, starts, longest, totals[side])
    _check_pattern(attention.pattern, env, str(q.device))
    if name != "reference":
        arguments.check_strides(*map(_viewed, (q, k, v)))
    if name != "reference" and torch.is_grad_enabled():
        tables = {f"the table {n}": t for n, t in attention.pattern.tensors.items()}
        arguments.check_gradients(name, {"q": q, "k": k, "v": v, **tables})
    return env


def _check_starts(lengths: Lengths, q: Tensor) -> int:
    """Check form, dtype and device of the starts; give the number of sequences."""
    for side, starts, _ in lengths.sides():
        name = f"cu_seqlens_{side}"
        if starts.dtype != torch.int32:
            raise WrongLengths(
                name=f"{name} of dtype {str(starts.dtype).removeprefix('torch.')}",
                problem="is not int32",
                way_out="pass the cumulated lengths, beginning with 0: int32 [B+1].",
            )
        if starts.device != q.device:
            raise DeviceClash(
                left=name, left_device=starts.device, right="q", right_device=q.device
            )
        if starts.dim() != 1 or starts.numel() < 1 or not starts.is_contiguous():
            raise WrongLengths(
                name=f"{name} with shape {list(starts.shape)} and strides {list(starts.stride())}",
                problem="is not one dense row of B + 1 starts",
                way_out="pass the cumulated lengths, beginning with 0: int32 [B+1].",
            )
    counts = [c.numel() - 1 for _, c, _ in lengths.sides()]
    if counts[0] != counts[1]:
        raise WrongLengths(
            name=f"cu_seqlens_q has {counts[0]} sequences and cu_seqlens_k",
            problem=f"has {counts[1]}",
            way_out="give both for the same sequences; a sequence may have no queries or no keys.",
        )
    return counts[0]


def _read(side: str, starts: Tensor, longest: int | None, total: int) -> int:
    """Check the values of starts that the host may read; give the longest length to plan for."""
    values = starts.tolist()
    sizes = [b - a for a, b in pairwise(values)]
    falls = next((n for n, size in enumerate(sizes) if size < 0), None)
    problem = ""
    if values[0] != 0:
        problem = f"begins with {values[0]}, not with 0"
    elif falls is not None:
        problem = f"falls from {values[falls]} to {values[falls + 1]} at sequence {falls}"
    elif values[-1] != total:
        problem = f"ends with {values[-1]}, and {side} has {total} rows"
    if problem:
        raise WrongLengths(
            name=f"cu_seqlens_{side}",
            problem=problem,
            way_out="cumulate the lengths: [0, n0, n0 + n1, …] up to the rows there are.",
        )
    most = max(sizes, default=0)
    if longest is not None and longest < most:
        raise WrongLengths(
            name=f"max_seqlen_{side} = {longest}",
            problem=f"is below the {most} rows of a sequence of cu_seqlens_{side}",
            way_out="give the longest length, or leave it out on the CPU.",
        )
    return longest or max(most, 1)


def _check_pattern(pattern: Pattern, env: dict[str, int], device: str) -> None:
    """Refuse lists and masks that were made for one pair of lengths, and tables that are too
    short."""
    for node in pattern.program.stages():
        if isinstance(node, (Given, MaskMod)) and node.built_for is not None:
            raise CannotPack(
                where=node.where,
                what="a mask built for Sq = {} and Skv = {}".format(*node.built_for),
                why="every sequence has lengths of its own",
                way_out="pass its rule to mask_mod(), without the lengths.",
            )
        if isinstance(node, Given):
            raise CannotPack(
                where=node.where,
                what="a list of blocks that the user gives",
                why="its rows are those of a batch of one pair of lengths",
                way_out="call the pattern on a batch, or choose by score or by rule.",
            )
        if isinstance(node, Argument) or (isinstance(node, Merge) and node.by == "gates"):
            raise CannotPack(
                where=node.where,
                what=f"the tensor {node.name}" if isinstance(node, Argument) else "gates",
                why="only q, k and v are taken in rows without a batch axis so far",
                way_out="call the pattern on each sequence, or on a batch.",
            )
    arguments.check_masks(pattern, env, device)
