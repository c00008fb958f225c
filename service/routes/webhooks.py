"""/v1/webhooks: who is told when a job of a project changes its state."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.access import CallerDep
from service.declarations import Cursor, Limit, answers, refuses
from service.errors import Conflict
from service.parts import PartsDep
from service.routes.jobs import ProjectQuery
from service.webhook_views import (
    DeliveryPage,
    DeliveryView,
    MadeWebhook,
    NewWebhook,
    WebhookList,
    WebhookView,
    webhook_view,
)

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])


@router.get("")
def list_webhooks(parts: PartsDep, caller: CallerDep, project: ProjectQuery = None) -> WebhookList:
    """Those of one project or of all that the token sees, the newest first."""
    chosen = caller.project if project is None else parts.projects.chosen(caller, project)
    return {"webhooks": [webhook_view(row) for row in parts.webhooks.list(chosen)]}


@router.post("", status_code=201, responses=refuses(Conflict) | answers(201, Location="Of the webhook."))
def create_webhook(
    body: NewWebhook,
    parts: PartsDep,
    caller: CallerDep,
    request: Request,
    response: Response,
    project: ProjectQuery = None,
) -> MadeWebhook:
    """Makes a webhook, which is told of what happens from now on. `secret`, told here and never again, checks it."""
    request.state.project = chosen = parts.projects.chosen(caller, project)
    row = parts.webhooks.create(caller, chosen, body.url, body.events)
    response.headers["Location"] = f"/v1/webhooks/{row.id}"
    return {**webhook_view(row), "secret": row.secret}


@router.get("/{webhook_id}")
def get_webhook(webhook_id: str, parts: PartsDep) -> WebhookView:
    """Where it goes, when it accepted something last, and why it is disabled, if it is."""
    return webhook_view(parts.webhooks.get(webhook_id))


@router.delete("/{webhook_id}", status_code=204)
def delete_webhook(webhook_id: str, parts: PartsDep) -> None:
    """Ends it; what it was not told yet it is not told any more."""
    parts.webhooks.delete(webhook_id)


@router.post("/{webhook_id}:test", status_code=202)
def test_webhook(webhook_id: str, parts: PartsDep) -> DeliveryView:
    """Sends a `webhook.ping`, once. A webhook that was disabled is told of events again when it accepts it."""
    return parts.webhooks.test(webhook_id)


@router.get("/{webhook_id}/deliveries")
def list_deliveries(webhook_id: str, parts: PartsDep, limit: Limit = 50, cursor: Cursor = None) -> DeliveryPage:
    """What was sent in the last 30 days, or is to be, newest first; `next`: the following page's cursor, or null."""
    page = parts.webhooks.deliveries(webhook_id, limit=limit, before=cursor)
    return {"deliveries": page, "next": page[-1]["number"] if len(page) == limit else None}
