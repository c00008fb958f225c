"""A chart of numbers over a number, as one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Curve = Sequence[tuple[float, Mapping[str, Any]]]
"""(x, `summary` of the values there), by growing x."""


def write_chart(path: Path, curves: Mapping[str, Curve], *, title: str, x: str, y: str) -> None:
    """Draws a line for each curve, with standard deviations over seeds as bars.

    Args:
        path: of the file; its folder is made.
        curves: by name.
        title: what is shown.
        x: name of the horizontal axis.
        y: of the vertical one.
    """
    import plotly.graph_objects as go

    figure = go.Figure(
        [
            go.Scatter(
                x=[at for at, _ in curve],
                y=[value["mean"] for _, value in curve],
                error_y={"type": "data", "array": [value["std"] for _, value in curve]},
                name=who.replace("_", " "),
                mode="lines+markers",
            )
            for who, curve in curves.items()
        ]
    )
    figure.update_layout(title=title, xaxis={"title": x}, yaxis={"title": y}, template="plotly_white")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(figure.to_html(include_plotlyjs=True, config={"displayModeBar": False}))
