"""A chart of numbers over a number: plain data, its figure, and a file of its own that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict


class Chart(TypedDict):
    """What is drawn, as results keep it.

    Attributes:
        title: of all.
        x: name of the horizontal axis.
        y: of the vertical one.
        curves: by name, (x, `mean` and `std` there) by growing x.
    """

    title: str
    x: str
    y: str
    curves: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]]


def figure(chart: Chart) -> Any:
    """A plotly figure: a line for each curve, standard deviations over seeds as bars."""
    import plotly.graph_objects as go

    lines = [
        go.Scatter(
            x=[at for at, _ in curve],
            y=[value["mean"] for _, value in curve],
            error_y={"type": "data", "array": [value["std"] for _, value in curve]},
            name=who.replace("_", " "),
            mode="lines+markers",
        )
        for who, curve in chart["curves"].items()
    ]
    axes = {"xaxis": {"title": chart["x"]}, "yaxis": {"title": chart["y"]}}
    return go.Figure(lines).update_layout(title=chart["title"], showlegend=True, **axes)


def write_chart(path: Path, chart: Chart) -> None:
    """Writes the figure as one HTML file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page = figure(chart).update_layout(template="plotly_white")
    path.write_text(page.to_html(include_plotlyjs=True, config={"displayModeBar": False}))
