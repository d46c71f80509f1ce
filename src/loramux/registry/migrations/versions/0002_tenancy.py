"""Tenants, API keys, usage and the audit log, with the triggers that keep the log append-only."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

revision = "0002_tenancy"
down_revision = "0001_registry"
branch_labels = None
depends_on = None

ZEROS = "0" * 64


def upgrade() -> None:
    _tenants_and_keys()
    _audit()
    op.execute("INSERT INTO tenancy_state (id, generation) VALUES (1, 1)")
    op.execute(f"INSERT INTO audit_head (id, num_entries, hash) VALUES (1, 0, '{ZEROS}')")
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    for statement in _sqlite_triggers() if is_sqlite else _postgres_triggers():
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    # Triggers go with their tables.
    for table in (
        *("audit_head", "audit_log", "tenant_usage", "api_keys", "tenants", "tenancy_state"),
    ):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        for name, *_ in _rules():
            op.execute(f"DROP FUNCTION {name}()")


def _tenants_and_keys() -> None:
    op.create_table(
        "tenancy_state",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_tenancy_state_one_row")),
    )
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("weight", sa.Float, nullable=False),
        sa.Column("limits", sa.Text, nullable=False),
        sa.Column("salt", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("disabled_at", sa.Float),
        sa.Column("changed", sa.BigInteger, nullable=False),
        sa.CheckConstraint("weight > 0", name=op.f("ck_tenants_weighs_something")),
        sa.Index(None, "changed"),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.name"), nullable=False),
        sa.Column("label", sa.String(200), nullable=False),
        sa.Column("secret_hash", sa.String(64), nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float),
        sa.Column("revoked_at", sa.Float),
        sa.Column("replaced_by", sa.String(16)),
        sa.Column("changed", sa.BigInteger, nullable=False),
        sa.CheckConstraint("length(secret_hash) = 64", name=op.f("ck_api_keys_hash_is_sha256")),
        sa.Index(None, "tenant"),
        sa.Index(None, "changed"),
    )


def _audit() -> None:
    op.create_table(
        "tenant_usage",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "audit_log",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("action", sa.String(100), nullable=False),
        sa.Column("target", sa.String(500), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )
    op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("num_entries", sa.BigInteger, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_audit_head_one_row")),
    )


def _rules() -> list[tuple[str, str, str, str, str]]:
    """(name, when, table, condition, message) of each trigger."""
    # An INSERT OR REPLACE of SQLite deletes without a DELETE trigger, so inserts are looked at as well.
    out_of_turn = (
        "NEW.id <> (SELECT num_entries FROM audit_head) "
        "OR EXISTS (SELECT 1 FROM audit_log a WHERE a.id = NEW.id)"
    )
    fixed, kept = "the audit log is append-only", "tenants and keys are never deleted"
    return [
        ("audit_log_fixed", "UPDATE", "audit_log", "1 = 1", fixed),
        ("audit_log_kept", "DELETE", "audit_log", "1 = 1", fixed),
        ("audit_log_in_turn", "INSERT", "audit_log", out_of_turn, fixed),
        ("audit_head_kept", "DELETE", "audit_head", "1 = 1", fixed),
        ("audit_head_rises", "UPDATE", "audit_head", "NEW.num_entries < OLD.num_entries", fixed),
        ("tenants_kept", "DELETE", "tenants", "1 = 1", kept),
        ("api_keys_kept", "DELETE", "api_keys", "1 = 1", kept),
        (
            *("api_keys_fixed", "UPDATE", "api_keys"),
            "NEW.id <> OLD.id OR NEW.tenant <> OLD.tenant OR NEW.secret_hash <> OLD.secret_hash "
            "OR (OLD.revoked_at IS NOT NULL AND NEW.revoked_at IS NULL)",
            "a key keeps its tenant and secret, and a revoked one stays revoked",
        ),
    ]


def _sqlite_triggers() -> Iterator[str]:
    for name, when, table, condition, message in _rules():
        yield (
            f"CREATE TRIGGER {name} BEFORE {when} ON {table} FOR EACH ROW WHEN {condition} "
            f"BEGIN SELECT RAISE(ABORT, '{message}'); END"
        )


def _postgres_triggers() -> Iterator[str]:
    for name, when, table, condition, message in _rules():
        result = "OLD" if when == "DELETE" else "NEW"
        yield (
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF {condition} THEN RAISE EXCEPTION '{message}' USING ERRCODE = 'check_violation'; "
            f"END IF; RETURN {result}; END $$"
        )
        yield (
            f"CREATE TRIGGER {name} BEFORE {when} ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()"
        )
    yield (
        "CREATE TRIGGER audit_log_whole BEFORE TRUNCATE ON audit_log "
        "EXECUTE FUNCTION audit_log_kept()"
    )
