"""The report is one file that needs no network, and says what was measured."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from service.demo import DemoError, _clean, demo_spec, result_table, summarise
from service.report import GAP, LABEL, PIXELS, contact_sheet, write_report
from workloads.spec import JobSpec


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
    "created_at": "2026-11-21T00:00:00+00:00",
    "spec": {"name": "digits", "epochs": 40},
    "evaluations": [
        result("knn10", pretrained=0.7, untrained=0.3, raw_pixels=0.9),
        result("probe", pretrained=0.95, untrained=0.85, raw_pixels=0.96),
        result("few_label10", pretrained=0.94, untrained=0.82),
    ],
}


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (grey, grey, grey)).save(file, "PNG")
    return file.getvalue()


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


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    curve = [{"step": 10, "loss": 2.0, "lr": 1e-3}, {"step": 20, "loss": 1.0, "lr": 5e-4}]
    pictures = [{"original": png(0), "masked": png(100), "reconstruction": png(200)}] * 3
    card = {"paper": "a paper", "parameters": 355968}
    html, sheet = write_report(
        tmp_path, job=JOB, curve=curve, pictures=pictures, card=card, summary={"predict_accuracy": 0.9}
    )
    page = html.read_text()

    class Links(HTMLParser):
        found: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value for name, value in attrs if name in ("src", "href") and value]

    parser = Links()
    parser.feed(page)
    assert parser.found and all(link.startswith("data:image/png;base64,") for link in parser.found)
    assert "&lt;digits&gt;" in page and "0.700 ± 0.010" in page and "355,968" in page
    assert re.search(r'"x":\s*\[10,\s*20\]', page)
    with Image.open(sheet) as image:
        width, height = image.size
    assert (width, height) == (3 * (PIXELS + GAP) + GAP, 3 * (PIXELS + GAP + LABEL))


def test_the_sheet_shows_each_picture_in_its_place() -> None:
    sheet = Image.open(io.BytesIO(contact_sheet([{"a": png(10), "b": png(20)}, {"a": png(30), "b": png(40)}])))
    row = PIXELS + GAP + LABEL
    at = [(GAP + x * (PIXELS + GAP) + 5, LABEL + y * row + 5) for y in (0, 1) for x in (0, 1)]
    assert [sheet.getpixel(xy) for xy in at] == [(g, g, g) for g in (10, 30, 20, 40)]


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
