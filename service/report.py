"""The report of a job: one self-contained HTML page and one PNG, from plain data."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

PIXELS = 96  # side of a picture in the PNG
GAP, LABEL = 6, 22
VERSIONS = ("manta", "ray", "torch", "timm")


def write_report(
    folder: Path,
    *,
    job: dict[str, Any],
    curve: Sequence[dict[str, Any]],
    pictures: Sequence[dict[str, bytes]],
    card: dict[str, Any],
    summary: dict[str, Any],
) -> tuple[Path, Path]:
    """Writes `report.html` and `report.png`.

    Args:
        folder: where to.
        job: the answer of GET /v1/jobs/{id}.
        curve: its points.
        pictures: of each image, what the method draws, by kind, as PNG.
        card: of the artifact.
        summary: further numbers of the run.
    """
    import jinja2

    sheet = contact_sheet(pictures)
    columns = list(dict.fromkeys(who for result in job["evaluations"] for who in result["results"]))
    template = (Path(__file__).parent / "web" / "report.html").read_text()
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template)
    html = page.render(
        job=job,
        card=card,
        columns=columns,
        rows=[_row(result, columns) for result in job["evaluations"]],
        summary=summary,
        curve=_curve(curve),
        picture=base64.b64encode(sheet).decode() if pictures else "",
        spec=yaml.safe_dump(job["spec"], sort_keys=False),
        versions=", ".join([f"Python {platform.python_version()}", *(f"{v} {_version(v)}" for v in VERSIONS)]),
    )
    (folder / "report.html").write_text(html)
    (folder / "report.png").write_bytes(sheet)
    return folder / "report.html", folder / "report.png"


def _version(name: str) -> str:
    return importlib.metadata.version(name)


def _row(result: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    results = result["results"]
    first = min if result["metric"] == "distance" else max
    best = first(value["mean"] for value in results.values())
    cells = [
        {
            "text": f"{r['mean']:.3f} ± {r['std']:.3f}" if (r := results.get(who)) else "–",
            "best": bool(r) and r["mean"] == best,
        }
        for who in columns
    ]
    return {"label": result["label"], "cells": cells, "seeds": max(len(value["seeds"]) for value in results.values())}


def _curve(points: Sequence[dict[str, Any]]) -> str:
    """The loss over steps; plotly's script is inside, so the page needs no network."""
    import plotly.graph_objects as go

    steps = [point["step"] for point in points]
    figure = go.Figure(
        [
            go.Scatter(x=steps, y=[point["loss"] for point in points], name="loss", line={"color": "#1f6feb"}),
            go.Scatter(
                x=steps,
                y=[point["lr"] for point in points],
                name="learning rate",
                yaxis="y2",
                line={"color": "#d08700"},
            ),
        ]
    )
    figure.update_layout(
        height=360,
        margin={"l": 50, "r": 60, "t": 10, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#7a8599"},
        xaxis={"title": "step", "gridcolor": "rgba(128,128,128,.2)"},
        yaxis={"title": "loss", "gridcolor": "rgba(128,128,128,.2)"},
        yaxis2={"title": "learning rate", "overlaying": "y", "side": "right", "showgrid": False},
        legend={"orientation": "h", "y": 1.1},
    )
    html: str = figure.to_html(full_html=False, include_plotlyjs=True, config={"displayModeBar": False})
    return html


def contact_sheet(pictures: Sequence[dict[str, bytes]]) -> bytes:
    """A PNG with a row for each kind of picture and a column for each image."""
    from PIL import Image, ImageDraw

    kinds = list(pictures[0]) if pictures else []
    width = len(pictures) * (PIXELS + GAP) + GAP
    sheet = Image.new("RGB", (max(width, 1), max(len(kinds) * (PIXELS + GAP + LABEL), 1)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, kind in enumerate(kinds):
        top = y * (PIXELS + GAP + LABEL)
        draw.text((GAP, top + 5), kind, fill="black")
        for x, row in enumerate(pictures):
            image = Image.open(io.BytesIO(row[kind])).convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.NEAREST)
            sheet.paste(image, (GAP + x * (PIXELS + GAP), top + LABEL))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()
