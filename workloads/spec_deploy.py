"""DeploySpec: an entry of a submitted list that has a model served; nothing of it runs on the cluster."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from workloads.spec import JobName, JobReference
from workloads.spec_training import Strict


class Deploy(Strict):
    """Which model.

    Attributes:
        model: a name in the registry.
        version: None: the one that the last job before it registers, or the newest that there is.
    """

    model: JobName
    version: int | None = Field(default=None, ge=1)


class DeploySpec(Strict):
    """`deploy: {model: NAME}` in place of a method; it has succeeded when the model answers."""

    name: JobName
    deploy: Deploy
    after: list[JobReference] = []


def is_deploy(document: Any) -> bool:
    """Whether a document is to be a DeploySpec."""
    return isinstance(document, dict) and "deploy" in document
