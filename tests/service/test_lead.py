"""Several front ends on one database: one reconciles, another takes over; no attempt is submitted twice."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.lead import Lead
from service.parts import Parts, build_parts
from service.settings import Settings
from tests.postgres import Postgres
from tests.service.front import FolderRay
from tests.service.rest import NoDeployments
from tests.service.world import BODY
from tests.waiting import until

ROOT = Path(__file__).parents[2]


def front(name: str, home: Path, url: str, ray_folder: Path, submit_s: float = 0.0) -> Parts:
    """The parts of a front end, of which only the reconciler is to be started."""
    return build_parts(
        Settings(home=home, database_url=url, reconcile_interval_s=0.02),
        ray=FolderRay(ray_folder, name, submit_s),  # type: ignore[arg-type]
        deployments=NoDeployments(),  # type: ignore[arg-type]
        check=lambda *_: [],
    )


@contextmanager
def lead(url: str) -> Iterator[Lead]:
    engine = sa.create_engine(url)
    lead = Lead(engine)
    yield lead
    lead.release()
    engine.dispose()


def test_one_leads_and_the_next_one_after_it(database: str) -> None:
    with lead(database) as first, lead(database) as second:
        assert first.held() and not second.held()
        assert first.held() and not second.held()
        first.release()
        assert second.held() and not first.held()
        second.release()
        assert first.held()


def test_a_lead_is_lost_with_its_session_and_found_again(postgres: Postgres, migrated: str) -> None:
    name = postgres.create(migrated)
    with lead(postgres.url(name)) as first, lead(postgres.url(name)) as second:
        assert first.held()
        postgres.query(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        assert second.held() and not first.held()
        second.release()
        assert first.held()
    postgres.drop(name)


def test_databases_of_one_server_have_a_lead_each(postgres: Postgres) -> None:
    names = [postgres.create(), postgres.create()]
    with lead(postgres.url(names[0])) as first, lead(postgres.url(names[1])) as second:
        assert first.held() and second.held()
    for name in names:
        postgres.drop(name)


def test_a_front_end_that_is_stopped_gives_the_lead_away_and_leaves_runs_alone(database: str, tmp_path: Path) -> None:
    ray = FolderRay(tmp_path / "ray", "-")
    first, second = (front(name, tmp_path, database, tmp_path / "ray") for name in ("a", "b"))
    job = first.submissions.submit(BODY)[0]
    first.reconciler.start()
    until(lambda: ray.calls() == [("a", job.id)])
    second.reconciler.start()
    until(lambda: second.reconciler.ray_error is None)  # it stands by, and is ready to take requests
    first.stop()
    other = second.submissions.submit(BODY)[0]
    until(lambda: len(ray.calls()) == 2)
    second.stop()
    assert ray.calls() == [("a", job.id), ("b", other.id)]  # no stop, and nothing again


def test_when_the_leading_front_end_is_killed_another_goes_on_and_no_attempt_is_submitted_twice(
    database: str, tmp_path: Path
) -> None:
    ray, calls = FolderRay(tmp_path / "ray", "-"), tmp_path / "ray" / "calls"
    ours = front("b", tmp_path, database, tmp_path / "ray")
    ids = [ours.submissions.submit(BODY)[0].id]
    words = [sys.executable, "-m", "tests.service.front", "a", str(tmp_path), database, str(tmp_path / "ray")]
    process = subprocess.Popen(words, cwd=ROOT)
    try:
        until(calls.exists)  # it leads
        ours.reconciler.start()
        with ThreadPoolExecutor(4) as pool:
            ids += [job.id for job, _ in pool.map(lambda _: ours.submissions.submit(BODY), range(40))]
        until(lambda: len(ray.calls()) >= 10)
    finally:
        process.kill()  # in the middle of its submissions
        process.wait()
    until(lambda: set(ray.statuses()) == set(ids))
    ours.stop()
    made = ray.calls()
    assert {name for name, _ in made} == {"a", "b"}
    torn = {attempt for _, attempt in made if [a for _, a in made].count(attempt) > 1}
    assert len(torn) <= 1  # that of which nobody knows whether Ray had taken it; Ray knows its name
    firsts = [name for name, _ in made]
    assert firsts == sorted(firsts)  # never both
    assert sorted({attempt for _, attempt in made}) == sorted(ids)  # all of them, as first attempts


def test_two_that_both_believe_to_lead_submit_nothing_twice(database: str, tmp_path: Path) -> None:
    """One was cut off from the database in the middle of a round, and comes back: rounds are turned by hand."""
    fronts = [front(name, tmp_path, database, tmp_path / "ray", submit_s=0.005) for name in ("a", "b")]
    ids = [fronts[0].submissions.submit(BODY)[0].id for _ in range(20)]
    for _ in range(2):
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(one.reconciler.round) for one in fronts]:
                done.result()
    rows = [fronts[0].jobs.get(job_id) for job_id in ids]
    assert {(row.state, row.attempt) for row in rows} == {("STARTING", 1)}
    for one in fronts:
        one.store.close()
    assert {attempt for _, attempt in FolderRay(tmp_path / "ray", "-").calls()} == set(ids)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_has_nobody_beside_it(url: str) -> None:
    with lead(url) as only:
        assert only.held()
