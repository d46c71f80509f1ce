"""Profiles of versions: what retrieval keeps of an adapter's training prompts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003_retrieval"
down_revision = "0002_tenancy"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "profiles",
        sa.Column("version_id", ID, sa.ForeignKey("versions.id"), primary_key=True),
        sa.Column("encoder_id", sa.String(100), primary_key=True),
        sa.Column("num_samples", sa.Integer, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.CheckConstraint("num_samples > 0", name=op.f("ck_profiles_has_samples")),
        sa.Index(None, "encoder_id"),
    )


def downgrade() -> None:
    op.drop_table("profiles")
