"""Webhooks, what was sent to them, and which events are yet to be."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

TO_FAN_OUT = "ix_job_events_to_fan_out"


def upgrade() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(20), primary_key=True),
        sa.Column("project", sa.String(63), nullable=False, index=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("states", sa.JSON, nullable=False),
        sa.Column("secret", sa.String(80), nullable=False),
        sa.Column("created_by", sa.String(80), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("accepted_at", sa.Double),
        sa.Column("disabled_at", sa.Double),
        sa.Column("reason", sa.Text),
    )
    op.create_table(
        "webhook_deliveries",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(40), nullable=False, unique=True),
        sa.Column("webhook_id", sa.String(20), sa.ForeignKey("webhooks.id"), nullable=False),
        sa.Column("event_id", sa.Integer, sa.ForeignKey("job_events.id")),
        sa.Column("job_number", sa.Integer, sa.ForeignKey("jobs.number")),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("error", sa.Text),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("next_try_at", sa.Double, nullable=False),
        sa.Column("finished_at", sa.Double),
        sa.UniqueConstraint("webhook_id", "event_id"),
    )
    op.create_index("ix_webhook_deliveries_due", "webhook_deliveries", ["state", "next_try_at"])
    op.create_index("ix_webhook_deliveries_order", "webhook_deliveries", ["webhook_id", "job_number", "event_id"])
    op.add_column("job_events", sa.Column("fanned_out", sa.Boolean, nullable=False, server_default=sa.false()))
    op.execute("UPDATE job_events SET fanned_out = true")  # nobody asked for what has been
    op.create_index(
        TO_FAN_OUT,
        "job_events",
        ["id"],
        sqlite_where=sa.text("fanned_out = 0"),
        postgresql_where=sa.text("NOT fanned_out"),
    )


def downgrade() -> None:
    op.drop_index(TO_FAN_OUT, "job_events")
    with op.batch_alter_table("job_events") as events:
        events.drop_column("fanned_out")
    for table in ("webhook_deliveries", "webhooks"):
        op.drop_table(table)
