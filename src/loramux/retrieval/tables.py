"""The table of profiles, beside the registry's own: one per version and encoder.

Why the encoder is part of the key: vectors of two encoders are never compared. A new encoder's profiles are filled in
beside the old ones before a retriever changes over; the empty text stands for "lexical only".
"""

from __future__ import annotations

from sqlalchemy import (
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
)

from loramux.registry.db import metadata

profiles = Table(
    "profiles",
    metadata,
    Column("version_id", ForeignKey("versions.id"), primary_key=True),
    Column("encoder_id", String(100), primary_key=True),
    Column("num_samples", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),
    # Changes with the body, so that a reader sees a replaced profile without reading it.
    Column("sha256", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    CheckConstraint("num_samples > 0", name="has_samples"),
    Index(None, "encoder_id"),
)
