"""The plots of a tuning: its candidates by axis, speed against fidelity, predicted and measured.

Colour means the status of a candidate; where meanings are compared, it means the meaning."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import plotly.graph_objects as go

from spcomp.autotune.record import RIGHT, Row, Tuning
from spcomp.autotune.report.plots import Plot, finished
from spcomp.autotune.report.tables import percent
from spcomp.autotune.report.tuning_facts import (
    changed,
    default_of,
    is_timed,
    leaves_out,
    ms,
    ordered,
    setting_of,
    time_of,
)

COLOURS = {"best": "#2a9d6e", "ok": "#3b7dd8"}
MEANINGS = ("#3b7dd8", "#c86a14", "#2a9d6e", "#8a63c4", "#b5485d", "#7a7d1f")
GREY = "#888888"
ROW_PX = 24
FRAME_PX = 130
LEAST_PX = 240
MOST_LETTERS = 48


def plots(tunings: Sequence[Tuning]) -> tuple[Plot, ...]:
    """Draw what the tunings hold; a plot without points is left out."""
    shown = [one for one in tunings if one.best and math.isfinite(time_of(one.best))]
    found = [_candidates(one, place) for place, one in enumerate(shown)]
    if any(leaves_out(one) for one in shown):
        found.append(_fidelity(shown))
    if any(is_timed(one) for one in shown):
        found.append(_model(shown))
    return tuple(found)


def _candidates(tuning: Tuning, place: int) -> Plot:
    """Draw a dot for each right candidate and each axis that it sets: a line is a value of it."""
    right = [row for row in ordered(tuning.rows) if row.status in RIGHT]
    lines = _lines([row for row in right if math.isfinite(time_of(row))])
    figure = go.Figure()
    for status in ("ok", "best"):  # the best one lies on top
        dots = [(name, row) for name, rows in lines.items() for row in rows if row.status == status]
        figure.add_scatter(
            x=[time_of(row) for _, row in dots],
            y=[name for name, _ in dots],
            mode="markers",
            name=status,
            marker={
                "color": COLOURS[status],
                "size": 12 if status == "best" else 8,
                "opacity": 1.0 if status == "best" else 0.7,
            },
            hovertext=[_hover(row) for _, row in dots],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    default = default_of(tuning)
    if default is not None and default.status in RIGHT:
        _add_default(figure, time_of(default), list(lines))
    kind = "measured" if is_timed(tuning) else "predicted"
    figure.update_xaxes(title=f"ms, {kind}")
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=list(lines)[::-1], dtick=1
    )
    caption = (
        f"The {len(right)} right ones of {len(tuning.rows)} candidates, {kind}. Each line is one "
        "value of an axis; a candidate has a dot on the line of every axis it sets."
    )
    height = max(LEAST_PX, FRAME_PX + ROW_PX * len(lines))
    title = f"Candidates of {tuning.call.pattern}"
    return finished(figure, f"candidates-{place}", title, caption, height=height)


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Sort rows by the loop order and the axis values they set. An axis of one value has no line:
    it parts nothing; and so has a loop order where only one was looked at."""
    values: dict[tuple[str, str], dict[Any, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for kernel, axis, value in _settings(row):
            values[kernel, axis][value].append(row)
    several = {key: found for key, found in values.items() if len(found) > 1}
    lines = {
        f"{kernel} {axis} = {value}".strip(): found[value]
        for (kernel, axis), found in sorted(several.items())
        for value in sorted(found)
    }
    shown = {id(row) for found in lines.values() for row in found}
    others: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if id(row) not in shown:
            kernels = " + ".join(kernel for kernel, _ in row.candidate.axes)
            others[kernels or "default"].append(row)
    return {**others, **lines}


def _settings(row: Row) -> Iterator[tuple[str, str, Any]]:
    yield "", "order", row.candidate.order or "chosen"
    for kernel, axes in row.candidate.axes:
        for axis, value in axes:
            yield kernel, axis, value


def _add_default(figure: Any, default_ms: float, names: list[str]) -> None:
    """Draw the time of the default schedule down the whole plot; it sets no axis itself."""
    figure.add_scatter(
        x=[default_ms] * len(names),
        y=names,
        mode="lines",
        name=f"default, {ms(default_ms)} ms",
        line={"dash": "dash", "width": 1.5, "color": GREY},
        hoverinfo="skip",
    )


def _fidelity(tunings: Sequence[Tuning]) -> Plot:
    figure = go.Figure()
    for place, tuning in enumerate(tunings):
        if tuning.best is None or tuning.kept is None:
            continue
        shares = (percent(tuning.kept.mass_p5), percent(tuning.kept.density))
        figure.add_scatter(
            x=[time_of(tuning.best)],
            y=[tuning.kept.mass_mean],
            mode="markers",
            name=_short(setting_of(tuning)),
            marker={"color": MEANINGS[place % len(MEANINGS)], "size": 13},
            hovertemplate=(
                f"{setting_of(tuning)}<br>%{{x:.4f}} ms<br>%{{y:.2%}} kept, 5th percentile "
                f"{shares[0]}<br>density {shares[1]}<extra></extra>"
            ),
        )
    dense = next((one.dense_ms for one in tunings if one.dense_ms), None)
    if dense is not None:
        figure.add_scatter(
            x=[dense],
            y=[1.0],
            mode="markers",
            name="dense",
            marker={"color": GREY, "size": 12, "symbol": "diamond"},
            hovertemplate="dense attention<br>%{x:.4f} ms<extra></extra>",
        )
    kind = "measured" if all(is_timed(one) for one in tunings) else "predicted"
    figure.update_layout(
        xaxis={"title": f"ms of the best schedule, {kind}", "rangemode": "tozero"},
        yaxis={"title": "attention mass kept", "tickformat": ".1%"},
        showlegend=True,
    )
    words = (
        "A meaning with its best schedule: left is faster, up keeps more of dense attention's "
        "probability."
    )
    return finished(figure, "fidelity", "Speed and fidelity", words)


def _model(tunings: Sequence[Tuning]) -> Plot:
    held = [[r for r in one.rows if None not in (r.median_ms, r.predicted_ms)] for one in tunings]
    most = max((time_of(row) for rows in held for row in rows), default=1.0)
    figure = go.Figure()
    line = {"dash": "dot", "color": GREY}
    figure.add_scatter(
        x=[0, most], y=[0, most], mode="lines", name="as predicted", line=line, hoverinfo="skip"
    )
    for place, (tuning, rows) in enumerate(zip(tunings, held, strict=True)):
        figure.add_scatter(
            x=[row.predicted_ms for row in rows],
            y=[row.median_ms for row in rows],
            mode="markers",
            name=_short(setting_of(tuning)),
            marker={"color": MEANINGS[place % len(MEANINGS)], "size": 8, "opacity": 0.7},
            hovertext=[_hover(row) for row in rows],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    figure.update_layout(
        xaxis={"title": "ms, predicted", "rangemode": "tozero"},
        yaxis={"title": "ms, measured", "rangemode": "tozero"},
        showlegend=True,
    )
    words = (
        "Every timed candidate. The cost model is a floor: it knows no latency, and no difference "
        "of warps or stages."
    )
    return finished(figure, "model", "Predicted and measured", words)


def _short(name: str) -> str:
    """Cut a name that a legend has no room for; the tables have it whole."""
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"


def _hover(row: Row) -> str:
    """Write all that is known of a right candidate, a line each."""
    spread = "" if row.spread_ms is None else f" ± {ms(row.spread_ms / 2)}"
    facts = [
        f"{row.status}, {row.rung}, loop order {row.candidate.order or 'chosen'}",
        *changed(row.candidate).split("; "),
        "" if row.median_ms is None else f"measured {ms(row.median_ms)}{spread} ms",
        f"predicted {ms(row.predicted_ms)} ms",
        "" if row.error is None else f"error {row.error:.1e}",
        "" if row.spill_bytes is None else f"{row.spill_bytes} bytes spilled",
    ]
    return "<br>".join(fact for fact in facts if fact)
