"""The command line: `spcomp list, show, compile, check, explain, tune, bench,
report, calibrate, cache, doctor`.

Results go to stdout, progress and errors to stderr. Exit codes: 0 fine, 1 a check failed or a plan
was refused, 2 the command was used wrongly.
"""

from __future__ import annotations

from typing import Any

import click

from spcomp.cli.bench import bench
from spcomp.cli.cache import cache
from spcomp.cli.calibrate import calibrate
from spcomp.cli.check import check
from spcomp.cli.compile_files import compile_files
from spcomp.cli.doctor import doctor
from spcomp.cli.explain import explain
from spcomp.cli.list_patterns import list_patterns
from spcomp.cli.report import report
from spcomp.cli.show import show
from spcomp.cli.tune import tune
from spcomp.errors import (
    BadSetting,
    HeadsDoNotDivide,
    NegativeCount,
    NoSuchEntry,
    NotANumber,
    NothingToTune,
    SpcompError,
    UnknownBackend,
    UnknownChoice,
    UnknownPattern,
    UnknownTarget,
    WrongArguments,
)
from spcomp.version import VERSION

USED_WRONGLY = (
    BadSetting,
    HeadsDoNotDivide,
    NegativeCount,
    NoSuchEntry,
    NotANumber,
    NothingToTune,
    UnknownBackend,
    UnknownChoice,
    UnknownPattern,
    UnknownTarget,
    WrongArguments,
)


class _Commands(click.Group):
    """Commands whose errors print as their text, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SpcompError as error:
            click.echo(str(error), err=True)
            ctx.exit(2 if isinstance(error, USED_WRONGLY) else 1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, message="spcomp %(version)s")
def main() -> None:
    """Compile sparse-attention patterns.

    PATTERN is the name of a shipped pattern (`spcomp list`), a function of a file as in
    ./mine.py:my_pattern, or a file of IR text ending in .ir.
    """


for _command in (
    list_patterns,
    show,
    compile_files,
    check,
    explain,
    tune,
    bench,
    report,
    calibrate,
    cache,
    doctor,
):
    main.add_command(_command)
