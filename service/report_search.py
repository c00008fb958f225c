"""The report of a search: what was found, drawn, and among what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.report import html_of, render
from workloads.winner import POPULATION, Found, read_found

COSTS = {"flops": "multiply-adds", "latency_ms": "ms an image"}
SHADES = ("#cfe0fc", "#a8c7fa", "#7aa9f5", "#4d8bf0", "#1f6feb", "#164fa8")  # of maps, the largest first


def search_page(*, job: dict[str, Any], points: Sequence[dict[str, Any]], paper: str, artifact: Path) -> str:
    """The report of a search in any state, with what is there so far.

    Args:
        job: the answer of GET /v1/jobs/{id}.
        points: of its curve.
        paper: of the search.
        artifact: folder of what it found, maybe not there yet.
    """
    found = read_found(artifact)
    charts: list[tuple[str, str]] = []
    if found is not None:
        charts.append(("The winner: channels, side of maps and layers of its blocks", html_of(blocks(found.blocks))))
        rows = _rows(artifact)
        charts += [
            (f"Score against {what}", html_of(against(rows, cost, what, found)))
            for cost, what in COSTS.items()
            if any(row.get(cost) is not None and row.get("score") is not None for row in rows)
        ]
    return render(
        job=job,
        paper=paper,
        parameters=int(found.costs["parameters"]) if found and "parameters" in found.costs else None,
        facts=_facts(found) if found else [],
        curve=("The best so far", html_of(_best(points), with_script=True)),
        charts=charts,
    )


def _facts(found: Found) -> list[tuple[str, str]]:
    facts = [("structure", found.structure), ("score", f"{found.score:.6g}")]
    facts += [(name, f"{value:,.10g}") for name, value in found.costs.items()]
    if (x := found.latency) is not None:
        facts.append(("latency", f"{x.ms:.4g} ms an image, {x.batch_size} at once, {x.precision}, {x.device}"))
    facts.append(("candidates", f"{found.told:,}, of which {found.scored:,} were scored"))
    facts.append(("in a job", f"model: {{name: job:{found.job_id}}}"))
    return facts


def _rows(artifact: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(artifact / POPULATION).to_pylist()
    return rows


def _best(points: Sequence[dict[str, Any]]) -> Any:
    import plotly.graph_objects as go

    line = go.Scatter(
        x=[p["step"] for p in points], y=[p["best_score"] for p in points], name="best score", line={"color": "#1f6feb"}
    )
    return go.Figure([line]).update_layout(xaxis={"title": "candidates"}, yaxis={"title": "best score"})


def against(rows: Sequence[dict[str, Any]], cost: str, what: str, found: Found) -> Any:
    """Score over a cost: the population, the Pareto front, the winner."""
    import plotly.graph_objects as go

    measured = [row for row in rows if row.get(cost) is not None and row.get("score") is not None]
    front = sorted((row for row in measured if row.get(f"on_front_{cost}")), key=lambda row: row[cost])
    winner = [row for row in measured if row["candidate"] == found.structure][:1]

    def dots(of: Sequence[dict[str, Any]], name: str, **style: Any) -> Any:
        return go.Scatter(x=[row[cost] for row in of], y=[row["score"] for row in of], name=name, **style)

    return go.Figure(
        [
            dots(measured, "kept candidates", mode="markers", marker={"color": "rgba(127,137,153,.5)", "size": 5}),
            dots(front, "Pareto front", mode="lines+markers", line={"color": "#d08700", "shape": "hv"}),
            dots(winner, "winner", mode="markers", marker={"color": "#1f6feb", "size": 12, "symbol": "star"}),
        ]
    ).update_layout(xaxis={"title": what}, yaxis={"title": "score"})


def blocks(of: Sequence[dict[str, Any]]) -> Any:
    """The network from left to right: a box for each block, as wide as it is deep, as high as it has channels."""
    import plotly.graph_objects as go

    figure, x, most = go.Figure(), 0.0, max(block["channels"] for block in of)
    sizes = sorted({block["size"] for block in of}, reverse=True)
    for block in of:
        width, height = 0.6 + 0.4 * block["layers"], 0.15 + 0.85 * (block["channels"] / most) ** 0.5
        shade = SHADES[min(sizes.index(block["size"]), len(SHADES) - 1)]
        figure.add_shape(
            type="rect", x0=x, x1=x + width, y0=-height / 2, y1=height / 2, fillcolor=shade, line={"color": "#33415c"}
        )
        words = [f"{block['channels']}", f"{block['size']} px", f"x{block['layers']}"]
        figure.add_annotation(x=x + width / 2, y=0.66, text=block["label"], showarrow=False, textangle=-45)
        figure.add_annotation(x=x + width / 2, y=-0.72, text="<br>".join(words), showarrow=False, font={"size": 11})
        x += width + 0.25
    figure.update_xaxes(visible=False, range=[-0.3, x])
    figure.update_yaxes(visible=False, range=[-1, 1])
    return figure
