"""Makes room for leases: how many agents of a failure domain may be between two versions at once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("cohort_specs") as batch:
        batch.add_column(sa.Column("lease", sa.JSON(), nullable=True))
    op.create_table(
        "activation_leases",
        sa.Column("agent_id", sa.String(length=128), nullable=False),
        sa.Column("product_id", sa.Integer(), nullable=False),
        sa.Column("scope", sa.String(length=64), nullable=False),
        sa.Column("domain", sa.String(length=256), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("granted_at", sa.DateTime(), nullable=False),
        sa.Column("until", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["agent_id"], ["agents.id"], name=op.f("fk_activation_leases_agent_id_agents")
        ),
        sa.ForeignKeyConstraint(
            ["product_id"], ["products.id"], name=op.f("fk_activation_leases_product_id_products")
        ),
        sa.PrimaryKeyConstraint("agent_id", name=op.f("pk_activation_leases")),
    )
    op.create_index("ix_activation_leases_domain", "activation_leases", ["product_id", "scope", "domain"])


def downgrade() -> None:
    op.drop_table("activation_leases")
    with op.batch_alter_table("cohort_specs") as batch:
        batch.drop_column("lease")
