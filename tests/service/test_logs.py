"""Parts of logs and of curves: nothing lost between parts, nothing unbounded."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from service import logs
from service.curves import thinned
from service.logs import Wanted, part
from service.streams import log_lines
from tests.service.rest import Service
from workloads import log_file
from workloads.log_file import CHUNK, lines, segment

T = "2026-11-22 06:00:00,123"
LOG = f"{T} INFO workloads.run: a\n{T} ERROR [rank 1] workloads.train: b\nTraceback\n{T} WARNING [rank 11] x: c\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.txt"
    path.write_text(LOG + "half a li")
    return path


def test_levels_and_ranks_take_their_tracebacks_along(log: Path) -> None:
    whole = LOG.splitlines(keepends=True)
    assert part(log, 0, 9999, Wanted()) == (LOG, len(LOG))
    assert part(log, 0, 9999, Wanted(level="WARNING"))[0] == "".join(whole[1:])
    assert part(log, 0, 9999, Wanted(rank=1))[0] == "".join(whole[1:3])
    assert part(log, 0, 9999, Wanted(level="ERROR", rank=11)) == ("", len(LOG))


@pytest.mark.parametrize(
    "wanted", [{}, {"level": "WARNING"}, {"level": "ERROR"}, {"rank": 1}, {"rank": 11}, {"level": "INFO", "rank": 1}]
)
@pytest.mark.parametrize("sizes", [[], [1, 2, 4]])  # whole lines of each file
def test_wherever_one_begins_the_same_lines_are_wanted(
    tmp_path: Path, wanted: dict[str, Any], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "SEGMENT_BYTES", 1)  # later files are looked for
    log, whole = tmp_path / "log.txt", LOG.splitlines(keepends=True) * 3
    ends = [0, *sizes, len(whole)]
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        segment(log, number).write_text("".join(whole[start:end]))
    seen = list(lines(log, 0))
    assert len(seen) == len(whole)
    of_all = Wanted(**wanted)
    taken = [end for line, end in seen if of_all.takes(line)]
    for _, place in seen:
        told = next(log_lines(log, place, Wanted(**wanted)))
        assert [end for end, text in told if text is not None] == [end for end in taken if end > place]
        text, _ = part(log, place, 9999, Wanted(**wanted))
        assert text.count("\n") == len([end for end in taken if end > place])


def test_no_more_is_looked_at_than_a_message_has(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = LOG.index("Traceback")
    assert part(log, place, 9999, Wanted(rank=11))[0].startswith(f"{T} WARNING")
    monkeypatch.setattr(logs, "LOOK_BACK", 10)
    assert part(log, place, 9999, Wanted(rank=11))[0].startswith("Traceback")  # whose it is nobody knows


@pytest.mark.parametrize("limit", [1, 10, 60, 9999])
def test_parts_join_to_the_whole(log: Path, limit: int) -> None:
    text, at = "", 0
    while (found := part(log, at, limit, Wanted()))[1] != at:
        text, at = text + found[0], found[1]
    assert (text, at) == (LOG, len(LOG))
    tail = part(log, None, limit, Wanted())[0]
    assert LOG.endswith(tail) and len(tail) <= limit


def test_a_line_without_an_end_is_read_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"x" * (3 * CHUNK) + b"\n")
    assert [len(line) for line, _ in lines(path, 0)] == [CHUNK] * 3 + [1]
    assert list(lines(tmp_path / "none", 0)) == []


def test_the_routes(service: Service, client: TestClient, body: dict[str, Any]) -> None:
    job_id = client.post("/v1/jobs", json=body).json()["id"]
    client.post(f"/v1/jobs/{job_id}:cancel")
    folder = service.runs / job_id
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(LOG)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": s % 7}) + "\n" for s in range(100)))
    url = f"/v1/jobs/{job_id}/logs"
    first = client.get(url, params={"offset": 0, "limit": 5})
    assert first.text == LOG.splitlines(keepends=True)[0] and first.headers["x-next-offset"] == str(len(first.text))
    resumed = client.get(url, params={"follow": True}, headers={"Last-Event-ID": first.headers["x-next-offset"]}).text
    assert "workloads.run: a" not in resumed and resumed.count("data: ") == 4 and "event: end" in resumed
    assert client.get(url, params={"follow": True, "rank": 11}).text.count("id: ") == 1
    assert client.get(url, params={"level": "LOUD"}).status_code == 422
    points = client.get(f"/v1/jobs/{job_id}/metrics", params={"max_points": 8}).json()["points"]
    assert [p["step"] for p in points] == [0, 6, 49, 50, 55, 56, 99]


@given(st.lists(st.none() | st.floats(-9, 9), max_size=80), st.integers(4, 40))
def test_a_thin_curve_keeps_ends_lows_and_highs(values: list[float | None], most: int) -> None:
    points: list[dict[str, Any]] = [{"step": i, "loss": value} for i, value in enumerate(values)]
    found = thinned(points, most)
    assert len(found) <= most and [p["step"] for p in found] == sorted({p["step"] for p in found})
    if points:
        assert found[0] == points[0] and found[-1] == points[-1]
    known = [value for value in values if value is not None]
    if known:
        kept = [p["loss"] for p in found if p["loss"] is not None]
        assert (min(kept), max(kept)) == (min(known), max(known))
