"""Webhooks and their deliveries in requests and answers. Times are ISO 8601 in UTC."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from service.store import TERMINAL, Delivery, DeliveryState, JobState, Webhook
from service.webhook_targets import MOST_CHARACTERS

PING = "webhook.ping"


class NewWebhook(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    url: str = Field(max_length=MOST_CHARACTERS, description="https; http on the machine of the service only.")
    events: list[JobState] = Field(default=list(TERMINAL), min_length=1, description="States that jobs come into.")


class WebhookView(TypedDict):
    """A webhook without its secret."""

    id: str
    project: str
    url: str
    events: list[JobState]
    created_by: str
    created_at: str
    accepted_at: Annotated[str | None, Field(description="When it accepted something last.")]
    disabled_at: Annotated[str | None, Field(description="null: it is told.")]
    reason: Annotated[str | None, Field(description="Why it is disabled.")]


class MadeWebhook(WebhookView):
    secret: Annotated[str, Field(description="By which messages are signed; told here and never again.")]


class WebhookList(TypedDict):
    """The newest first."""

    webhooks: list[WebhookView]


class DeliveryView(TypedDict):
    """One message, and what came of it."""

    number: int
    id: Annotated[str, Field(description="`webhook-id` of the message.")]
    type: Annotated[str, Field(description="`job.` and a state, or `webhook.ping`.")]
    job: str | None
    state: DeliveryState
    attempts: int
    status: Annotated[int | None, Field(description="Of the receiver's last answer.")]
    error: Annotated[str | None, Field(description="Why it was not accepted.")]
    created_at: str
    next_try_at: str | None
    finished_at: str | None


class DeliveryPage(TypedDict):
    """The newest first."""

    deliveries: list[DeliveryView]
    next: Annotated[int | None, Field(description="`cursor` of the following page; null: this is the last.")]


def event_type(kind: str | None) -> str:
    """`type` of a message, by the kind of a JobEvent; None: a ping."""
    return PING if kind is None else f"job.{kind}"


def webhook_view(row: Webhook) -> WebhookView:
    """All that is known of it but the secret."""
    return {
        "id": row.id,
        "project": row.project,
        "url": row.url,
        "events": row.states,
        "created_by": row.created_by,
        "created_at": iso(row.created_at),
        "accepted_at": _iso_or_none(row.accepted_at),
        "disabled_at": _iso_or_none(row.disabled_at),
        "reason": row.reason,
    }


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _iso_or_none(seconds: float | None) -> str | None:
    return None if seconds is None else iso(seconds)


def delivery_view(row: Delivery, kind: str | None, job_id: str | None) -> DeliveryView:
    return {
        "number": row.number,
        "id": row.id,
        "type": event_type(kind),
        "job": job_id,
        "state": row.state,
        "attempts": row.attempts,
        "status": row.status,
        "error": row.error,
        "created_at": iso(row.created_at),
        "next_try_at": iso(row.next_try_at) if row.state == "PENDING" else None,
        "finished_at": _iso_or_none(row.finished_at),
    }
