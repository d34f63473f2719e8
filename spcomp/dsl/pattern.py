"""`@pattern`: from a function over q, k, v to a frozen program."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from spcomp.dsl.inputs import argument_of
from spcomp.dsl.recording import recording
from spcomp.errors import PatternReturnsNothing, Where, WrongArguments
from spcomp.ir.nodes import Argument, Attend, Input, Merge, Node
from spcomp.ir.program import Parameter, Program

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern with its hyper-parameters fixed: a program and the tensors it captured."""

    program: Program
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the pattern function."""
        return self.program.name

    def __repr__(self) -> str:
        return self.program.title()


class PatternFunction:
    """What `@pattern` makes of a function.

    Called with hyper-parameters only it gives a `Pattern`; called inside another pattern with
    stages for q, k, v and the further tensors it takes, it gives the result stage, so patterns
    compose."""

    def __init__(
        self, function: Callable[..., Any], open: Mapping[str, tuple[Any, ...]] | None = None
    ) -> None:
        self.function = function
        self.signature = inspect.signature(function)
        functools.update_wrapper(self, function)
        self._check_open(open or {})
        self.open = {name: tuple(values) for name, values in (open or {}).items()}

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.function.__name__

    @property
    def where(self) -> Where:
        """Where the function is defined."""
        code = self.function.__code__
        return Where(code.co_filename, code.co_firstlineno)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the tensors it takes: its positional parameters."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return tuple(n for n, p in self.signature.parameters.items() if p.kind in kinds)

    @property
    def defaults(self) -> dict[str, Any]:
        """The hyper-parameters and their defaults."""
        empty = inspect.Parameter.empty
        return {
            n: (None if p.default is empty else p.default)
            for n, p in self.signature.parameters.items()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The stages of the tensors it takes beside q, k and v.

        Raises: BadDeclaration.
        """
        extra = (self.signature.parameters[name] for name in self.inputs[3:])
        return tuple(argument_of(self.function, p, self.where) for p in extra)

    def _check_open(self, open: Mapping[str, Any]) -> None:
        """Refuse to leave open what the function does not take, or never takes by default.

        Raises: WrongArguments.
        """
        for name, values in open.items():
            if name not in self.defaults:
                problem = f"leaves {name} open, which is none of its hyper-parameters"
            elif not isinstance(values, (list, tuple)):
                problem = f"leaves {name} open with {values!r}, which is no tuple of values"
            elif self.defaults[name] not in values:
                problem = f"leaves {name} open without its default, {self.defaults[name]!r}"
            else:
                continue
            raise WrongArguments(
                where=self.where,
                pattern=self.name,
                problem=problem,
                signature=f"{self.name}{self.signature}",
            )

    def __call__(self, *stages: Any, **parameters: Any) -> Any:
        """Make the pattern, or its result stage when q, k, v stages are given.

        Raises: WrongArguments, PatternReturnsNothing, and what the verbs raise.
        """
        if stages:
            return self._run(stages, parameters)
        if self.inputs[:3] != ("q", "k", "v"):
            raise WrongArguments(
                where=self.where,
                pattern=self.name,
                problem=f"takes the tensors ({', '.join(self.inputs)}), where (q, k, v) are given",
                signature=f"{self.name}(q, k, v, *, hyper_parameters)",
            )
        with recording() as record:
            q, k, v = Input("q", "query"), Input("k", "key"), Input("v", "value")
            arguments = self.arguments
            result = self._run((q, k, v, *arguments), parameters)
            program = Program(self.name, self._described(parameters), result, where=self.where)
            self._check_reads(program, arguments)
            return Pattern(program, dict(record.tensors))

    def _check_reads(self, program: Program, arguments: tuple[Argument, ...]) -> None:
        """Refuse a tensor that every call would have to bring and nothing reads."""
        unread = [a.name for a in arguments if a not in program.arguments()]
        if unread:
            raise WrongArguments(
                where=self.where,
                pattern=self.name,
                problem=f"takes {', '.join(unread)} and does not read it",
                signature=f"{self.name}{self.signature}",
            )

    def _run(self, stages: tuple[Any, ...], parameters: dict[str, Any]) -> Node:
        try:
            self.signature.bind(*stages, **parameters)
        except TypeError as error:
            raise WrongArguments(
                where=self.where,
                pattern=self.name,
                problem=f"was called wrongly: {error}",
                signature=f"{self.name}{self.signature}",
            ) from None
        result = self.function(*stages, **parameters)
        if not isinstance(result, (Attend, Merge)):
            shown = "nothing" if result is None else f"a {type(result).__name__}"
            raise PatternReturnsNothing(where=self.where, pattern=self.name, value=shown)
        return result

    def _described(self, parameters: dict[str, Any]) -> tuple[Parameter, ...]:
        merged = {**self.defaults, **parameters}
        return tuple((n, _plain(v)) for n, v in merged.items())


def _plain(value: Any) -> bool | int | float | str | None:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__}{list(shape)}"
    return str(getattr(value, "__name__", type(value).__name__))


@overload
def pattern(function: Callable[..., Any], /) -> PatternFunction: ...
@overload
def pattern(
    *, open: Mapping[str, tuple[Any, ...]]
) -> Callable[[Callable[..., Any]], PatternFunction]: ...


def pattern(
    function: Callable[..., Any] | None = None,
    /,
    *,
    open: Mapping[str, tuple[Any, ...]] | None = None,
) -> PatternFunction | Callable[[Callable[..., Any]], PatternFunction]:
    """Declare a sparse-attention pattern.

    The function takes q, k, v and hyper-parameters by keyword, and returns the result of `attend`
    or `merge`:

        @pattern
        def local_blocks(q, k, v, *, size=1024):
            return attend(q, gather(k, window(size)), gather(v, window(size)))

    Tensors that each call brings besides follow v, declared by an annotation (`tensor`):

        def gated(q, k, v, gates: tensor("B Hq Sq 2"), *, size=64): ...

    open: values by hyper-parameter that a tuning may choose among, where the meaning leaves them
    open: `@pattern(open={"block": (64, 128, 256)})`. The default is one of them.
    Raises: WrongArguments.
    """
    if function is not None:
        return PatternFunction(function)
    return lambda declared: PatternFunction(declared, open)
