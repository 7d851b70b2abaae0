"""Makes room for the times in which no web process, or no jobs process, was there."""

from __future__ import annotations

from datetime import UTC, timedelta

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

GONE = timedelta(days=30)


def upgrade() -> None:
    op.add_column("locks", sa.Column("gaps", sa.JSON(), nullable=False, server_default="[]"))
    locks = sa.table(
        "locks", sa.column("name", sa.String), sa.column("since", sa.DateTime), sa.column("gaps", sa.JSON)
    )
    connection = op.get_bind()
    known = sa.select(locks.c.name, locks.c.since).where(locks.c.since.is_not(None))
    for name, since in connection.execute(known).all():
        # When that gap began was not kept: nobody is found silent for having been quiet before its end.
        gap = [(moment.replace(tzinfo=UTC)).isoformat() for moment in (since - GONE, since)]
        connection.execute(sa.update(locks).where(locks.c.name == name).values(gaps=[gap]))


def downgrade() -> None:
    with op.batch_alter_table("locks") as locks:
        locks.drop_column("gaps")
