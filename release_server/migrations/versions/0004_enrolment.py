"""Makes room for agents that wait to be accepted, and for what a token says of those it enrols."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("tokens") as batch:
        batch.add_column(sa.Column("approve", sa.Boolean(), server_default=sa.false(), nullable=False))
        batch.add_column(sa.Column("cohort", sa.String(length=64), nullable=True))
        batch.add_column(sa.Column("labels", sa.JSON(), server_default="{}", nullable=False))
    with op.batch_alter_table("agents") as batch:
        batch.add_column(sa.Column("pending", sa.Boolean(), server_default=sa.false(), nullable=False))
        batch.add_column(sa.Column("token_id", sa.Integer(), nullable=True))
        batch.create_foreign_key("fk_agents_token_id_tokens", "tokens", ["token_id"], ["id"])


def downgrade() -> None:
    with op.batch_alter_table("agents") as batch:
        batch.drop_constraint("fk_agents_token_id_tokens", type_="foreignkey")
        batch.drop_column("token_id")
        batch.drop_column("pending")
    with op.batch_alter_table("tokens") as batch:
        batch.drop_column("labels")
        batch.drop_column("cohort")
        batch.drop_column("approve")
