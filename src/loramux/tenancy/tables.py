"""The tables of tenants, keys, usage and audit, beside the registry's in the same database.

Why `changed`: a server keeps all keys in memory and reads only the rows of generations it has not seen. Rows of tenants
and keys are never deleted, so a change cannot be missed. Times are seconds since 1970 (UTC).
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    select,
    update,
)

from loramux.registry.db import metadata

state = Table(
    "tenancy_state",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("generation", BigInteger, nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)

tenants = Table(
    "tenants",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("weight", Float, nullable=False),
    Column("limits", Text, nullable=False),
    Column("salt", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("disabled_at", Float),
    Column("changed", BigInteger, nullable=False),
    CheckConstraint("weight > 0", name="weighs_something"),
    Index(None, "changed"),
)

keys = Table(
    "api_keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("tenant", String(63), ForeignKey("tenants.name"), nullable=False),
    Column("label", String(200), nullable=False),
    Column("secret_hash", String(64), nullable=False),
    Column("scopes", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    Column("replaced_by", String(16)),
    Column("changed", BigInteger, nullable=False),
    CheckConstraint("length(secret_hash) = 64", name="hash_is_sha256"),
    Index(None, "tenant"),
    Index(None, "changed"),
)

usage = Table(
    "tenant_usage",
    metadata,
    # No foreign key: the single-user mode counts for a tenant that has no row.
    Column("tenant", String(63), primary_key=True),
    Column("day", String(10), primary_key=True),  # UTC, 2026-01-31
    Column("requests", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("action", String(100), nullable=False),
    Column("target", String(500), nullable=False),
    Column("detail", Text, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
)

# Apart from the log, whose rows never change. Its row lock makes writers queue, so that the chain has no branches.
audit_head = Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("num_entries", BigInteger, nullable=False),
    Column("hash", String(64), nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)


def bump(connection: Connection) -> int:
    """Raise the generation first in a transaction that changes tenants or keys; returns the new one.

    The row lock it takes lets no later generation commit before this one.
    """
    connection.execute(update(state).values(generation=state.c.generation + 1))
    return current(connection)


def current(connection: Connection) -> int:
    return int(connection.execute(select(state.c.generation)).scalar_one())
