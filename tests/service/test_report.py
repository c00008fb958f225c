"""The report is one file that needs no network, and says what was measured."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from service.demo import DemoError, _clean, demo_spec, result_table, summarise
from service.report import page
from service.report_search import search_page
from tests.toy_artifact import image
from workloads import winner
from workloads.sheet import contact_sheet
from workloads.spec import JobSpec
from workloads.spec_search import SearchSpec
from workloads.winner import Found, Latency


def result(label: str, **means: float) -> dict[str, Any]:
    return {
        "label": label,
        "metric": "accuracy",
        "results": {who: {"mean": m, "std": 0.01, "seeds": [m] * 3} for who, m in means.items()},
    }


JOB = {
    "id": "job-1",
    "name": "<digits>",
    "state": "SUCCEEDED",
    "reason": None,
    "hint": None,
    "created_at": "2026-11-21T00:00:00+00:00",
    "spec": {"name": "digits", "epochs": 40},
    "evaluations": [
        result("knn10", pretrained=0.7, untrained=0.3, raw_pixels=0.9),
        result("probe", pretrained=0.95, untrained=0.85, raw_pixels=0.96),
        result("few_label10", pretrained=0.94, untrained=0.82),
    ],
}


def test_summary_has_the_stated_keys() -> None:
    summary = summarise(JOB, 0.93, 100.04)
    assert summary == {
        "job_id": "job-1",
        "epochs": 40,
        "knn10_random": 0.3,
        "knn10_pretrained": 0.7,
        "probe_random": 0.85,
        "probe_pretrained": 0.95,
        "few_label_random": 0.82,
        "few_label_pretrained": 0.94,
        "predict_accuracy": 0.93,
        "wall_s": 100.0,
    }
    assert result_table(JOB, summary).row_count == 4


FACTS: dict[str, Any] = {"job": JOB, "paper": "a paper", "parameters": None, "sheet": None, "summary": {}}


def links(html: str) -> list[str]:
    class Links(HTMLParser):
        found: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value for name, value in attrs if name in ("src", "href") and value]

    parser = Links()
    parser.feed(html)
    return parser.found


def test_the_page_is_self_contained() -> None:
    points = [{"step": 10, "loss": 2.0, "lr": 1e-3}, {"step": 20, "loss": 1.0, "lr": 5e-4}]
    drawn = {"sheet": contact_sheet([{"original": image(0)}]), "parameters": 355968}
    text = page(**FACTS | drawn | {"summary": {"predict_accuracy": 0.9}}, points=points, online=[])
    assert links(text) and all(link.startswith("data:image/png;base64,") for link in links(text))
    assert "&lt;digits&gt;" in text and "0.700 ± 0.010" in text and "355,968" in text
    assert re.search(r'"x":\s*\[10,\s*20\]', text)


def test_a_job_that_has_not_begun_has_a_page() -> None:
    job = JOB | {"state": "FAILED", "evaluations": [], "reason": "got <nothing>", "hint": "give something"}
    text = page(**FACTS | {"job": job}, points=[], online=[])
    assert "got &lt;nothing&gt;" in text and "give something" in text
    assert not links(text) and "What pretraining was worth" not in text


def test_charts_and_evaluations_of_checkpoints_are_drawn() -> None:
    value = {"mean": 0.25, "std": 0.0, "seeds": [0.25]}
    chart = {"title": "A sweep", "x": "s", "y": "accuracy", "curves": {"trained": [[0.125, value], [0.5, value]]}}
    sweep = result("sweep_s", pretrained=0.3, **{"s=0": 0.5}) | {"chart": chart}
    online = [{"step": s, "entry": e, "label": "knn", "metric": "accuracy", **value} for s in (7, 14) for e in (0, 1)]
    text = page(**FACTS | {"job": JOB | {"evaluations": [sweep]}}, points=[], online=online)
    assert text.count("<h2>") == 5 and "<h2>A sweep</h2>" in text and "<h2>Evaluations of checkpoints</h2>" in text
    assert "knn[0]" in text and "knn[1]" in text and re.search(r'"x":\s*\[7,\s*14\]', text)
    assert re.search(r'"x":\s*\[0.125,\s*0.5\]', text) and "<th>s=0</th>" not in text
    assert text.count("plotly.js v") <= 1


def test_the_recipe_of_the_demo_is_a_job(tmp_path: Path) -> None:
    spec = JobSpec.model_validate(demo_spec(tmp_path))
    assert spec.data["train"].shards == f"{tmp_path}/train-{{000000..000001}}.tar"
    assert [e.name for e in spec.evaluate] == ["knn", "linear_probe", "fine_tune"]


def test_the_demo_does_not_touch_a_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    with pytest.raises(DemoError, match="not of a demo"):
        _clean(tmp_path)
    assert (tmp_path / "home").exists()
    _clean(tmp_path / "new")
    (tmp_path / "new" / "home").mkdir()
    _clean(tmp_path / "new")  # an earlier demo is replaced
    assert not (tmp_path / "new" / "home").exists()


def found_in(folder: Path) -> None:
    """An artifact of a search."""
    spec = SearchSpec.model_validate({"name": "s", "search": {"name": "zen_nas"}})
    blocks = [{"label": f"K{n}", "channels": 8 * n, "size": 32 // n, "layers": n, "stride": 1} for n in (1, 2, 4)]
    found = Found(
        job_id="job-2", spec=spec, paper="Zen", structure="<K1>", model={"name": "zennet"}, score=12.5,
        costs={"parameters": 1234567, "flops": 5e8}, blocks=blocks, told=30, scored=20, spent=10,
        latency=Latency(ms=0.25, device="H100", batch_size=64, precision="fp16"),
    )  # fmt: skip
    rows = [
        {"candidate": "<K1>", "score": 12.5, "flops": 5e8, "on_front_flops": True},
        {"candidate": "K2", "score": 3.0, "flops": 1e8, "on_front_flops": True, "latency_ms": 0.1},
    ]
    winner.write(folder, found, rows)


def test_a_search_is_drawn_with_what_it_found_and_among_what(tmp_path: Path) -> None:
    job = JOB | {"id": "job-2", "spec": {"name": "s", "search": {"name": "zen_nas"}}}
    points = [{"step": n, "best_score": score} for n, score in ((10, None), (20, 4.0), (30, 12.5))]
    running = search_page(job=job, points=points[:2], paper="Zen-NAS", artifact=tmp_path / "artifact")
    assert "The best so far" in running and "What was found" not in running
    found_in(tmp_path / "artifact")
    text = search_page(job=job, points=points, paper="Zen-NAS", artifact=tmp_path / "artifact")
    for said in ("&lt;K1&gt;", "1,234,567", "0.25 ms an image, 64 at once, fp16, H100", "model: {name: job:job-2}"):
        assert said in text
    assert re.findall(r"<h2>([^<]*)</h2>", text) == [
        "What was found", "The best so far", "The winner: channels, side of maps and layers of its blocks",
        "Score against multiply-adds", "Score against ms an image", "Job",
    ]  # fmt: skip
    assert "<K1>" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
