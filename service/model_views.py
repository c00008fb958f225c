"""Registered models and their predictions in answers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from service.declarations import Shown
from service.store import DeploymentState, ModelVersion


class VersionView(TypedDict):
    """One version of a name; it never changes."""

    name: str
    version: int
    kind: Annotated[str, Field(description="encoder, classifier")]
    job_id: Annotated[str, Field(description="That left it.")]
    created_at: str


class ModelPage(TypedDict):
    """The newest version of every name."""

    models: list[VersionView]


class DeploymentView(TypedDict):
    model: Annotated[str, Field(description="name@version of what is served, or about to be.")]
    state: DeploymentState
    reason: Annotated[str | None, Field(description="Why it FAILED.")]


class ModelView(VersionView):
    """The newest version, and the others."""

    card: Annotated[dict[str, Any], Field(description="Facts of the artifact: spec, classes, image size, results, ...")]
    versions: Annotated[list[VersionView], Field(description="Newest first.")]
    deployment: Annotated[DeploymentView | None, Field(description="null: it is not served.")]


class Classification(TypedDict):
    label: str
    index: int
    probabilities: Annotated[dict[str, float], Field(description="Of the 5 most probable classes.")]


class _Answer(TypedDict):
    model: Annotated[str, Field(description="name@version of what answered.")]


# What the replica computed is not looked through once more: 256 images are 200,000 numbers.
class PredictAnswer(_Answer):
    outputs: Annotated[list[Any], Shown(list[Classification]), Field(description="One for each image, in order.")]


class EmbedAnswer(_Answer):
    outputs: Annotated[list[Any], Shown(list[list[float]]), Field(description="Features of each image, in order.")]


class ReconstructAnswer(_Answer):
    outputs: Annotated[
        list[Any],
        Shown(list[dict[str, str]]),
        Field(description="Of each image what the method draws, PNG in base64; of MAE `original`, `masked`, ..."),
    ]


def version_view(row: ModelVersion) -> VersionView:
    return {
        "name": row.name,
        "version": row.version,
        "kind": row.kind,
        "job_id": row.job_id,
        "created_at": datetime.fromtimestamp(row.created_at, UTC).isoformat(),
    }
