"""The plots of a report: plotly figures as JSON, and block maps as rectangles.

Colour always means the block size, in every plot. The figures carry no colour of text, grid or
ground: the page sets those from its own light or dark theme.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import plotly.graph_objects as go

from spcomp.autotune.report.record import BlockMap, ReportRecord, Row
from spcomp.autotune.report.tables import named, ordered, percent

BLOCK_COLOURS = {64: "#3b7dd8", 128: "#c86a14", 256: "#2a9d6e"}
"""Told apart by the colour-blind, and of contrast 3:1 or more on the light and the dark ground."""

OTHER_COLOUR = "#8a63c4"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "cross")


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure: its place on the page, what it shows in words, and plotly's JSON."""

    name: str
    title: str
    caption: str
    spec: str


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring cells of one kind in one row of a block map, in cells."""

    x: int
    y: int
    width: int
    kind: str


@dataclass(frozen=True, slots=True)
class MapPicture:
    """A block map to draw, and its words for those who do not see it."""

    title: str
    words: str
    width: int
    height: int
    runs: tuple[Run, ...]


def plots(record: ReportRecord) -> tuple[Plot, ...]:
    """Draw recall and perplexity against budget, and speed against block size."""
    if not record.rows:
        return ()
    found = [_recall(record)]
    if any(row.perplexity is not None for row in record.rows):
        found.append(_perplexity(record))
    if any(row.timing is not None for row in record.rows):
        found.append(_speed(record))
    return tuple(found)


def map_picture(block_map: BlockMap) -> MapPicture:
    """Turn a block map into runs of equal cells; empty ones are left out."""
    runs: list[Run] = []
    for y, row in enumerate(block_map.cells):
        x = 0
        for kind, same in groupby(row):
            width = len(list(same))
            if kind:
                runs.append(Run(x, y, width, ("", "partial", "full")[kind]))
            x += width
    cells = [cell for row in block_map.cells for cell in row]
    shown = sum(1 for cell in cells if cell)
    return MapPicture(
        title=f"layer {block_map.layer}, head {block_map.head}",
        words=(
            f"{block_map.pattern}, block {block_map.block}, budget {percent(block_map.budget)}: "
            f"{shown} of {len(cells)} blocks visible"
        ),
        width=len(block_map.cells[0]) if block_map.cells else 0,
        height=len(block_map.cells),
        runs=tuple(runs),
    )


def _recall(record: ReportRecord) -> Plot:
    figure = go.Figure()
    for series in _series(record):
        for is_mean in (True, False):
            values = [row.mass.mean if is_mean else row.mass.p5 for row in series]
            what = "mean" if is_mean else "5th percentile of rows"
            _add_series(figure, record, series, values, what, is_faint=not is_mean)
    _budget_axis(figure)
    figure.update_yaxes(title="attention mass kept", tickformat=".0%", range=[0, 1.03])
    return finished(
        figure,
        "recall",
        "Recall against budget",
        "Share of the dense attention probability that the pattern keeps: solid lines the mean "
        "over all rows, heads and layers, dotted lines the 5th percentile of rows.",
    )


def _perplexity(record: ReportRecord) -> Plot:
    figure = go.Figure()
    for series in _series(record):
        with_figure = [row for row in series if row.perplexity is not None]
        values = [row.perplexity for row in with_figure]
        if with_figure:
            _add_series(figure, record, with_figure, values, "perplexity", is_faint=False)
    shown = [y for trace in figure.data for y in trace.y]
    words = _add_dense(figure, record)
    _budget_axis(figure)
    # One pattern that fails must not press all others onto one line.
    is_wide = max(shown) > 1.5 * min(shown)
    figure.update_yaxes(
        title="perplexity (less is better)", type="log" if is_wide else "linear", nticks=8
    )
    return finished(
        figure,
        "perplexity",
        "Perplexity against budget",
        f"Perplexity of the first {record.subject.perplexity_tokens} tokens of the text with the "
        f"attention of every layer replaced.{words}",
    )


def _add_dense(figure: Any, record: ReportRecord) -> str:
    """Draw the dense perplexity across the plot, if it is known, and say so."""
    dense = record.dense.perplexity
    if dense is None:
        return ""
    budgets = [row.budget for row in record.rows]
    figure.add_scatter(
        x=[min(budgets), max(budgets)],
        y=[dense, dense],
        mode="lines",
        name=f"dense, {dense:.3f}",
        line={"dash": "dash", "width": 1.5, "color": "#888888"},
        hoverinfo="skip",
    )
    return " The dashed line is the model with its own dense attention."


def _speed(record: ReportRecord) -> Plot:
    """Bars by block size; a pattern timed at one block size alone has no place here."""
    timed = [row for row in ordered(record.rows) if row.timing is not None]
    blocks: dict[str, set[int | None]] = {}
    for row in timed:
        blocks.setdefault(row.pattern, set()).add(row.block)
    shown = [row for row in timed if len(blocks[row.pattern]) > 1] or timed
    patterns = _names(shown)
    budgets = list(dict.fromkeys((row.pattern, row.budget) for row in shown))
    figure = go.Figure()
    for pattern, budget in budgets:
        rows = [row for row in shown if (row.pattern, row.budget) == (pattern, budget)]
        label = percent(budget) if pattern == patterns[0] else f"{pattern}<br>{percent(budget)}"
        figure.add_bar(
            x=[_block_label(row) for row in rows],
            y=[row.timing.vs_dense for row in rows if row.timing is not None],
            text=[label] * len(rows),
            textposition="outside",
            constraintext="none",
            textfont={"size": 11},
            cliponaxis=False,
            marker={
                "color": [_colour(row.block) for row in rows],
                "opacity": 1.0 - 0.6 * budget,
            },
            showlegend=False,
            hovertemplate=f"{pattern}, %{{x}}, {percent(budget)}: %{{y:.2f}}×<extra></extra>",
        )
    figure.add_hline(y=1.0, line={"dash": "dash", "width": 1.5, "color": "#888888"})
    order = list(dict.fromkeys(map(_block_label, sorted(shown, key=lambda row: row.block or 0))))
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=order)
    kinds = sorted({row.timing.kind for row in shown if row.timing is not None})
    places = sorted({row.timing.where for row in shown if row.timing is not None})
    figure.update_yaxes(title=f"times faster than dense ({', '.join(kinds)})", rangemode="tozero")
    return finished(
        figure,
        "speed",
        f"Speed against block size, {' and '.join(kinds)}",
        f"One layer's forward over {record.priced}, {' and '.join(kinds)} for "
        f"{', '.join(places)}. Bars are {patterns[0]} at the budget over them unless another "
        "pattern is named; the dashed line is dense attention.",
    )


def _series(record: ReportRecord) -> list[list[Row]]:
    rows = ordered(record.rows)
    keys = dict.fromkeys((row.pattern, row.block) for row in rows)
    return [[row for row in rows if (row.pattern, row.block) == key] for key in keys]


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.pattern for row in rows))


def _add_series(
    figure: Any,
    record: ReportRecord,
    rows: list[Row],
    values: list[Any],
    what: str,
    *,
    is_faint: bool,
) -> None:
    pattern, block = rows[0].pattern, rows[0].block
    place = _names(ordered(record.rows)).index(pattern)
    form = "%{y:.2%}" if what != "perplexity" else "%{y:.3f}"
    figure.add_scatter(
        x=[row.budget for row in rows],
        y=values,
        mode="markers" if len(rows) == 1 else "lines+markers",
        name=named(pattern, block),
        legendgroup=named(pattern, block),
        showlegend=not is_faint,
        line={"color": _colour(block), "width": 2, "dash": "dot" if is_faint else "solid"},
        marker={
            "color": _colour(block),
            "size": 6 if is_faint else 8,
            "symbol": SYMBOLS[place % len(SYMBOLS)] + ("-open" if is_faint else ""),
        },
        customdata=[[percent(row.budget), percent(row.density)] for row in rows],
        hovertemplate=(
            f"{named(pattern, block)}<br>budget %{{customdata[0]}}, density %{{customdata[1]}}"
            f"<br>{what}: {form}<extra></extra>"
        ),
    )


def _budget_axis(figure: Any) -> None:
    budgets = sorted({x for trace in figure.data for x in trace.x})
    figure.update_xaxes(
        type="log", title="budget", tickvals=budgets, ticktext=[percent(x) for x in budgets]
    )


def _block_label(row: Row) -> str:
    return "no block" if row.block is None else f"block {row.block}"


def _colour(block: int | None) -> str:
    return OTHER_COLOUR if block is None else BLOCK_COLOURS.get(block, OTHER_COLOUR)


def finished(figure: Any, name: str, title: str, caption: str, height: int = 400) -> Plot:
    """Give a figure the layout all plots share, and turn it into JSON; height in pixels."""
    figure.update_layout(
        height=height,
        margin={"l": 64, "r": 16, "t": 32, "b": 48},
        # At the foot, since plotly's buttons stand at the head.
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="closest",
        template="none",
    )
    figure.update_yaxes(title_standoff=12)  # else the title lies on wide tick labels
    # The text stands in a script element, which ends at the first "</script" whatever holds it.
    spec = figure.to_json().replace("<", "\\u003c")
    return Plot(name, title, caption, spec)
