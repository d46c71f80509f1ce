"""What Alembic runs: migrations on the connection it was given, inside the caller's transaction."""

from __future__ import annotations

from alembic import context

from loramux.registry.db import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
