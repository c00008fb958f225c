"""The schema from every earlier revision, up, down and up again, with data; and front ends of two versions at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import IntegrityError

import service.migrate
from service import sqlite
from service.migrate import NewerDatabase, migrate
from service.parts import build_parts
from service.settings import Settings
from service.store import Base, Job, ModelVersion, Store
from tests.service.fakes import FakeRay, write_record
from tests.service.rest import NoDeployments
from tests.service.world import BODY
from workloads.spec import JobSpec

SPEC = JobSpec.model_validate(BODY).model_dump(mode="json")


MIGRATIONS = Path(service.migrate.__file__).parent / "migrations"
REVISIONS = [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()][::-1]


@pytest.fixture
def engine(empty_database: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(empty_database)
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", sqlite.pragmas)
    yield engine
    engine.dispose()


def inserted(engine: sa.Engine, table: str, **values: Any) -> None:
    """A row as a service of the first revision wrote it: it names the columns that it knew."""
    with engine.begin() as connection:
        connection.execute(sa.Table(table, sa.MetaData(), autoload_with=connection).insert().values(values))


def old_job(engine: sa.Engine, i: int, state: str = "RUNNING", attempt: int = 1, **more: Any) -> None:
    zero = dict.fromkeys(("stalled", "best_step", "step", "epoch", "total_steps", "revision", "gpus"), 0)
    fixed = {"name": "n", "spec": SPEC, "origin": "rest", "created_at": 1.5, "cpus": 1, "body_hash": "h"}
    inserted(engine, "jobs", id=f"j{i}", state=state, attempt=attempt, **zero, **fixed, **more)


def fill(engine: sa.Engine) -> None:
    """Two jobs, a model and what is served, as the first revision could hold them; events where there is a table."""
    for i, key in ((1, "k"), (2, None)):
        old_job(engine, i, idempotency_key=key)
    model = {"name": "m", "version": 1, "kind": "encoder", "job_id": "j1", "source": "artifact", "card": {}}
    inserted(engine, "model_versions", **model, created_at=1.5)
    inserted(engine, "deployments", name="m", version=1, state="RUNNING", updated_at=1.5)
    if sa.inspect(engine).has_table("job_events"):
        with engine.begin() as connection:
            numbers = connection.scalars(sa.text("SELECT number FROM jobs ORDER BY number")).all()
        for number in numbers:
            inserted(engine, "job_events", job_number=number, time=1.5, kind="queued", message="accepted")


def counts(engine: sa.Engine) -> dict[str, int]:
    with engine.connect() as connection:
        tables = [table for table in sa.inspect(connection).get_table_names() if table != "alembic_version"]
        return {t: connection.scalar(sa.text(f"SELECT count(*) FROM {t}")) or 0 for t in tables}


@pytest.mark.parametrize("revision", REVISIONS)
def test_from_every_revision_up_down_and_up_with_data(engine: sa.Engine, revision: str) -> None:
    migrate(engine, revision)
    fill(engine)
    before = counts(engine)
    migrate(engine)
    after = counts(engine)
    assert after | before == after  # nothing is lost
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    migrate(engine, revision)
    assert counts(engine) == before
    migrate(engine)
    assert counts(engine) == after
    with closing(Store(str(engine.url))) as store, store.session() as session:
        jobs = session.query(Job).order_by(Job.number).all()
        assert [(j.id, j.state, j.spec, j.project, j.idempotency_key) for j in jobs] == [
            ("j1", "RUNNING", SPEC, "default", "k"),
            ("j2", "RUNNING", SPEC, "default", None),
        ]
        assert [(m.name, m.version, m.card) for m in session.query(ModelVersion)] == [("m", 1, {})]
        session.add(Job(id="j3", name="n", spec=SPEC, origin="rest", state="QUEUED"))  # numbers go on
        session.flush()
        assert session.query(Job).filter_by(id="j3").one().number > jobs[-1].number
    with pytest.raises(IntegrityError):
        inserted(engine, "job_events", job_number=99, time=1.5, kind="x", message="y")


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_rolling_upgrade_leaves_running_jobs_alone(engine: sa.Engine, revision: str, tmp_path: Path) -> None:
    """Two run and one waits while the service is replaced by a newer one; their processes hear nothing of it."""
    migrate(engine, revision)
    for i, attempt in ((1, 1), (2, 3)):
        old_job(engine, i, attempt=attempt, submitted_at=2.0, started_at=3.0)
        write_record(tmp_path / "runs" / f"j{i}", "RUNNING", attempt, step=7, total_steps=10)
    old_job(engine, 3, state="QUEUED", attempt=0)
    ray = FakeRay(cpus=2)
    ray.known |= {"j1": "RUNNING", "j2-3": "RUNNING"}
    for _ in range(2):  # the upgrade, and a restart after it
        settings = Settings(home=tmp_path, database_url=str(engine.url))
        parts = build_parts(settings, ray=ray, deployments=NoDeployments(), check=lambda *_: [])  # type: ignore[arg-type]
        for _ in range(3):
            parts.reconciler.round()
        rows = [parts.jobs.get(f"j{i}") for i in (1, 2, 3)]
        parts.store.close()
        assert [(row.state, row.attempt, row.step) for row in rows] == [
            ("RUNNING", 1, 7),
            ("RUNNING", 3, 7),
            ("QUEUED", 0, 0),
        ]
    assert (ray.submitted, ray.stopped) == ([], [])
    assert not any((tmp_path / "runs" / name / "stop").exists() for name in ("j1", "j2"))


def test_the_old_service_still_accepts_jobs_while_the_new_one_starts(engine: sa.Engine) -> None:
    """Columns that it does not know have a default in the database."""
    migrate(engine, REVISIONS[0])
    migrate(engine)
    old_job(engine, 1, state="QUEUED", attempt=0, idempotency_key=None)
    with closing(Store(str(engine.url))) as store, store.session() as session:
        row = session.query(Job).one()
        assert (row.id, row.project, row.owner, row.after, row.held) == ("j1", "default", "local", [], False)


def test_front_ends_that_start_together_migrate_once(empty_database: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: Store(empty_database), range(4)))
    for store in stores:
        with store.session() as session:
            assert session.query(Job).count() == 0
        store.close()


def test_a_database_of_a_newer_version_is_left_as_it_is(database: str) -> None:
    store = Store(database)
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    before = counts(store.engine)
    with pytest.raises(NewerDatabase, match="got a database of revision 9999, expected at most"):
        Store(database)
    assert counts(store.engine) == before
    with store.engine.begin() as connection:
        assert connection.scalar(sa.text("SELECT version_num FROM alembic_version")) == "9999"
    store.close()
