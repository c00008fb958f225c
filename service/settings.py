"""The settings of the service; the only reader of the environment in it."""

from __future__ import annotations

from pathlib import Path

import platformdirs
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Each field is a variable `MANTA_<NAME>`; built once, in the CLI or the replica, and passed down."""

    model_config = SettingsConfigDict(env_prefix="MANTA_", extra="ignore", frozen=True)

    home: Path = Field(default_factory=lambda: Path(platformdirs.user_data_dir("manta")))
    database_url: str = ""  # default: SQLite in the home folder
    ray_dashboard_url: str = "http://127.0.0.1:8265"
    reconcile_interval_s: float = Field(default=1.0, gt=0)
    max_body_bytes: int = Field(default=64 << 20, ge=1 << 10)
    max_images: int = Field(default=256, ge=1)
    max_attempts: int = Field(default=5, ge=1)  # in a row without progress
    stop_grace_s: int = Field(default=60, ge=1)  # from SIGTERM to SIGKILL: time for a checkpoint
    cluster_cpus: float = Field(default=0, ge=0)  # that an autoscaler may grow the cluster to; 0: what it has is all
    cluster_gpus: float = Field(default=0, ge=0)
    predictor_cpus: float = Field(default=0, ge=0)  # reserved by each served model; an autoscaler ends idle nodes

    @property
    def runs(self) -> Path:
        return self.home / "runs"

    @property
    def registry(self) -> Path:
        return self.home / "registry"

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'manta.db'}"
