"""The registry's tables. Rows of versions and files are never changed or deleted: triggers in the migration see to it.

Why a row per blob and leases: a blob that a publish counts on must not be collected between its check and its commit.
Times are seconds since 1970 (UTC), JSON is canonical text: both read alike on SQLite and PostgreSQL.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
    select,
    text,
    update,
)

from loramux.registry.db import metadata

# SQLite counts up by itself only in a column of exactly this type.
Id = BigInteger().with_variant(Integer, "sqlite")
LIVE: dict[str, Any] = {
    f"{dialect}_where": text("deleted_at IS NULL") for dialect in ("sqlite", "postgresql")
}

generation = Table(
    "generation",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("value", BigInteger, nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)

adapters = Table(
    "adapters",
    metadata,
    Column("id", Id, primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("name", String(128), nullable=False),
    # Only ever rises, also when versions are deleted: a number is never given out twice.
    Column("last_version", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("tenant", "name"),
)

versions = Table(
    "versions",
    metadata,
    Column("id", Id, primary_key=True),
    Column("adapter_id", ForeignKey("adapters.id"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("base_digest", String(64)),
    Column("method", String(64), nullable=False),
    Column("servability", String(32), nullable=False),
    Column("max_rank", Integer, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("num_files", Integer, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("provenance", Text, nullable=False),
    Column("search_text", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("created_by", String(200), nullable=False),
    Column("deleted_at", Float),
    Column("deleted_by", String(200)),
    UniqueConstraint("adapter_id", "version"),
    CheckConstraint("version > 0", name="counts_from_one"),
    CheckConstraint("length(digest) = 64", name="digest_is_sha256"),
    Index(None, "digest"),
    Index(None, "base_digest"),
    # The same content twice under one name is one version.
    Index("uq_versions_live_digest", "adapter_id", "digest", unique=True, **LIVE),
)

files = Table(
    "version_files",
    metadata,
    Column("version_id", ForeignKey("versions.id"), primary_key=True),
    Column("path", String(400), primary_key=True),
    Column("sha256", String(64), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Index(None, "sha256"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("adapter_id", ForeignKey("adapters.id"), primary_key=True),
    Column("alias", String(64), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("updated_by", String(200), nullable=False),
    # An alias leads to a version of its own name, or nowhere.
    ForeignKeyConstraint(["adapter_id", "version"], ["versions.adapter_id", "versions.version"]),
)

shares = Table(
    "shares",
    metadata,
    Column("adapter_id", ForeignKey("adapters.id"), primary_key=True),
    Column("tenant", String(63), primary_key=True),
    Column("created_at", Float, nullable=False),
    Column("created_by", String(200), nullable=False),
    Index(None, "tenant"),
)

blobs = Table(
    "blobs",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("num_bytes", BigInteger, nullable=False),
    Column("touched_at", Float, nullable=False),
)

leases = Table(
    "blob_leases",
    metadata,
    Column("token", String(32), primary_key=True),
    Column("sha256", String(64), primary_key=True),
    Column("taken_at", Float, nullable=False),
    Index(None, "sha256"),
)

scores = Table(
    "scores",
    metadata,
    Column("id", Id, primary_key=True),
    Column("version_id", ForeignKey("versions.id"), nullable=False),
    Column("suite", String(100), nullable=False),
    Column("task", String(100), nullable=False),
    Column("value", Float, nullable=False),
    Column("stderr", Float),
    Column("provenance", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("created_by", String(200), nullable=False),
    Index(None, "version_id"),
)

# One row: the registry's own name, which the place of its blobs bears too (`place.py`).
identity = Table("identity", metadata, Column("id", String(32), primary_key=True))


def lock_writers(connection: Connection) -> None:
    """Until this transaction ends no other registry writer goes on. SQLite's transaction has done that already."""
    connection.execute(select(generation.c.value).with_for_update())


def bump(connection: Connection) -> None:
    """Raise the generation with this transaction. Called first: its row lock does what `lock_writers` does."""
    connection.execute(update(generation).values(value=generation.c.value + 1))


def current_generation(connection: Connection) -> int:
    value: int = connection.execute(select(generation.c.value)).scalar_one()
    return value
