"""What a call brings beside q, k and v: put in order, checked against its declaration, measured.

`takes` are the stages of `Program.arguments`, and `given` the call's tensors in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from spcomp import arguments
from spcomp.backends.base import Specialisation
from spcomp.errors import (
    DeviceClash,
    DtypeMix,
    LastStrideNotOne,
    MissingTensor,
    ShapeMismatch,
    StrideTooLarge,
    UnknownTensor,
    WrongDtype,
)
from spcomp.ir import dims
from spcomp.ir.nodes import Argument
from spcomp.ir.types import role_of

Takes = tuple[Argument, ...]


def in_order(pattern: str, takes: Takes, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Put the tensors a call gave by keyword in the order of their stages.

    Raises: MissingTensor, UnknownTensor.
    """
    for name in tensors:
        if name not in [a.name for a in takes]:
            _unknown(pattern, takes, name)
    given = []
    for node in takes:
        tensor = tensors.get(node.name)
        if not isinstance(tensor, Tensor):
            what = "none" if tensor is None else f"a {type(tensor).__name__}"
            raise MissingTensor(pattern=pattern, name=node.name, form=form_of(node), given=what)
        given.append(tensor)
    return tuple(given)


def _unknown(pattern: str, takes: Takes, name: str) -> NoReturn:
    forms = ", ".join(f"{a.name} {form_of(a)}" for a in takes)
    wanted = f"it takes {forms}" if takes else "it takes q, k and v alone"
    raise UnknownTensor(pattern=pattern, name=name, takes=wanted)


def form_of(node: Argument) -> str:
    """Write the dims of a tensor: `[B, Hq, Sq, 3]`."""
    return f"[{', '.join(str(d) for d in node.dims)}]"


def check(takes: Takes, given: Sequence[Tensor], q: Tensor, env: dict[str, int]) -> None:
    """Check a call's tensors, and add the sizes of the pattern's own dims to its symbols.

    Raises: ShapeMismatch, DtypeMix, WrongDtype, DeviceClash, LastStrideNotOne.
    """
    bound: dict[str, str] = {}
    for node, tensor in zip(takes, given, strict=True):
        _check_shape(node, tensor, env, bound)
        if node.dtype == "data" and tensor.dtype != q.dtype:
            raise DtypeMix(
                left="q",
                left_dtype=_short(q.dtype),
                right=node.name,
                right_dtype=_short(tensor.dtype),
            )
        if node.dtype not in ("data", _short(tensor.dtype)):
            raise WrongDtype(name=node.name, dtype=_short(tensor.dtype), wanted=node.dtype)
        if tensor.device != q.device:
            raise DeviceClash(
                left="q", left_device=q.device, right=node.name, right_device=tensor.device
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise LastStrideNotOne(name=node.name, stride=tensor.stride(-1))


def _check_shape(
    node: Argument, tensor: Tensor, env: dict[str, int], bound: dict[str, str]
) -> None:
    shape, form = list(tensor.shape), form_of(node)
    left = f"{node.name} with shape {shape}"
    way_out = f"{node.name} is {form}."
    if len(shape) != len(node.dims):
        raise ShapeMismatch(
            left=left,
            right=f"the form {form}",
            problem=f"{len(node.dims)} dimensions are needed",
            way_out=way_out,
        )
    for dim, size in zip(node.dims, shape, strict=True):
        if isinstance(dim, int):
            if size != dim:
                raise ShapeMismatch(
                    left=left,
                    right=f"the form {form}",
                    problem=f"{dim} is declared and {size} given",
                    way_out=way_out,
                )
            continue
        name = str(dim)
        if name not in env:
            if size == 0:
                raise ShapeMismatch(
                    left=left,
                    right=f"the form {form}",
                    problem=f"{name} is 0, where 1 or more is needed",
                    way_out=way_out,
                )
            env[name], bound[name] = size, node.name
        elif size != env[name]:
            raise ShapeMismatch(
                left=left,
                right=bound.get(name, "q, k and v"),
                problem=f"{name} is {size} in the first and {env[name]} in the second",
                way_out=way_out,
            )


def check_strides(takes: Takes, given: Sequence[Tensor]) -> None:
    """Refuse sides of a product whose rows lie so far apart that one tile passes 2^31 elements.

    Raises: StrideTooLarge.
    """
    limit = arguments.MOST_ROW_STRIDE
    for node, tensor in zip(takes, given, strict=True):
        is_side = role_of(node) != "table"
        if is_side and tensor.shape[2] > 1 and tensor.stride(2) > limit:
            raise StrideTooLarge(name=node.name, stride=tensor.stride(2), limit=limit)


def specialisation(
    takes: Takes, given: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor
) -> Specialisation:
    """Give what kernels are specialised on, the pattern's own widths among it."""
    spec = arguments.specialisation(q, k, v)
    sizes = zip(takes, given, strict=False)
    widths = {n: int(t.shape[-1]) for a, t in sizes for n in dims.names_of(a.dims[-1:])}
    return replace(spec, widths=tuple(widths.items())) if widths else spec


def autocast(
    takes: Takes, q: Tensor, k: Tensor, v: Tensor, given: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Cast what `scaled_dot_product_attention` would under torch.autocast: floats, and no float64;
    and what is declared to be of q's dtype."""
    kind = "cpu" if q.is_meta else q.device.type  # the meta device has none of its own
    if not torch.is_autocast_enabled(kind):
        return q, k, v, given
    dtype = torch.get_autocast_dtype(kind)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

    pairs = zip(takes, given, strict=True)
    own = tuple([cast(x) if a.dtype == "data" else x for a, x in pairs])
    return cast(q), cast(k), cast(v), own


def named(takes: Takes, given: Sequence[Tensor]) -> dict[str, Any]:
    """Give the call's tensors by the names of their buffers."""
    return {a.name: t for a, t in zip(takes, given, strict=True)}


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
