"""Keeps with each revision who pinned and froze the cohort and why, which later edits are not about."""

from __future__ import annotations

from datetime import UTC
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

SPECS = sa.table(
    "cohort_specs",
    *(sa.column(name, sa.Integer) for name in ("id", "cohort_id", "revision")),
    *(sa.column(name, sa.String) for name in ("pin", "actor", "reason")),
    sa.column("frozen", sa.Boolean),
    *(sa.column(name, sa.DateTime) for name in ("frozen_until", "created_at")),
    sa.column("because", sa.JSON),
)


def upgrade() -> None:
    op.add_column("cohort_specs", sa.Column("because", sa.JSON(), nullable=False, server_default="{}"))
    connection = op.get_bind()
    before: Any = None
    because: dict[str, dict[str, str]] = {}
    for row in connection.execute(sa.select(SPECS).order_by(SPECS.c.cohort_id, SPECS.c.revision)).all():
        same = before is not None and before.cohort_id == row.cohort_id
        stood = _stands(before) if same else {}
        stands = _stands(row)
        because = {
            act: because[act] if stood.get(act) == what else _said(row) for act, what in stands.items()
        }
        if because:
            connection.execute(sa.update(SPECS).where(SPECS.c.id == row.id).values(because=because))
        before = row


def _stands(row: Any) -> dict[str, Any]:
    """What stands at a revision, by the act that made it so."""
    pinned = {"pin": row.pin} if row.pin else {}
    return pinned | ({"freeze": (True, row.frozen_until)} if row.frozen else {})


def _said(row: Any) -> dict[str, str]:
    at = row.created_at.replace(tzinfo=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"actor": row.actor, "reason": row.reason, "at": at}


def downgrade() -> None:
    with op.batch_alter_table("cohort_specs") as specs:
        specs.drop_column("because")
