"""Makes room for the figures before an attempt, and for the watch over a completed rollout."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("attempts") as batch:
        batch.add_column(sa.Column("before", sa.JSON(), server_default="{}", nullable=False))
    with op.batch_alter_table("rollout_status") as batch:
        batch.add_column(sa.Column("excused", sa.JSON(), server_default="[]", nullable=False))
        batch.add_column(sa.Column("watch_until", sa.DateTime(), nullable=True))
        batch.add_column(sa.Column("watch_at", sa.DateTime(), nullable=True))
        batch.create_index("ix_rollout_status_watch_at", ["watch_at"])


def downgrade() -> None:
    with op.batch_alter_table("rollout_status") as batch:
        batch.drop_index("ix_rollout_status_watch_at")
        batch.drop_column("watch_at")
        batch.drop_column("watch_until")
        batch.drop_column("excused")
    with op.batch_alter_table("attempts") as batch:
        batch.drop_column("before")
