"""A file of a run that cannot be read, or is of another version, is that job's alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.fakes import write_record
from tests.service.secured import BODY, Secured
from tests.toy_search import TOY_SEARCH
from workloads.spec import JobSpec


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Secured]:
    service = Secured(tmp_path)
    yield service
    service.close()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("record.json", ""),
        ("record.json", "{}"),
        ("evaluations.json", "["),
        ("evaluations.json", "\udcff"),
        ("artifact/winner.json", "{"),
    ],
)
def test_a_damaged_file_is_told_where_its_job_is_and_keeps_no_other_from_the_list(
    service: Secured, name: str, text: str
) -> None:
    client, submissions = service.client(), service.parts.submissions
    jobs = [submissions.submit(body)[0].id for body in (BODY, {"name": "search", "search": TOY_SEARCH}, BODY)]
    service.parts.reconciler.round()
    for job_id in jobs[:2]:
        path = service.settings.runs / job_id / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, errors="surrogateescape")
    answer = client.get("/v1/jobs")
    assert answer.status_code == 200
    whole, search, training = (job["warnings"] for job in answer.json()["jobs"])
    assert whole == [] and all("cannot be read" in text for text in search + training)
    assert (len(search), len(training)) == (1, 0 if "winner" in name else 1)
    for path in ("", "/evaluations", "/events", "/metrics", "/logs"):
        assert client.get(f"/v1/jobs/{jobs[1]}{path}").status_code == 200, path


def test_a_job_by_a_method_of_another_version_has_no_report(service: Secured) -> None:
    run = service.settings.runs / "raysubmit_1"
    write_record(run, "RUNNING", step=1, total_steps=5)
    spec = JobSpec.model_validate(BODY | {"method": {"name": "mine"}})
    (run / "job.json").write_text(spec.model_dump_json())
    service.ray.known["raysubmit_1"] = "RUNNING"
    service.parts.reconciler.round()
    refused = service.client().get("/v1/jobs/raysubmit_1/report")
    assert refused.status_code == 404 and "got method 'mine', expected one of the catalog" in refused.json()["detail"]
    assert refused.json()["hint"] == "GET /v1/jobs/raysubmit_1/metrics"
