"""The options commands share, and the forms their values take."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from spcomp.backends import registry
from spcomp.backends.base import Backend, Specialisation, default_schedule
from spcomp.cli.patterns import Value
from spcomp.errors import HeadsDoNotDivide, SizeUnknown, UnknownChoice
from spcomp.ir.plan import LoopOrder
from spcomp.ir.program import Program
from spcomp.ir.schedule import Schedule
from spcomp.ir.target import Target

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic to type checkers alone in older versions of click

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
PHASES = ("prefill", "decode")
ORDERS: tuple[LoopOrder, ...] = get_args(LoopOrder)


class Dtype(ParamType):
    """bf16, fp16 or fp32; torch's names are taken too."""

    name = "bf16|fp16|fp32"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Give torch's name of a dtype."""
        if value in DTYPES:
            return DTYPES[value]
        if value in DTYPES.values():
            return str(value)
        self.fail(f"{value!r} is not one of {', '.join(DTYPES)}.", param, ctx)


class Setting(ParamType):
    """name=value, the value a number, True, False, None or a word."""

    name = "NAME=VALUE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Value]:
        """Split at the first equals sign and read the value, without evaluating it."""
        if isinstance(value, tuple):
            return value
        name, separator, text = value.partition("=")
        if not separator or not name.isidentifier():
            self.fail(f"{value!r} is not of the form name=value.", param, ctx)
        try:
            read = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return name, text
        if read is None or isinstance(read, (bool, int, float, str)):
            return name, read
        self.fail(f"{text!r} is not a number, a word, True, False or None.", param, ctx)


class Axis(ParamType):
    """kernel.axis=value, such as attend.block_q=64."""

    name = "KERNEL.AXIS=N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str, int]:
        """Split a schedule axis from its value."""
        if isinstance(value, tuple):
            return value
        place, _, number = value.partition("=")
        kernel, _, axis = place.partition(".")
        if not (kernel and axis and number.isdecimal()):
            self.fail(f"{value!r} is not of the form kernel.axis=number.", param, ctx)
        return kernel, axis, int(number)


class Size(ParamType):
    """Hi=64, the size of a dim that the pattern named."""

    name = "NAME=N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """Split the name from its size."""
        if isinstance(value, tuple):
            return value
        name, _, number = value.partition("=")
        if not (name.isidentifier() and number.isdecimal() and int(number)):
            self.fail(f"{value!r} is not of the form name=number, 1 or more.", param, ctx)
        return name, int(number)


class Shape(ParamType):
    """B=1,Hq=32,Hkv=8,Sq=4096,D=128; what is left out follows from the rest."""

    name = "B=1,Hq=32,Hkv=8,Sq=4096,D=128"
    names = ("B", "Hq", "Hkv", "Sq", "Skv", "D", "Dv")

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, int]:
        """Read the dims; S gives Sq and Skv, and Hkv, Skv, Dv default to Hq, Sq, D.

        Raises: HeadsDoNotDivide.
        """
        if isinstance(value, dict):
            return value
        given: dict[str, int] = {}
        for part in value.split(","):
            name, _, number = part.strip().partition("=")
            if name not in (*self.names, "S"):
                known = ", ".join((*self.names, "S"))
                self.fail(f"{name!r} is no dimension; choose from {known}.", param, ctx)
            if not number.isdecimal() or int(number) < 1:
                self.fail(
                    f"{part.strip()!r} does not give a whole number of 1 or more.", param, ctx
                )
            given[name] = int(number)
        return self._completed(given, param, ctx)

    def _completed(
        self, given: dict[str, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, int]:
        length = given.pop("S", None)
        if length is not None:
            given = {"Sq": length, "Skv": length, **given}
        if "Sq" not in given:
            self.fail("a shape needs S, or Sq and Skv.", param, ctx)
        env = {"B": 1, "Hq": 1, "D": 128, "Skv": given["Sq"], **given}
        env = {"Hkv": env["Hq"], "Dv": env["D"], **env}
        if env["Hq"] % env["Hkv"]:
            raise HeadsDoNotDivide(hq=env["Hq"], hkv=env["Hkv"])
        return {name: env[name] for name in self.names}


@dataclass(frozen=True, slots=True)
class Setup:
    """What a pattern is lowered for."""

    backend: Backend
    target: Target
    spec: Specialisation


def setup_for(
    target: str,
    dtype: str,
    head_dim: int,
    value_dim: int | None,
    widths: tuple[tuple[str, int], ...] = (),
) -> Setup:
    """Give the backend, target and specialisation the options name.

    Raises: UnknownTarget.
    """
    found = registry.target(target)
    value_dim = head_dim if value_dim is None else value_dim
    spec = Specialisation(dtype, head_dim, value_dim, widths=widths)
    return Setup(registry.backend(found.backend), found, spec)


def own_sizes(
    program: Program, given: tuple[tuple[str, int], ...], *, is_whole: bool
) -> dict[str, int]:
    """Give the sizes of the dims that a pattern named, of repeated --dim options.

    is_whole: all of them are needed, and not only widths, without which there is no kernel.
    Raises: UnknownChoice for a name the pattern does not have, SizeUnknown.
    """
    sizes, known = dict(given), program.names()
    for name in sizes:
        if name not in known:
            choices = ", ".join(known) or "those that the pattern names; it names none"
            raise UnknownChoice(verb="--dim", name="the dim", value=name, choices=choices)
    for name in known if is_whole else ():
        if name not in sizes:
            raise SizeUnknown(where=program.where, pattern=program.name, name=name)
    return sizes


def widths_of(program: Program, sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Give those sizes that kernels are specialised on."""
    return tuple((name, sizes[name]) for name in program.widths() if name in sizes)


