"""Priorities of jobs, quotas and shares of projects."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0004"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("needs", sa.JSON, nullable=False, server_default="{}"))
        jobs.add_column(sa.Column("most_gpus", sa.Double, nullable=False, server_default="0"))
        jobs.add_column(sa.Column("rank", sa.Integer, nullable=False, server_default="0"))
        jobs.add_column(sa.Column("gives_way", sa.Boolean, nullable=False, server_default=sa.false()))
        jobs.add_column(sa.Column("workload", sa.String(64)))
        jobs.create_index("ix_jobs_workload", ["workload"])
    jobs_ = sa.table(
        "jobs", *(sa.column(name) for name in ("number", "cpus", "gpus", "most_gpus")), sa.column("needs", sa.JSON)
    )
    rows = op.get_bind().execute(sa.select(jobs_.c.number, jobs_.c.cpus, jobs_.c.gpus)).all()
    for number, cpus, gpus in rows:
        needs = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        op.execute(jobs_.update().where(jobs_.c.number == number).values(needs=needs, most_gpus=gpus))
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("gpus")
        jobs.drop_column("cpus")
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
        for name in ("cpus", "gpus"):
            jobs.add_column(sa.Column(name, sa.Double, nullable=False, server_default="0"))
        jobs.drop_index("ix_jobs_workload")
        for name in ("workload", "gives_way", "rank", "most_gpus", "needs"):
            jobs.drop_column(name)
