"""Makes room for which freezes of a cohort stand as far as others were told."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from agent_core import clock

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("cohort_status", sa.Column("frozen_by", sa.String(64), nullable=True))
    op.add_column(
        "cohort_status",
        sa.Column("frozen_by_hand", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    specs = sa.table(
        "cohort_specs",
        *(sa.column(name, sa.Integer) for name in ("cohort_id", "revision")),
        sa.column("frozen", sa.Boolean),
        sa.column("frozen_until", sa.DateTime),
    )
    status = sa.table(
        "cohort_status", sa.column("cohort_id", sa.Integer), sa.column("frozen_by_hand", sa.Boolean)
    )
    other = specs.alias()
    newest = sa.select(sa.func.max(other.c.revision)).where(other.c.cohort_id == specs.c.cohort_id)
    stands = specs.c.frozen_until.is_(None) | (specs.c.frozen_until > clock.now().replace(tzinfo=None))
    frozen = sa.select(specs.c.cohort_id).where(
        specs.c.revision == newest.scalar_subquery(), specs.c.frozen, stands
    )
    op.execute(sa.update(status).where(status.c.cohort_id.in_(frozen)).values(frozen_by_hand=sa.true()))


def downgrade() -> None:
    counters = sa.table("rollout_counters", sa.column("state", sa.String))
    op.execute(sa.delete(counters).where(counters.c.state == "sent-back"))  # older code knows attempts alone
    with op.batch_alter_table("cohort_status") as status:
        status.drop_column("frozen_by_hand")
        status.drop_column("frozen_by")
