"""Makes room for download budgets: how many bytes a second may go into one failure domain."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("cohort_specs") as batch:
        batch.add_column(sa.Column("budget", sa.JSON(), nullable=True))
    op.create_table(
        "download_shares",
        sa.Column("agent_id", sa.String(length=128), nullable=False),
        sa.Column("scope", sa.String(length=64), nullable=False),
        sa.Column("domain", sa.String(length=256), nullable=False),
        sa.Column("rate_bps", sa.Integer(), nullable=False),
        sa.Column("budget_bps", sa.Integer(), nullable=False),
        sa.Column("until", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name=op.f("fk_download_shares_agent_id_agents")),
        sa.PrimaryKeyConstraint("agent_id", name=op.f("pk_download_shares")),
    )
    op.create_index("ix_download_shares_domain", "download_shares", ["scope", "domain"])


def downgrade() -> None:
    op.drop_table("download_shares")
    with op.batch_alter_table("cohort_specs") as batch:
        batch.drop_column("budget")
