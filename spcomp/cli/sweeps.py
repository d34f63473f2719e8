"""A pattern with hyper-parameters of several values: `--set block=64,128,256`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import click

from spcomp.cli.options import ParamType, Setting
from spcomp.cli.patterns import Value

Sweep: TypeAlias = Value | tuple[Value, ...]
F = TypeVar("F", bound=Callable[..., Any])


class SweepSetting(ParamType):
    """name=value or name=value,value."""

    name = "NAME=VALUE[,VALUE...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Sweep]:
        """Read each value as `--set` of the other commands does."""
        if isinstance(value, tuple):
            return value
        name, separator, text = value.partition("=")
        if not separator:
            self.fail(f"{value!r} is not of the form name=value or name=value,value.", param, ctx)
        one = Setting()
        values = tuple(one.convert(f"{name}={part}", param, ctx)[1] for part in text.split(","))
        return name, values if len(values) > 1 else values[0]


def swept_argument(function: F) -> F:
    """Add PATTERN and --set with several values."""
    option = click.option(
        "--set",
        "settings",
        type=SweepSetting(),
        multiple=True,
        help="A hyper-parameter; several values are tried one by one. May be repeated.",
    )
    return click.argument("pattern")(option(function))
