"""Runs the migrations over the connection that `release_server.database.upgrade` opened."""

from __future__ import annotations

from alembic import context

from release_server.models import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    compare_type=True,
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()
