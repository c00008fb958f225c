"""/v1/models: what is registered, from which job, how good, and whether it is served."""

from __future__ import annotations

from fastapi import APIRouter

from service.access import CallerDep
from service.model_views import ModelPage, ModelView, version_view
from service.parts import PartsDep, RegistryDep

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(registry: RegistryDep, caller: CallerDep) -> ModelPage:
    """The newest version of every name that the token sees."""
    return {"models": [version_view(row) for row in registry.newest(caller.project)]}


@router.get("/{name}")
def get_model(name: str, parts: PartsDep) -> ModelView:
    """All versions, the card of the newest, and whether and which one is served."""
    versions = parts.registry.versions(name)
    return {
        **version_view(versions[0]),
        "card": versions[0].card,
        "versions": [version_view(row) for row in versions],
        "deployment": parts.deployments.view(name),
    }
