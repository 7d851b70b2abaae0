"""Makes room for what the pruner remembers, and lets it find what is old without reading all of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "prunings",
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("cursor", sa.String(length=128), server_default="", nullable=False),
        sa.Column("under_way", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("removed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("finished_at", sa.DateTime(), nullable=True),
        sa.PrimaryKeyConstraint("kind", name="pk_prunings"),
    )
    op.add_column("rollouts", sa.Column("pruned_at", sa.DateTime(), nullable=True))
    op.create_index("ix_agents_token_id", "agents", ["token_id"])
    op.create_index("ix_tuf_metadata_created", "tuf_metadata", ["role", "created_at", "version"])


def downgrade() -> None:
    op.drop_index("ix_tuf_metadata_created", "tuf_metadata")
    op.drop_index("ix_agents_token_id", "agents")
    with op.batch_alter_table("rollouts") as table:
        table.drop_column("pruned_at")
    op.drop_table("prunings")
