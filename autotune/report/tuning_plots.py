"""The plots of a tuning: its candidates by kernel, speed against fidelity, predicted and measured.

Colour means the status of a candidate, in every plot."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from spcomp.autotune.record import Row, Tuning
from spcomp.autotune.report.plots import Plot, finished
from spcomp.autotune.report.tuning_tables import changed, is_timed, time_of

COLOURS = {"best": "#2a9d6e", "ok": "#3b7dd8", "wrong": "#c0392b"}
RIGHT = ("best", "ok")


def plots(tunings: Sequence[Tuning]) -> tuple[Plot, ...]:
    """Draw what the tunings hold; a plot without points is left out."""
    found = [_candidates(tuning, place) for place, tuning in enumerate(tunings)]
    if sum(tuning.kept is not None for tuning in tunings) > 1:
        found.append(_fidelity(tunings))
    if any(is_timed(tuning) for tuning in tunings):
        found.append(_model(tunings))
    return tuple(found)


def _candidates(tuning: Tuning, place: int) -> Plot:
    rows = [row for row in tuning.rows if row.status in RIGHT]
    figure = go.Figure()
    for status in RIGHT:
        some = [row for row in rows if row.status == status]
        figure.add_scatter(
            x=[time_of(row) for row in some],
            y=[_kernel(row) for row in some],
            mode="markers",
            name=status,
            marker={"color": COLOURS[status], "size": 13 if status == "best" else 8},
            hovertext=[_named(row) for row in some],
            hovertemplate="%{hovertext}<br>%{x:.4f} ms<extra></extra>",
        )  # fmt: skip
    kind = "measured" if is_timed(tuning) else "predicted"
    figure.update_layout(
        xaxis={"title": f"ms, {kind}", "rangemode": "tozero"},
        yaxis={"type": "category"},
    )
    caption = f"{len(rows)} right candidates, by the kernel whose axes differ from the default."
    return finished(figure, f"candidates-{place}", f"Candidates of {tuning.call.pattern}", caption)


def _fidelity(tunings: Sequence[Tuning]) -> Plot:
    shown = [one for one in tunings if one.kept is not None and one.best is not None]
    figure = go.Figure()
    figure.add_scatter(
        x=[time_of(one.best) for one in shown if one.best is not None],
        y=[one.kept.mass_mean for one in shown if one.kept is not None],
        text=[one.call.pattern for one in shown],
        mode="markers+text",
        textposition="top center",
        marker={"color": COLOURS["best"], "size": 12},
        hovertemplate="%{text}<br>%{x:.4f} ms<br>%{y:.2%} kept<extra></extra>",
    )
    figure.update_layout(
        xaxis={"title": "ms of the best schedule", "rangemode": "tozero"},
        yaxis={"title": "attention kept", "tickformat": ".0%"},
        showlegend=False,
    )
    words = "Each meaning with its best schedule: left is faster, up keeps more of dense attention."
    return finished(figure, "fidelity", "Speed and fidelity", words)


def _model(tunings: Sequence[Tuning]) -> Plot:
    rows = [row for one in tunings for row in one.rows if row.median_ms is not None]
    rows = [row for row in rows if row.predicted_ms is not None]
    most = max((time_of(row) for row in rows), default=1.0)
    figure = go.Figure()
    line = {"dash": "dot", "color": "#888888"}
    figure.add_scatter(x=[0, most], y=[0, most], mode="lines", name="as predicted", line=line)
    figure.add_scatter(
        x=[row.predicted_ms for row in rows],
        y=[row.median_ms for row in rows],
        mode="markers",
        name="measured",
        marker={"color": COLOURS["ok"], "size": 8},
        hovertext=[changed(row.candidate) for row in rows],
        hovertemplate="%{hovertext}<br>predicted %{x:.4f} ms, measured %{y:.4f} ms<extra></extra>",
    )
    figure.update_layout(
        xaxis={"title": "ms, predicted", "rangemode": "tozero"},
        yaxis={"title": "ms, measured", "rangemode": "tozero"},
    )
    words = "The cost model is a floor: it knows no latency, and no difference of warps or stages."
    return finished(figure, "model", "Predicted and measured", words)


def _named(row: Row) -> str:
    return f"{row.candidate.order or 'chosen'}<br>{changed(row.candidate)}"


def _kernel(row: Row) -> str:
    kernels = " + ".join(kernel for kernel, _ in row.candidate.axes) or "default"
    return kernels if row.candidate.order is None else f"{row.candidate.order}: {kernels}"
