"""A registry's own name, which the place of its blobs bears as well."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0004_identity"
down_revision = "0003_retrieval"
branch_labels = None
depends_on = None


def upgrade() -> None:
    table = op.create_table("identity", sa.Column("id", sa.String(32), primary_key=True))
    op.bulk_insert(table, [{"id": secrets.token_hex(16)}])


def downgrade() -> None:
    op.drop_table("identity")
