"""The database: jobs and their events, models, deployments, who may what, and who is told.

The table of jobs is the truth; Ray is the engine.

SQLite by default, PostgreSQL by URL.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, WriteOnlyMapped, mapped_column, sessionmaker

from service import postgres, sqlite
from service.migrate import migrate, migrate_when_there
from service.principal import DEFAULT_PROJECT, LOCAL, Role

JobState = Literal[
    "QUEUED", "STARTING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELLING", "CANCELLED", "PAUSING", "PAUSED"
]
DeploymentState = Literal["DEPLOYING", "RUNNING", "FAILED"]
DeliveryState = Literal["PENDING", "DELIVERED", "FAILED"]
ACTIVE: tuple[JobState, ...] = ("STARTING", "RUNNING", "PAUSING", "CANCELLING")
TERMINAL: tuple[JobState, ...] = ("SUCCEEDED", "FAILED", "CANCELLED")
SETTLED: tuple[JobState, ...] = (*TERMINAL, "PAUSED")  # nothing to do until somebody asks for it
LONGEST_ID = 80  # of a job
AWAY = (OperationalError, sa.exc.TimeoutError)  # the database, or so busy that it is as good as that


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: sa.JSON, list[Any]: sa.JSON}


class Job(Base):
    """One accepted job. Times are seconds since the epoch."""

    __tablename__ = "jobs"
    __table_args__ = (sa.UniqueConstraint("project", "idempotency_key", name="uq_jobs_project_idempotency_key"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)  # order of arrival
    id: Mapped[str] = mapped_column(sa.String(LONGEST_ID), unique=True)
    name: Mapped[str] = mapped_column(sa.String(80))
    spec: Mapped[dict[str, Any]]
    after: Mapped[list[Any]] = mapped_column(default=list)  # ids of jobs that it needs
    held: Mapped[bool] = mapped_column(default=False)  # until these have succeeded and it was checked
    project: Mapped[str] = mapped_column(sa.String(63), default=DEFAULT_PROJECT, index=True)
    owner: Mapped[str] = mapped_column(sa.String(80), default=LOCAL.name)  # the principal that submitted it
    origin: Mapped[str] = mapped_column(sa.String(8))  # "rest", "ray" (`ray job submit`), "outside" (another cluster)
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
    cpus: Mapped[float] = mapped_column(default=0)  # to start; 0: nothing of the cluster, a deployment
    gpus: Mapped[float] = mapped_column(default=0)
    custom: Mapped[dict[str, Any]] = mapped_column(default=dict)  # other resources of Ray
    most_gpus: Mapped[float] = mapped_column(default=0)  # that it may grow to
    rank: Mapped[int] = mapped_column(default=0)  # of its priority
    gives_way: Mapped[bool] = mapped_column(default=False)  # PAUSING for another, to go on by itself
    workload: Mapped[str | None] = mapped_column(sa.String(64), index=True)  # alike in jobs that take equally long
    idempotency_key: Mapped[str | None] = mapped_column(sa.String(200))
    body_hash: Mapped[str | None] = mapped_column(sa.String(64))
    traceparent: Mapped[str | None] = mapped_column(sa.String(55))  # W3C: of the request that submitted it
    revision: Mapped[int] = mapped_column(default=0)

    events: WriteOnlyMapped[JobEvent] = sa.orm.relationship()

    __mapper_args__ = {"version_id_col": revision}  # two writers of one row: the second fails and looks again

    @property
    def workers(self) -> int | list[int] | None:
        """That its spec asks for, or [least, most]; None: a deployment."""
        found: int | list[int] | None = self.spec.get("resources", {}).get("workers")
        return found

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
    __table_args__ = (
        sa.Index(
            "ix_job_events_to_fan_out",
            "id",
            sqlite_where=sa.text("fanned_out = 0"),
            postgresql_where=sa.text("NOT fanned_out"),
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_number: Mapped[int] = mapped_column(sa.ForeignKey("jobs.number"), index=True)
    time: Mapped[float] = mapped_column(default=time.time)
    kind: Mapped[str] = mapped_column(sa.String(16))  # a state of the job
    message: Mapped[str] = mapped_column(sa.Text)
    fanned_out: Mapped[bool] = mapped_column(default=False)  # its deliveries to webhooks are written, if there are any


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
    """What jobs and models belong to, and how much it may have; None: no limit."""

    __tablename__ = "projects"

    name: Mapped[str] = mapped_column(sa.String(63), primary_key=True)
    created_at: Mapped[float] = mapped_column(default=time.time)
    max_gpus: Mapped[float | None]  # of its running jobs together
    max_running: Mapped[int | None]  # jobs at a time
    max_unfinished: Mapped[int | None]  # jobs that it may have in the queue, running and paused
    share: Mapped[float] = mapped_column(default=1.0)  # of the cluster, beside those of others


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


class Webhook(Base):
    """Where events of a project's jobs are sent."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    project: Mapped[str] = mapped_column(sa.String(63), index=True)
    url: Mapped[str] = mapped_column(sa.Text)
    states: Mapped[list[Any]]  # of jobs that it is told of
    secret: Mapped[str] = mapped_column(sa.String(80))  # as it is: a signature cannot be made from a hash
    created_by: Mapped[str] = mapped_column(sa.String(80))
    created_at: Mapped[float]
    accepted_at: Mapped[float | None]  # of the newest delivery that was
    disabled_at: Mapped[float | None]
    reason: Mapped[str | None] = mapped_column(sa.Text)  # why it is disabled


class Delivery(Base):
    """One event to one webhook. Who sends it counts `attempts` up first, and has it until `next_try_at`."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        sa.UniqueConstraint("webhook_id", "event_id"),
        sa.Index("ix_webhook_deliveries_due", "state", "next_try_at"),
        sa.Index("ix_webhook_deliveries_order", "webhook_id", "job_number", "event_id"),
    )

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(sa.String(40), unique=True)  # the same each time it is sent
    webhook_id: Mapped[str] = mapped_column(sa.ForeignKey("webhooks.id"))
    event_id: Mapped[int | None] = mapped_column(sa.ForeignKey("job_events.id"))  # None: a ping
    job_number: Mapped[int | None] = mapped_column(sa.ForeignKey("jobs.number"))
    state: Mapped[DeliveryState] = mapped_column(sa.String(16), default="PENDING")
    attempts: Mapped[int] = mapped_column(default=0)
    status: Mapped[int | None]  # of the last answer
    error: Mapped[str | None] = mapped_column(sa.Text)  # of the last attempt
    created_at: Mapped[float]
    next_try_at: Mapped[float]
    finished_at: Mapped[float | None]


class Store:
    """Sessions on one database, migrated on construction."""

    def __init__(self, url: str, patience_s: float = 0.0) -> None:
        """Opens the database.

        Args:
            url: of it, SQLAlchemy's.
            patience_s: for which a server that is away, and may come, is waited for.

        Raises:
            SQLAlchemyError: it cannot be opened.
            NewerDatabase: a newer version of Manta was here.
        """
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # An error tells the statement, not what is in it. A server may have restarted since the last session.
        is_sqlite = url.startswith("sqlite")
        options = {} if is_sqlite else {"pool_pre_ping": True, "pool_timeout": postgres.POOL_S}
        self.engine = sa.create_engine(url, hide_parameters=True, **options)
        if is_sqlite:
            sqlite.set_up(self.engine)
        else:
            postgres.bound(self.engine)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        try:
            if is_sqlite:
                migrate(self.engine)
            else:
                migrate_when_there(postgres.unbound(url), patience_s)
        except BaseException:
            self.engine.dispose()
            raise

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
