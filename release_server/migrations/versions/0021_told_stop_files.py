"""Makes room for what a stop file says, as far as others were told."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("products", sa.Column("stopped", sa.String(200), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("products") as products:
        products.drop_column("stopped")
