"""Tensors a pattern takes at each call beside q, k and v: their declaration and their stages."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from spcomp.errors import BadDeclaration, Where
from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.nodes import Argument
from spcomp.ir.nodes.inputs import ARGUMENT_DTYPES
from spcomp.ir.spec import CALL_DIMS, operand_fault

_FORM = "tensor('B Hq Sq 3'): names of dims and numbers, with spaces between them"
_OF_A_TABLE = re.compile(r"table\d+")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What `tensor` declares: dims as written, and a dtype."""

    dims: tuple[Dim, ...]
    dtype: str

    def __str__(self) -> str:
        return f"[{', '.join(str(d) for d in self.dims)}]"


def tensor(form: str, *, dtype: str = "data") -> TensorSpec:
    """Declare a tensor that each call brings beside q, k and v, as a parameter's annotation.

        @pattern
        def gated(q, k, v, gates: tensor("B Hq Sq 3"), *, size=64): ...

    form: its dims in order, each a number, one of B, Hq, Hkv, Sq, Skv, D, Dv, or a name of the
    pattern's own that begins with a capital letter, such as Hi: it has the size that the tensors of
    a call give it, the same in all of them. A last dim of that kind is a constant of the kernels;
    others are free from call to call. dtype: "data" (that of q), float32, float16, bfloat16 or
    int32. `Annotated[Any, tensor(...)]` says the same to a type checker.
    Raises: BadDeclaration.
    """
    words = form.replace(",", " ").split() if isinstance(form, str) else []
    if not words:
        raise BadDeclaration(what=f"tensor({form!r})", problem="names no dims", form=_FORM)
    if dtype not in ARGUMENT_DTYPES:
        raise BadDeclaration(
            what=f"tensor({form!r}, dtype={dtype!r})",
            problem="names an unknown dtype",
            form=f"one of {', '.join(ARGUMENT_DTYPES)}",
        )
    return TensorSpec(tuple(_dim(form, word) for word in words), dtype)


def _dim(form: str, word: str) -> Dim:
    if word.isdecimal() and int(word) > 0:
        return int(word)
    if word in CALL_DIMS:
        return dims.SYMBOLS[word]
    if dims.is_name(word):
        return dims.named(word)
    taken = word in dims.SYMBOLS or word in dims.TAKEN
    why = "is taken by spcomp" if taken else "is neither a number of 1 or more nor a name"
    raise BadDeclaration(
        what=f"tensor({form!r})",
        problem=f"has the dim {word!r}, which {why}",
        form=f"{_FORM}; a name of your own begins with a capital letter",
    )


def argument_of(
    function: Callable[..., Any], parameter: inspect.Parameter, where: Where
) -> Argument:
    """Give the stage of a parameter behind q, k and v.

    Raises: BadDeclaration where its annotation declares no tensor or its name is taken.
    """
    declared = _spec_of(_evaluated(function, parameter.annotation))
    what = f"the parameter {parameter.name} of '{function.__name__}'"
    if declared is None:
        raise BadDeclaration(
            where=where,
            what=what,
            problem="stands beside q, k and v and declares no tensor",
            form=f"{parameter.name}: tensor('B Hq Sq 3'), or make it a hyper-parameter behind *",
        )
    node = Argument(parameter.name, declared.dims, declared.dtype, where=where)
    if operand_fault(node) or _OF_A_TABLE.match(parameter.name):
        raise BadDeclaration(
            where=where,
            what=what,
            problem="has a name that is taken by spcomp",
            form="another name",
        )
    return node


def _evaluated(function: Callable[..., Any], annotation: Any) -> Any:
    """Evaluate an annotation that `from __future__ import annotations` left as text."""
    if not isinstance(annotation, str):
        return annotation
    scope = dict(inspect.getclosurevars(function).nonlocals)
    try:
        return eval(annotation, function.__globals__, scope)
    except NameError:
        return None


def _spec_of(annotation: Any) -> TensorSpec | None:
    if get_origin(annotation) is Annotated:
        return next((a for a in get_args(annotation) if isinstance(a, TensorSpec)), None)
    return annotation if isinstance(annotation, TensorSpec) else None
