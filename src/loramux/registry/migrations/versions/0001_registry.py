"""Adapters, immutable versions, aliases, shares, blobs, scores, and the triggers that keep versions as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001_registry"
down_revision = None
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
LIVE: dict[str, Any] = {
    f"{dialect}_where": sa.text("deleted_at IS NULL") for dialect in ("sqlite", "postgresql")
}

# Everything about a version but its tombstone, which is set once.
FIXED = (
    *("id", "adapter_id", "version", "digest", "base_digest", "method", "servability", "max_rank"),
    *("num_bytes", "num_files", "metadata", "provenance", "search_text"),
    *("created_at", "created_by"),
)


def upgrade() -> None:
    _tables_of_versions()
    _tables_around_versions()
    op.execute("INSERT INTO generation (id, value) VALUES (1, 1)")
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    for statement in _sqlite_triggers() if is_sqlite else _postgres_triggers():
        # exec_driver_sql: no ':' or '%' in them is a parameter
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    # Triggers go with their tables.
    for table in (
        *("scores", "blob_leases", "blobs", "shares", "aliases", "version_files"),
        *("versions", "adapters", "generation"),
    ):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        for name, *_ in _rules(""):
            op.execute(f"DROP FUNCTION {name}()")


def _tables_of_versions() -> None:
    op.create_table(
        "generation",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("value", sa.BigInteger, nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_generation_one_row")),
    )
    op.create_table(
        "adapters",
        sa.Column("id", ID, primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("last_version", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.UniqueConstraint("tenant", "name"),
    )
    op.create_table(
        "versions",
        sa.Column("id", ID, primary_key=True),
        sa.Column("adapter_id", ID, sa.ForeignKey("adapters.id"), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("base_digest", sa.String(64)),
        sa.Column("method", sa.String(64), nullable=False),
        sa.Column("servability", sa.String(32), nullable=False),
        sa.Column("max_rank", sa.Integer, nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("num_files", sa.Integer, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("provenance", sa.Text, nullable=False),
        sa.Column("search_text", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("created_by", sa.String(200), nullable=False),
        sa.Column("deleted_at", sa.Float),
        sa.Column("deleted_by", sa.String(200)),
        sa.UniqueConstraint("adapter_id", "version"),
        sa.CheckConstraint("version > 0", name=op.f("ck_versions_counts_from_one")),
        sa.CheckConstraint("length(digest) = 64", name=op.f("ck_versions_digest_is_sha256")),
        sa.Index(None, "digest"),
        sa.Index(None, "base_digest"),
        sa.Index("uq_versions_live_digest", "adapter_id", "digest", unique=True, **LIVE),
    )
    op.create_table(
        "version_files",
        sa.Column("version_id", ID, sa.ForeignKey("versions.id"), primary_key=True),
        sa.Column("path", sa.String(400), primary_key=True),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Index(None, "sha256"),
    )


def _tables_around_versions() -> None:
    op.create_table(
        "aliases",
        sa.Column("adapter_id", ID, sa.ForeignKey("adapters.id"), primary_key=True),
        sa.Column("alias", sa.String(64), primary_key=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("updated_at", sa.Float, nullable=False),
        sa.Column("updated_by", sa.String(200), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id", "version"], ["versions.adapter_id", "versions.version"]
        ),
    )
    op.create_table(
        "shares",
        sa.Column("adapter_id", ID, sa.ForeignKey("adapters.id"), primary_key=True),
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("created_by", sa.String(200), nullable=False),
        sa.Index(None, "tenant"),
    )
    op.create_table(
        "blobs",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("touched_at", sa.Float, nullable=False),
    )
    op.create_table(
        "blob_leases",
        sa.Column("token", sa.String(32), primary_key=True),
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("taken_at", sa.Float, nullable=False),
        sa.Index(None, "sha256"),
    )
    op.create_table(
        "scores",
        sa.Column("id", ID, primary_key=True),
        sa.Column("version_id", ID, sa.ForeignKey("versions.id"), nullable=False),
        sa.Column("suite", sa.String(100), nullable=False),
        sa.Column("task", sa.String(100), nullable=False),
        sa.Column("value", sa.Float, nullable=False),
        sa.Column("stderr", sa.Float),
        sa.Column("provenance", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("created_by", sa.String(200), nullable=False),
        sa.Index(None, "version_id"),
    )


def _rules(differs: str) -> list[tuple[str, str, str, str, str]]:
    """(name, when, table, condition, message) of each trigger; `differs`: the dialect's null-safe inequality."""
    changed = " OR ".join(f"NEW.{column} {differs} OLD.{column}" for column in FIXED)
    alias_gone = (
        "EXISTS (SELECT 1 FROM versions v WHERE v.adapter_id = NEW.adapter_id "
        "AND v.version = NEW.version AND v.deleted_at IS NOT NULL)"
    )
    aliased = (
        "NEW.deleted_at IS NOT NULL AND EXISTS (SELECT 1 FROM aliases a "
        "WHERE a.adapter_id = NEW.adapter_id AND a.version = NEW.version)"
    )
    complete = (
        "(SELECT count(*) FROM version_files f WHERE f.version_id = NEW.version_id) >= "
        "(SELECT num_files FROM versions v WHERE v.id = NEW.version_id)"
    )
    # An INSERT OR REPLACE of SQLite deletes without a DELETE trigger, so inserts are looked at as well.
    again = (
        "EXISTS (SELECT 1 FROM versions v WHERE v.id = NEW.id "
        "OR (v.adapter_id = NEW.adapter_id AND v.version = NEW.version))"
    )
    counts_back = (
        "NEW.id <> OLD.id OR NEW.tenant <> OLD.tenant OR NEW.name <> OLD.name "
        "OR NEW.last_version < OLD.last_version"
    )
    named_again = (
        "EXISTS (SELECT 1 FROM adapters a WHERE a.id = NEW.id "
        "OR (a.tenant = NEW.tenant AND a.name = NEW.name))"
    )
    fixed, kept = "versions are immutable", "versions are never deleted, only marked"
    gone = "an alias may not lead to a deleted version"
    return [
        ("versions_fixed", "UPDATE", "versions", f"OLD.deleted_at IS NOT NULL OR {changed}", fixed),
        ("versions_aliased", "UPDATE", "versions", aliased, "aliases lead to this version"),
        ("versions_kept", "DELETE", "versions", "1 = 1", kept),
        ("version_files_fixed", "UPDATE", "version_files", "1 = 1", fixed),
        ("version_files_kept", "DELETE", "version_files", "1 = 1", fixed),
        ("version_files_complete", "INSERT", "version_files", complete, fixed),
        ("versions_in_turn", "INSERT", "versions", again, fixed),
        ("adapters_count_up", "UPDATE", "adapters", counts_back, "only version numbers rise"),
        ("adapters_in_turn", "INSERT", "adapters", named_again, "this name is there already"),
        ("adapters_kept", "DELETE", "adapters", "1 = 1", "names with versions are never deleted"),
        ("aliases_made", "INSERT", "aliases", alias_gone, gone),
        ("aliases_moved", "UPDATE", "aliases", alias_gone, gone),
    ]


def _sqlite_triggers() -> Iterator[str]:
    for name, when, table, condition, message in _rules("IS NOT"):
        yield (
            f"CREATE TRIGGER {name} BEFORE {when} ON {table} FOR EACH ROW WHEN {condition} "
            f"BEGIN SELECT RAISE(ABORT, '{message}'); END"
        )


def _postgres_triggers() -> Iterator[str]:
    for name, when, table, condition, message in _rules("IS DISTINCT FROM"):
        result = "OLD" if when == "DELETE" else "NEW"
        yield (
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF {condition} THEN RAISE EXCEPTION '{message}' USING ERRCODE = 'check_violation'; "
            f"END IF; RETURN {result}; END $$"
        )
        yield (
            f"CREATE TRIGGER {name} BEFORE {when} ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()"
        )
