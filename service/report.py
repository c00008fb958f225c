"""The report of a job: one self-contained HTML page, from plain data."""

from __future__ import annotations

import base64
import importlib.metadata
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from workloads.chart import Chart, figure
from workloads.record import online_names

VERSIONS = ("manta", "ray", "torch", "timm")


def page(
    *,
    job: dict[str, Any],
    points: Sequence[dict[str, Any]],
    online: Sequence[dict[str, Any]],
    paper: str,
    parameters: int | None,
    sheet: bytes | None,
    summary: Mapping[str, Any],
) -> str:
    """The report of a job in any state, with what is there so far.

    Args:
        job: the answer of GET /v1/jobs/{id}.
        points: of its curve.
        online: results of evaluations of checkpoints.
        paper: of the method.
        parameters: of the exported network; None before it is.
        sheet: a PNG of what the method draws; None where it does not.
        summary: further numbers: `predict_accuracy`.
    """
    results = job["evaluations"]
    columns = list(dict.fromkeys(who for result in results for who in result["results"] if "=" not in who))
    charts: list[Chart] = [result["chart"] for result in results if "chart" in result]
    if online:
        charts.insert(0, _checkpoints(online))
    return render(
        job=job,
        paper=paper,
        parameters=parameters,
        columns=columns,
        rows=[_row(result, columns) for result in results],
        summary=summary,
        curve=("Loss", html_of(_loss(points), with_script=True)),
        charts=[(chart["title"], html_of(figure(chart).update_layout(title=None))) for chart in charts],
        picture=base64.b64encode(sheet).decode() if sheet else "",
    )


def render(**of_page: Any) -> str:
    """The template with what differs; `job`, `paper`, `parameters` and `curve` (title, HTML) are always given."""
    import jinja2

    template = (Path(__file__).parent / "web" / "report.html").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    empty: dict[str, Any] = {"columns": [], "rows": [], "charts": [], "picture": "", "summary": {}, "facts": []}
    versions = ", ".join([f"Python {platform.python_version()}", *(f"{v} {_version(v)}" for v in VERSIONS)])
    spec = yaml.safe_dump(of_page["job"]["spec"], sort_keys=False)
    return environment.from_string(template).render(empty | {"spec": spec, "versions": versions} | of_page)


def _version(name: str) -> str:
    return importlib.metadata.version(name)


def _row(result: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    results = result["results"]
    first = min if result["metric"] == "distance" else max
    best = first(results[who]["mean"] for who in columns if who in results)
    cells = [
        {"text": _cell(r), "best": r["mean"] == best} if (r := results.get(who)) else {"text": "–", "best": False}
        for who in columns
    ]
    seeds = max(len(value["seeds"]) for value in results.values())
    return {"label": result["label"], "metric": result["metric"], "cells": cells, "seeds": seeds}


def _checkpoints(online: Sequence[dict[str, Any]]) -> Chart:
    """A curve over steps for each entry of `evaluate` that looks at checkpoints."""
    names = online_names(online)
    curves: defaultdict[str, list[tuple[float, dict[str, Any]]]] = defaultdict(list)
    for result in online:
        curves[names[result["entry"]]].append((result["step"], result))
    metrics = " or ".join(dict.fromkeys(result["metric"] for result in online))
    return {"title": "Evaluations of checkpoints", "x": "step", "y": metrics, "curves": curves}


def _cell(value: dict[str, Any]) -> str:
    return f"{value['mean']:.3f}" + (f" ± {value['std']:.3f}" if len(value["seeds"]) > 1 else "")


def _loss(points: Sequence[dict[str, Any]]) -> Any:
    import plotly.graph_objects as go

    steps = [point["step"] for point in points]
    loss = go.Scatter(x=steps, y=[point["loss"] for point in points], name="loss", line={"color": "#1f6feb"})
    lr = go.Scatter(x=steps, y=[p["lr"] for p in points], name="learning rate", yaxis="y2", line={"color": "#d08700"})
    return go.Figure([loss, lr]).update_layout(
        xaxis={"title": "step"},
        yaxis={"title": "loss"},
        yaxis2={
            "title": "learning rate",
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
            "rangemode": "tozero",
            "tickmode": "auto",
            "tickformat": ".2~e",
        },
    )


def html_of(drawn: Any, *, with_script: bool = False) -> str:
    """The figure as a part of the page; plotly's script is inside it once, so the page needs no network."""
    grid = {"gridcolor": "rgba(128,128,128,.2)"}
    drawn.update_layout(
        height=360,
        margin={"l": 50, "r": 60, "t": 10, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#7a8599"},
        legend={"orientation": "h", "y": 1.1},
        xaxis=grid,
        yaxis=grid,
    )
    html: str = drawn.to_html(full_html=False, include_plotlyjs=with_script, config={"displayModeBar": False})
    return html
