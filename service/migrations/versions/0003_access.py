"""Projects, tokens, the audit log; whose each job and model is; idempotency keys by project."""

import time

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

KEY = "uq_jobs_project_idempotency_key"
CONVENTION = {"uq": "%(table_name)s_%(column_0_name)s_key"}  # what PostgreSQL calls a constraint that has no name


def upgrade() -> None:
    projects = op.create_table(
        "projects",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.bulk_insert(projects, [{"name": "default", "created_at": time.time()}])
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(20), primary_key=True),
        sa.Column("name", sa.String(80), nullable=False),
        sa.Column("project", sa.String(63), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
        sa.Column("created_by", sa.String(80), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.Column("revoked_at", sa.Double),
        sa.Column("last_used_at", sa.Double),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("who", sa.String(80), nullable=False),
        sa.Column("token_id", sa.String(20)),
        sa.Column("project", sa.String(63), nullable=False, index=True),
        sa.Column("action", sa.String(120), nullable=False),
        sa.Column("target", sa.String(200), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("status", sa.Integer),
    )
    op.create_table(
        "model_names",
        sa.Column("name", sa.String(80), primary_key=True),
        sa.Column("project", sa.String(63), nullable=False, index=True),
    )
    op.execute("INSERT INTO model_names (name, project) SELECT DISTINCT name, 'default' FROM model_versions")
    with op.batch_alter_table("jobs", naming_convention=CONVENTION) as jobs:
        jobs.add_column(sa.Column("project", sa.String(63), nullable=False, server_default="default"))
        jobs.add_column(sa.Column("owner", sa.String(80), nullable=False, server_default="local"))
        jobs.drop_constraint("jobs_idempotency_key_key", type_="unique")
        jobs.create_unique_constraint(KEY, ["project", "idempotency_key"])
        jobs.create_index("ix_jobs_project", ["project"])


def downgrade() -> None:
    with op.batch_alter_table("jobs", naming_convention=CONVENTION) as jobs:
        jobs.drop_index("ix_jobs_project")
        jobs.drop_constraint(KEY, type_="unique")
        jobs.create_unique_constraint("jobs_idempotency_key_key", ["idempotency_key"])
        jobs.drop_column("owner")
        jobs.drop_column("project")
    for table in ("model_names", "audit", "tokens", "projects"):
        op.drop_table(table)
