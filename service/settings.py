"""The settings of the service; the only reader of the environment in it."""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import platformdirs
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from cluster.job_environment import OF_JOBS, foreign
from workloads.log_lines import LogFormat

# Another node of the cluster may have these.
OURS = ("MANTA_DATABASE_URL", "MANTA_FIRST_ADMIN_TOKEN_FILE", "MANTA_METRICS_TOKEN_FILE", "MANTA_TOKEN")
OLD = ("MANTA_CLUSTER_CPUS", "MANTA_CLUSTER_GPUS", "MANTA_CLUSTER_CUSTOM")  # sums over all nodes


def _words(value: Any) -> Any:
    """`/data, s3://bucket` -> its words: a list in an environment variable needs no JSON."""
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)]


class NodeGroup(BaseModel):
    """Nodes of one size that an autoscaler may make.

    Attributes:
        count: at most.
        resources: of each, by the names of Ray.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(ge=0)
    resources: dict[str, Annotated[float, Field(ge=0)]]


class Settings(BaseSettings):
    """Each field is a variable `MANTA_<NAME>`; built once, in the CLI or the replica, and passed down.

    Attributes:
        home: folder of the installation: database, runs, registry.
        database_url: SQLAlchemy's; default: SQLite in the home folder. May hold a password, so it is never shown.
        ray_dashboard_url: where Ray's Jobs API is.
        reconcile_interval_s: between two looks at all jobs.
        max_attempts: of a job, in a row without progress.
        stop_grace_s: from SIGTERM to SIGKILL: time for a checkpoint.
        cluster_nodes: that an autoscaler may make, as JSON: [{"count": 4, "resources": {"CPU": 96, "GPU": 8}}]. Without
            any, those that are there, or were within a day, are all.
        max_running_jobs: whose drivers the head holds at once; more wait. 0: as many as its memory does, 0.46 GiB each.
        preemption: a job for which there is no room pauses running ones of lower priority.
        predictor_cpus: reserved by each served model, so that an autoscaler does not end its node as idle.
        log_format: text: lines for people; json: an object a line, for what collects logs; also of jobs.
        host: address the front end listens on. Beyond loopback it does not start without a token.
        tokens: auto: asked for as soon as there is one; required: always, so that an empty database opens nothing.
        metrics_token_file: holds a token that becomes a viewer of all projects: the one that Prometheus sends. When it
            changes, the one before is revoked.
        first_admin_token_file: holds a token (32 characters or more, of a secret store) that becomes an admin of all
            projects when the database has none yet.
        allowed_roots: folders and URL prefixes (`/data, s3://bucket/prefix`) that jobs may read, `*` for any. Not set:
            any while there are no tokens, none afterwards.
        mirror_roots: the same of those that `checkpoint.mirror` may name, which jobs write to; nothing else is written
            by name. Not set: any while there are neither tokens nor `allowed_roots`, none afterwards.
        job_credentials: patterns of variables that jobs may have although they look like secrets; others that do are
            kept from them.
        cors_origins: web pages of other origins whose scripts may call the service.
        webhook_hosts: hosts (`ci.internal 127.0.0.1`) that webhooks may name although their addresses are private.
        requests_per_s: of each token, and with wrong ones of each address, in the long run.
        request_burst: the same at once; above it 429.
        max_body_bytes: of a request with images; of others it may be less (`service.documents`).
        upload_timeout_s: in which its body has to arrive.
        max_images: in a request.
        max_image_pixels: width times height of an image in a request.
    """

    model_config = SettingsConfigDict(
        env_prefix="MANTA_",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,  # a URL of the database with its password, say
    )

    home: Path = Field(default_factory=lambda: Path(platformdirs.user_data_dir("manta")))
    database_url: SecretStr = SecretStr("")
    ray_dashboard_url: str = "http://127.0.0.1:8265"
    reconcile_interval_s: float = Field(default=1.0, gt=0)
    max_attempts: int = Field(default=5, ge=1)
    stop_grace_s: int = Field(default=60, ge=1)
    cluster_nodes: tuple[NodeGroup, ...] = ()
    max_running_jobs: int = Field(default=0, ge=0)
    preemption: bool = False
    predictor_cpus: float = Field(default=0, ge=0)

    log_format: LogFormat = "text"
    host: str = "127.0.0.1"
    tokens: Literal["auto", "required"] = "auto"
    first_admin_token_file: Path | None = None
    metrics_token_file: Path | None = None
    allowed_roots: Words | None = None
    mirror_roots: Words | None = None
    job_credentials: Words = OF_JOBS
    cors_origins: Words = ()
    webhook_hosts: Words = ()
    requests_per_s: float = Field(default=100, gt=0)
    request_burst: int = Field(default=200, ge=1)
    max_body_bytes: int = Field(default=64 << 20, ge=1 << 10)
    upload_timeout_s: float = Field(default=60, gt=0)
    max_images: int = Field(default=256, ge=1)
    max_image_pixels: int = Field(default=64_000_000, ge=1)

    @model_validator(mode="after")
    def _knows_its_cluster(self) -> Self:
        """Without the nodes a cluster would be taken for one that does not grow."""
        if old := [name for name in OLD if name in os.environ]:
            raise ValueError(
                f"got {', '.join(old)}, which no version reads any more, expected MANTA_CLUSTER_NODES; "
                'set it to the nodes that may come, as [{"count": 4, "resources": {"CPU": 96, "GPU": 8}}], and unset it'
            )
        return self

    @property
    def runs(self) -> Path:
        return self.home / "runs"

    @property
    def registry(self) -> Path:
        return self.home / "registry"

    @property
    def database(self) -> str:
        return self.database_url.get_secret_value() or f"sqlite:///{self.home / 'manta.db'}"

    def kept_from_jobs(self) -> list[str]:
        """Variables that no job may see: what looks like a secret in this process, and our own wherever they are."""
        return [*OURS, *foreign(os.environ, self.job_credentials)]

    @property
    def local(self) -> bool:
        """Whether the front end listens on loopback only."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine's loopback."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
