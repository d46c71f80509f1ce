"""Brings a database's schema to the one this program knows, when a registry is opened.

Why look before calling Alembic: importing it costs more than everything else that opening does, and nearly always
there is nothing to change. Migrations are numbered files in a line; the last one's name is the head.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from loramux.errors import require
from loramux.registry.db import begin, reading
from loramux.registry.errors import RegistryError

FOLDER = Path(__file__).parent / "migrations"
_ALEMBIC = threading.Lock()  # its context belongs to the process, not to a call
_ADVISORY_LOCK = 0x6C6F7261  # "lora": one process migrates a PostgreSQL database at a time


def revisions() -> list[str]:
    """Names of the migrations, first to last."""
    return sorted(path.stem for path in (FOLDER / "versions").glob("[0-9]*.py"))


def migrate(engine: Engine, target: str = "head") -> None:
    """Create or upgrade the schema in one transaction; does nothing where it is up to date."""
    known = revisions()
    found = _current(engine)
    if found == (known[-1] if target == "head" else target):
        return
    if found is not None and found not in known:
        raise RegistryError(
            f"this registry's database is at revision {found!r:.80}, newer than this loramux knows "
            f"({known[-1]!r}); upgrade loramux",
            code="newer_schema",
        )
    with _ALEMBIC, begin(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        run_alembic(connection, "upgrade", target)


def run_alembic(connection: Connection, command: str, target: str) -> None:
    """`upgrade` or `downgrade` inside the caller's transaction."""
    require("alembic", "registry", "the registry")
    from alembic import command as alembic_command

    getattr(alembic_command, command)(alembic_config(connection), target)


def alembic_config(connection: Connection) -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _current(engine: Engine) -> str | None:
    """The revision a database says it is at; None for a new one."""
    try:
        with engine.connect() as connection:
            row = connection.execute(text("SELECT version_num FROM alembic_version")).first()
            return str(row[0]) if row is not None else None
    except DBAPIError:
        with reading(engine) as connection:  # a database that cannot be reached says so here
            connection.execute(text("SELECT 1"))
        return None
