"""The database: jobs and their events, models, deployments, and who may what.

The table of jobs is the truth; Ray is the engine.

SQLite by default, PostgreSQL by URL. Schema changes are Alembic migrations, applied
when the service starts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import alembic.command
import alembic.config
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, WriteOnlyMapped, mapped_column, sessionmaker

from service.principal import DEFAULT_PROJECT, LOCAL, Role

JobState = Literal[
    "QUEUED", "STARTING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELLING", "CANCELLED", "PAUSING", "PAUSED"
]
DeploymentState = Literal["DEPLOYING", "RUNNING", "FAILED"]
ACTIVE: tuple[JobState, ...] = ("STARTING", "RUNNING", "PAUSING", "CANCELLING")
TERMINAL: tuple[JobState, ...] = ("SUCCEEDED", "FAILED", "CANCELLED")
SETTLED: tuple[JobState, ...] = (*TERMINAL, "PAUSED")  # nothing to do until somebody asks for it


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: sa.JSON, list[Any]: sa.JSON}


class Job(Base):
    """One accepted job. Times are seconds since the epoch."""

    __tablename__ = "jobs"
    __table_args__ = (sa.UniqueConstraint("project", "idempotency_key", name="uq_jobs_project_idempotency_key"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)  # order of arrival
    id: Mapped[str] = mapped_column(sa.String(80), unique=True)
    name: Mapped[str] = mapped_column(sa.String(80))
    spec: Mapped[dict[str, Any]]
    after: Mapped[list[Any]] = mapped_column(default=list)  # ids of jobs that it needs
    held: Mapped[bool] = mapped_column(default=False)  # until these have succeeded and it was checked
    project: Mapped[str] = mapped_column(sa.String(63), default=DEFAULT_PROJECT, index=True)
    owner: Mapped[str] = mapped_column(sa.String(80), default=LOCAL.name)  # the principal that submitted it
    origin: Mapped[str] = mapped_column(sa.String(8))  # "rest", or "ray": came by `ray job submit`
    state: Mapped[JobState] = mapped_column(sa.String(16), index=True)
    attempt: Mapped[int] = mapped_column(default=0)
    stalled: Mapped[int] = mapped_column(default=0)  # attempts in a row without progress
    best_step: Mapped[int] = mapped_column(default=0)
    reason: Mapped[str | None] = mapped_column(sa.Text)
    hint: Mapped[str | None] = mapped_column(sa.Text)
    created_at: Mapped[float] = mapped_column(default=time.time)
    resumed_at: Mapped[float | None]  # its place in the queue, where it is not that of its arrival
    submitted_at: Mapped[float | None]  # of the newest attempt
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    step: Mapped[int] = mapped_column(default=0)
    epoch: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int] = mapped_column(default=0)
    cpus: Mapped[float] = mapped_column(default=0)
    gpus: Mapped[float] = mapped_column(default=0)
    idempotency_key: Mapped[str | None] = mapped_column(sa.String(200))
    body_hash: Mapped[str | None] = mapped_column(sa.String(64))
    traceparent: Mapped[str | None] = mapped_column(sa.String(55))  # W3C: of the request that submitted it
    revision: Mapped[int] = mapped_column(default=0)

    events: WriteOnlyMapped[JobEvent] = sa.orm.relationship()

    __mapper_args__ = {"version_id_col": revision}  # two writers of one row: the second fails and looks again

    def become(self, state: JobState, message: str) -> None:
        """Sets the state, and writes the event of it in the same transaction."""
        self.state = state
        self.events.add(JobEvent(kind=state.lower(), message=message))


class JobEvent(Base):
    """What the service did to a job; `service.events` adds what its run tells.

    The row of the job is updated before an event is inserted, and is locked from then on:
    so the ids of one job's events grow in the order of their commits, and are a cursor.
    """

    __tablename__ = "job_events"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_number: Mapped[int] = mapped_column(sa.ForeignKey("jobs.number"), index=True)
    time: Mapped[float] = mapped_column(default=time.time)
    kind: Mapped[str] = mapped_column(sa.String(16))  # a state of the job
    message: Mapped[str] = mapped_column(sa.Text)


class ModelName(Base):
    """Whose the versions of a name are: the first project that asks for a name keeps it."""

    __tablename__ = "model_names"

    name: Mapped[str] = mapped_column(sa.String(80), primary_key=True)
    project: Mapped[str] = mapped_column(sa.String(63), index=True)


class ModelVersion(Base):
    """One registered artifact; never changed."""

    __tablename__ = "model_versions"
    __table_args__ = (sa.UniqueConstraint("name", "version"), sa.UniqueConstraint("name", "job_id", "source"))

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(80), index=True)
    version: Mapped[int]
    kind: Mapped[str] = mapped_column(sa.String(16))
    job_id: Mapped[str] = mapped_column(sa.String(80), index=True)
    source: Mapped[str] = mapped_column(sa.String(200))  # of the artifact in the run folder
    card: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(default=time.time)


class Deployment(Base):
    """What is wanted to be served; `service.deployments` brings Serve there."""

    __tablename__ = "deployments"

    name: Mapped[str] = mapped_column(sa.String(80), primary_key=True)
    version: Mapped[int]
    state: Mapped[DeploymentState] = mapped_column(sa.String(16))
    reason: Mapped[str | None] = mapped_column(sa.Text)
    updated_at: Mapped[float] = mapped_column(default=time.time, onupdate=time.time)


class Project(Base):
    """What jobs and models belong to."""

    __tablename__ = "projects"

    name: Mapped[str] = mapped_column(sa.String(63), primary_key=True)
    created_at: Mapped[float] = mapped_column(default=time.time)


class Token(Base):
    """A bearer token, of which only the hash is known. Rows stay: what was revoked stays told."""

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(80))  # of the principal
    project: Mapped[str] = mapped_column(sa.String(63))  # or "*"
    role: Mapped[Role] = mapped_column(sa.String(16))
    hash: Mapped[str] = mapped_column(sa.String(64), unique=True)
    created_by: Mapped[str] = mapped_column(sa.String(80))
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    last_used_at: Mapped[float | None]  # to the minute


class AuditEntry(Base):
    """One change that somebody asked for. It is written before the change is made, its result afterwards."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    time: Mapped[float]
    who: Mapped[str] = mapped_column(sa.String(80))
    token_id: Mapped[str | None] = mapped_column(sa.String(20))
    project: Mapped[str] = mapped_column(sa.String(63), index=True)
    action: Mapped[str] = mapped_column(sa.String(120))  # "POST /v1/jobs/{job_id}:cancel"
    target: Mapped[str] = mapped_column(sa.String(200))  # the id or name in it, or of what was made
    request_id: Mapped[str] = mapped_column(sa.String(64))
    status: Mapped[int | None]  # of the answer; None: the service died before it gave one


