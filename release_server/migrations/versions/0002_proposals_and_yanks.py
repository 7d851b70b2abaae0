"""Makes room for proposals, for yanked releases, and for versions that a thief has run forward."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "proposals",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("signers", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("created_by", sa.String(length=128), nullable=False),
        sa.Column("expires_at", sa.DateTime(), nullable=False),
        sa.Column("closed_at", sa.DateTime(), nullable=True),
        sa.Column("closed_by", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_proposals")),
    )
    op.create_index(op.f("ix_proposals_version"), "proposals", ["version"], unique=False)
    op.create_index(op.f("ix_proposals_state"), "proposals", ["state"], unique=False)
    with op.batch_alter_table("releases") as batch:
        batch.add_column(sa.Column("yanked_at", sa.DateTime(), nullable=True))
        batch.add_column(sa.Column("yanked_by", sa.String(length=128), server_default="", nullable=False))
        batch.add_column(sa.Column("yank_reason", sa.Text(), server_default="", nullable=False))
    with op.batch_alter_table("tuf_metadata") as batch:
        batch.alter_column("version", existing_type=sa.Integer(), type_=sa.BigInteger(), nullable=False)


def downgrade() -> None:
    with op.batch_alter_table("tuf_metadata") as batch:
        batch.alter_column("version", existing_type=sa.BigInteger(), type_=sa.Integer(), nullable=False)
    with op.batch_alter_table("releases") as batch:
        batch.drop_column("yank_reason")
        batch.drop_column("yanked_by")
        batch.drop_column("yanked_at")
    op.drop_table("proposals")
