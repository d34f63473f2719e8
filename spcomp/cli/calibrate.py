"""`spcomp calibrate`: what a pattern needs chosen once a model, from a sample of its layers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from spcomp.calibrate import minference as search
from spcomp.calibrate.samples import read_sample
from spcomp.cli.options import as_json
from spcomp.cli.output import print_json, print_table, say


@click.group(short_help="Choose what a pattern needs chosen once a model.")
def calibrate() -> None:
    """Choose, from what a model's layers attend to, what a pattern takes from a file."""


@calibrate.command(short_help="The shape of each head, for `minference`.")
@click.option(
    "--sample", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
    help="torch.save of a list over layers of {'q', 'k', 'v'}, after rotation, of a long prompt.",
)  # fmt: skip
@click.option(
    "--by", type=click.Choice(("output", "mass")), default="output", show_default=True,
    help="The least error of the output, or the most attention kept.",
)  # fmt: skip
@click.option(
    "--rows-from", type=click.IntRange(0), default=0, show_default=True,
    help="The first query row that counts.",
)  # fmt: skip
@click.option(
    "-o", "--output", "target", type=click.Path(dir_okay=False, path_type=Path), required=True,
    help="Where the configuration goes.",
)  # fmt: skip
@as_json
def minference(sample: Path, by: Any, rows_from: int, target: Path, json_: bool) -> None:
    """Try the paper's shapes for each head and write the file that MInference reads.

    The file also runs here: spcomp.calibrate.minference.load(FILE, ...).layer(n).
    """
    layers = []
    for number, tensors in enumerate(read_sample(sample)):
        layers.append(search.search(*tensors, by=by, rows_from=rows_from))
        say(f"layer {number} done")
    found = search.Configuration(tuple(layers))
    try:
        found.save(target)
    except OSError as error:
        raise click.BadParameter(
            f"cannot write {target}: {error.strerror}.", param_hint="-o"
        ) from None
    say(f"wrote {target}")
    rows = [_row(number, heads, by) for number, heads in enumerate(layers)]
    if json_:
        print_json(rows)
    else:
        columns = ("layer", *search.TYPES, f"worst {by}", "of head")
        print_table(columns, [list(row.values()) for row in rows], numbers_from=0)


def _row(number: int, heads: tuple[search.Entry, ...], by: str) -> dict[str, Any]:
    """Count the types of one layer, and name its worst head."""
    types = Counter(entry.type for entry in heads)
    pick = max if by == "output" else min
    worst = pick(range(len(heads)), key=lambda head: heads[head].score)
    return {
        "layer": number,
        **{name: types[name] for name in search.TYPES},
        "worst": round(heads[worst].score, 4),
        "head": worst,
    }