def schedule_of(setup: Setup, axes: tuple[tuple[str, str, int], ...]) -> Schedule | None:
    """Give the backend's schedule with some axes changed; None when none is."""
    if not axes:
        return None
    schedule = default_schedule(setup.backend, setup.target, setup.spec)
    for kernel, axis, value in axes:
        schedule = schedule.changed({kernel: {axis: value}})
    return schedule


def values_of(settings: tuple[tuple[str, Value], ...]) -> Mapping[str, Value]:
    """Give the hyper-parameters of repeated --set options; the last of a name holds."""
    return dict(settings)


def shape_option(text: str, *, required: bool = False) -> Callable[[F], F]:
    """Give the option --shape with its help."""
    return click.option("--shape", type=Shape(), required=required, metavar=Shape.name, help=text)


def _stacked(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


as_json = click.option("--json", "json_", is_flag=True, help="Print JSON.")

pattern_argument = _stacked(
    click.argument("pattern"),
    click.option(
        "--set",
        "settings",
        type=Setting(),
        multiple=True,
        help="A hyper-parameter; may be repeated.",
    ),
)

dim_option = click.option(
    "--dim",
    "own",
    type=Size(),
    multiple=True,
    metavar=Size.name,
    help="The size of a dim that the pattern named; may be repeated.",
)

dtype_option = click.option(
    "--dtype", type=Dtype(), default="bf16", show_default=True, metavar=Dtype.name
)

phase_option = click.option(
    "--phase", type=click.Choice(PHASES), default="prefill", show_default=True
)

lowering_options = _stacked(
    click.option("--order", type=click.Choice(ORDERS), help="Insist on a loop order of prefill."),
    click.option("--target", default="sm90", show_default=True, help="The chip to lower for."),
    dtype_option,
    click.option("--head-dim", type=click.IntRange(1), default=128, show_default=True),
    click.option("--value-dim", type=click.IntRange(1), help="Default: the head dimension."),
    dim_option,
    click.option(
        "--axis", "axes", type=Axis(), multiple=True, help="A schedule axis; may be repeated."
    ),
)
