"""Makes room for the terms of a rollout and for a second person's approval of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("rollout_specs") as batch:
        batch.add_column(sa.Column("terms", sa.JSON(), server_default="{}", nullable=False))
        batch.add_column(sa.Column("approved", sa.String(length=64), server_default="", nullable=False))
    with op.batch_alter_table("cohort_specs") as batch:
        batch.add_column(sa.Column("approval", sa.Boolean(), server_default=sa.false(), nullable=False))


def downgrade() -> None:
    with op.batch_alter_table("cohort_specs") as batch:
        batch.drop_column("approval")
    with op.batch_alter_table("rollout_specs") as batch:
        batch.drop_column("approved")
        batch.drop_column("terms")
