"""Makes room for the ends of freezes as far as others were told, and has what a calendar freezes told."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from agent_core import clock

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("cohort_status", sa.Column("frozen_until", sa.DateTime(), nullable=True))
    op.add_column("cohort_status", sa.Column("frozen_by_hand_until", sa.DateTime(), nullable=True))
    specs = sa.table(
        "cohort_specs",
        *(sa.column(name, sa.Integer) for name in ("cohort_id", "revision")),
        sa.column("frozen_until", sa.DateTime),
        sa.column("calendar", sa.JSON),
    )
    status = sa.table(
        "cohort_status",
        sa.column("cohort_id", sa.Integer),
        sa.column("frozen_by_hand", sa.Boolean),
        *(sa.column(name, sa.DateTime) for name in ("frozen_by_hand_until", "due_at")),
    )
    other = specs.alias()
    newest = sa.select(sa.func.max(other.c.revision)).where(other.c.cohort_id == specs.c.cohort_id)
    is_newest = specs.c.revision == newest.scalar_subquery()
    until = sa.select(specs.c.frozen_until).where(specs.c.cohort_id == status.c.cohort_id, is_newest)
    op.execute(
        sa.update(status).where(status.c.frozen_by_hand).values(frozen_by_hand_until=until.scalar_subquery())
    )
    # 0018 could not know what a calendar freezes: the next tick finds that, and tells it.
    by_calendar = sa.select(specs.c.cohort_id).where(is_newest, sa.cast(specs.c.calendar, sa.Text) != "{}")
    op.execute(
        sa.update(status)
        .where(status.c.cohort_id.in_(by_calendar))
        .values(due_at=clock.now().replace(tzinfo=None))
    )


def downgrade() -> None:
    with op.batch_alter_table("cohort_status") as status:
        status.drop_column("frozen_by_hand_until")
        status.drop_column("frozen_until")
