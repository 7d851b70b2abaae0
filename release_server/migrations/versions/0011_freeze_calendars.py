"""Makes room for what freezes a cohort by the calendar."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("cohort_specs", sa.Column("calendar", sa.JSON(), nullable=False, server_default="{}"))


def downgrade() -> None:
    with op.batch_alter_table("cohort_specs") as table:
        table.drop_column("calendar")
