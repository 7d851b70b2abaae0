"""Makes room for what hosts are, and for the agents that wait to be placed after their cohorts changed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("agents") as batch:
        batch.add_column(sa.Column("inventory", sa.JSON(), server_default="{}", nullable=False))
    op.create_table(
        "resettlings",
        sa.Column("product_id", sa.Integer(), nullable=False),
        sa.Column("cursor", sa.String(length=128), nullable=False),
        sa.ForeignKeyConstraint(["product_id"], ["products.id"], name="fk_resettlings_product_id_products"),
        sa.PrimaryKeyConstraint("product_id", name="pk_resettlings"),
    )


def downgrade() -> None:
    op.drop_table("resettlings")
    with op.batch_alter_table("agents") as batch:
        batch.drop_column("inventory")
