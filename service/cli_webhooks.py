"""`manta webhook`: who is told when a job changes its state."""

from __future__ import annotations

from typing import Annotated

import typer

from service.client import TERMINAL
from service.terminal import AsJson, connected, err, out, show_json, show_table

webhook_app = typer.Typer(help="Who is told when a job changes its state.", no_args_is_help=True)

WebhookId = Annotated[str, typer.Argument(help="As `manta webhook list` shows it.")]


@webhook_app.command()
def create(
    url: Annotated[str, typer.Argument(help="https://HOST/PATH that takes POST requests.")],
    event: Annotated[list[str], typer.Option(help="A state, such as failed; may be repeated.")] = list(TERMINAL),  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Makes a webhook and prints its secret, this once."""
    with connected() as client:
        made = client.create_webhook(url, events=[state.upper() for state in event])
    if as_json:
        show_json(made)
        return
    text = f"{made['id']}: told of {', '.join(made['events'])} in {made['project']}. Its secret is not shown again:"
    err.print(text, markup=False, highlight=False)
    out.print(made["secret"], markup=False, highlight=False)


@webhook_app.command("list")
def list_webhooks(as_json: AsJson = False) -> None:
    """Lists webhooks, without their secrets, the newest first."""
    with connected() as client:
        found = client.webhooks()
    if as_json:
        show_json(found)
        return
    rows = [[h["id"], h["project"], h["url"], ",".join(h["events"]), (h["accepted_at"] or "")[:19]] for h in found]
    reasons = [[f"disabled: it {h['reason']}" if h["disabled_at"] else ""] for h in found]
    show_table(
        ["id", "project", "url", "events", "accepted", "state"], [a + b for a, b in zip(rows, reasons, strict=True)]
    )


@webhook_app.command()
def delete(webhook_id: WebhookId) -> None:
    """Ends a webhook."""
    with connected() as client:
        client.delete_webhook(webhook_id)
    out.print(f"{webhook_id} is deleted")


@webhook_app.command()
def test(webhook_id: WebhookId) -> None:
    """Sends a ping; where it is accepted, a webhook that was disabled goes on."""
    with connected() as client:
        sent = client.test_webhook(webhook_id)
    out.print(f"{sent['id']} is on its way: `manta webhook deliveries {webhook_id}`", markup=False, highlight=False)


@webhook_app.command()
def deliveries(
    webhook_id: WebhookId, limit: Annotated[int, typer.Option(min=1, max=500)] = 50, as_json: AsJson = False
) -> None:
    """Lists what was sent, or is to be, and what came of it; the newest first."""
    with connected() as client:
        found = client.deliveries(webhook_id, limit=limit)
    if as_json:
        show_json(found)
        return
    columns = ["created_at", "id", "type", "job", "state", "attempts", "status", "error"]
    show_table(columns, [[d[c][:19] if c == "created_at" else d[c] for c in columns] for d in found])