class Store:
    """Sessions on one database, migrated on construction."""

    def __init__(self, url: str) -> None:
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # An error tells the statement, not what is in it. A server may have restarted since the last session.
        self.engine = sa.create_engine(url, hide_parameters=True, pool_pre_ping=not url.startswith("sqlite"))
        if self.engine.dialect.name == "sqlite":
            sa.event.listen(self.engine, "connect", _sqlite_pragmas)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        migrate(self.engine)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction: committed at the end of the block, rolled back on an exception."""
        with self._sessions.begin() as session:
            yield session

    def get_deployment(self, name: str) -> Deployment | None:
        with self.session() as session:
            return session.get(Deployment, name)

    def put_deployment(self, name: str, version: int, state: DeploymentState, reason: str | None) -> Deployment:
        """Writes the row, new or not."""
        with self.session() as session:
            return session.merge(
                Deployment(name=name, version=version, state=state, reason=reason, updated_at=time.time())
            )

    def delete_deployment(self, name: str) -> None:
        with self.session() as session:
            session.execute(sa.delete(Deployment).filter_by(name=name))

    def list_deployments(self) -> list[Deployment]:
        with self.session() as session:
            return list(session.scalars(sa.select(Deployment).order_by(Deployment.name)))

    def close(self) -> None:
        self.engine.dispose()


def _sqlite_pragmas(connection: Any, _: Any) -> None:
    """Readers beside a writer, waiting instead of failing, and commits that survive a power cut."""
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "busy_timeout=10000", "foreign_keys=ON", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def migrate(engine: sa.Engine) -> None:
    """Brings the schema to the newest version, or leaves it as it was."""
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.connect() as connection:
        if sqlite := engine.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")  # a table is altered by dropping and renaming it
            connection.commit()
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # Python's driver begins none for a change of the schema
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")
        connection.commit()
        if sqlite:
            connection.exec_driver_sql("PRAGMA foreign_keys=ON")
