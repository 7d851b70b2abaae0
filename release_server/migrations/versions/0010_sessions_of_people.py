"""Makes room for people who sign in with a provider."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "person_sessions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("issuer", sa.String(length=512), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("rule", sa.String(length=512), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("attempt", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("used_at", sa.DateTime(), nullable=False),
        sa.Column("expires_at", sa.DateTime(), nullable=False),
        sa.Column("ended_at", sa.DateTime(), nullable=True),
        sa.Column("ended_by", sa.String(length=128), server_default="", nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_person_sessions"),
        sa.UniqueConstraint("hash", name="uq_person_sessions_hash"),
        sa.UniqueConstraint("attempt", name="uq_person_sessions_attempt"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_person_sessions_expires_at", "person_sessions", ["expires_at"])


def downgrade() -> None:
    op.drop_table("person_sessions")
