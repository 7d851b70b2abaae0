"""Ties every audit entry to the one before it, those that are there too."""

from __future__ import annotations

from datetime import UTC

import sqlalchemy as sa
from alembic import op

from agent_core.clock import iso
from release_server.audit_chain import FIRST, SAID, Head, link

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

AUDIT = sa.table(
    "audit",
    sa.column("id", sa.Integer()),
    sa.column("at", sa.DateTime()),
    sa.column("actor", sa.String()),
    sa.column("action", sa.String()),
    sa.column("subject", sa.String()),
    sa.column("detail", sa.JSON()),
    sa.column("previous", sa.String()),
    sa.column("hash", sa.String()),
)


def upgrade() -> None:
    with op.batch_alter_table("audit") as batch:
        batch.add_column(sa.Column("previous", sa.String(length=64), server_default=FIRST, nullable=False))
        batch.add_column(sa.Column("hash", sa.String(length=64), server_default=FIRST, nullable=False))
    head_table = op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("entry", sa.Integer(), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_head")),
    )
    head = _chain(op.get_bind())
    op.bulk_insert(head_table, [{"id": 1, "entry": head.id, "hash": head.hash}])
    with op.batch_alter_table("audit") as batch:
        batch.alter_column("previous", existing_type=sa.String(length=64), server_default=None)
        batch.alter_column("hash", existing_type=sa.String(length=64), server_default=None)


def _chain(connection: sa.Connection) -> Head:
    head = Head()
    while rows := connection.execute(_following(head.id)).mappings().all():
        for row in rows:
            entry = {name: row[name] for name in SAID} | {"at": iso(row["at"].replace(tzinfo=UTC))}
            made = link(head.hash, entry)
            change = sa.update(AUDIT).where(AUDIT.c.id == row["id"])
            connection.execute(change.values(previous=head.hash, hash=made))
            head = Head(row["id"], made)
    return head


def _following(number: int) -> sa.Select[tuple[object, ...]]:
    columns = [AUDIT.c[name] for name in SAID]
    return sa.select(*columns).where(AUDIT.c.id > number).order_by(AUDIT.c.id).limit(1000)


def downgrade() -> None:
    op.drop_table("audit_head")
    with op.batch_alter_table("audit") as batch:
        batch.drop_column("hash")
        batch.drop_column("previous")
