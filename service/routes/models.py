"""/v1/models: what is registered, from which job, how good, and whether it is served."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter

from service.access import CallerDep
from service.parts import PartsDep, RegistryDep
from service.store import ModelVersion

router = APIRouter(prefix="/v1/models", tags=["models"])


def _version(row: ModelVersion) -> dict[str, Any]:
    return {
        "name": row.name,
        "version": row.version,
        "kind": row.kind,
        "job_id": row.job_id,
        "created_at": datetime.fromtimestamp(row.created_at, UTC).isoformat(),
    }


@router.get("")
def list_models(registry: RegistryDep, caller: CallerDep) -> dict[str, Any]:
    """The newest version of every name that the token sees."""
    return {"models": [_version(row) for row in registry.newest(caller.project)]}


@router.get("/{name}")
def get(name: str, parts: PartsDep) -> dict[str, Any]:
    """All versions, the card of the newest, and whether and which one is served."""
    versions = parts.registry.versions(name)
    return _version(versions[0]) | {
        "card": versions[0].card,
        "versions": [_version(row) for row in versions],
        "deployment": parts.deployments.view(name),
    }
