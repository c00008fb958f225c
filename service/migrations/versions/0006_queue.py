"""Priorities of jobs, quotas and shares of projects."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("custom", sa.JSON, nullable=False, server_default="{}"))
        jobs.add_column(sa.Column("most_gpus", sa.Double, nullable=False, server_default="0"))
        jobs.add_column(sa.Column("rank", sa.Integer, nullable=False, server_default="0"))
        jobs.add_column(sa.Column("gives_way", sa.Boolean, nullable=False, server_default=sa.false()))
        jobs.add_column(sa.Column("workload", sa.String(64)))
        jobs.create_index("ix_jobs_workload", ["workload"])
    op.execute("UPDATE jobs SET most_gpus = gpus")
    with op.batch_alter_table("projects") as projects:
        projects.add_column(sa.Column("max_gpus", sa.Double))
        projects.add_column(sa.Column("max_running", sa.Integer))
        projects.add_column(sa.Column("max_unfinished", sa.Integer))
        projects.add_column(sa.Column("share", sa.Double, nullable=False, server_default="1"))


def downgrade() -> None:
    with op.batch_alter_table("projects") as projects:
        for name in ("share", "max_unfinished", "max_running", "max_gpus"):
            projects.drop_column(name)
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_index("ix_jobs_workload")
        for name in ("workload", "gives_way", "rank", "most_gpus", "custom"):
            jobs.drop_column(name)
