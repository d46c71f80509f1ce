"""The schema that migrations make is the schema that the code uses, on both databases, forwards and back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, inspect, text

from loramux.registry import Registry, RegistryError
from loramux.registry.db import begin, metadata, open_database
from loramux.registry.schema import alembic_config, migrate, revisions, run_alembic
from registry.uploads import put

# Packages that keep tables in this database.
TABLES = ("registry.tables", "tenancy.tables", "retrieval.tables")


@pytest.fixture
def engine(empty_database: str) -> Iterator[Engine]:
    engine = open_database(empty_database)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module", autouse=True)
def every_table_is_known() -> None:
    import importlib.util

    for name in TABLES:
        if importlib.util.find_spec(f"loramux.{name}") is not None:
            importlib.import_module(f"loramux.{name}")


def differences(engine: Engine) -> list[object]:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, metadata))


def test_the_migrated_schema_is_the_one_of_the_tables(engine: Engine) -> None:
    migrate(engine)
    assert differences(engine) == []


def test_migrations_go_up_down_and_up_again(engine: Engine) -> None:
    migrate(engine)
    with begin(engine) as connection:
        run_alembic(connection, "downgrade", "base")
    assert set(inspect(engine).get_table_names()) == {"alembic_version"}
    for revision in revisions():  # each step by itself
        migrate(engine, revision)
    assert differences(engine) == []
    for revision in [*reversed(revisions()[:-1]), "base"]:
        with begin(engine) as connection:
            run_alembic(connection, "downgrade", revision)
    migrate(engine)
    assert differences(engine) == []


def test_what_is_registered_survives_migrations_of_other_packages(
    engine: Engine, tmp_path: Path
) -> None:
    with Registry.open(tmp_path / "registry", url=engine.url) as registry:
        published = put(registry, tmp_path, "a")
        with begin(engine) as connection:
            run_alembic(connection, "downgrade", "0001_registry")
        migrate(engine)
        assert registry.resolve("ann/sums", caller=None) == published


def test_the_migrations_are_one_line_and_their_file_names_say_the_order(engine: Engine) -> None:
    from alembic.script import ScriptDirectory

    with engine.connect() as connection:
        scripts = ScriptDirectory.from_config(alembic_config(connection))
    line = [script.revision for script in scripts.walk_revisions()]
    assert list(reversed(line)) == revisions()


def test_a_migration_that_fails_leaves_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loramux.registry.schema as schema

    def break_off(*arguments: object) -> None:
        run_alembic(*arguments)  # type: ignore[arg-type]
        raise RuntimeError("power cut")

    monkeypatch.setattr(schema, "run_alembic", break_off)
    with pytest.raises(RuntimeError, match="power cut"):
        migrate(engine)
    assert inspect(engine).get_table_names() == []


def test_a_database_of_a_newer_program_is_refused(engine: Engine) -> None:
    migrate(engine)
    with begin(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999_future'"))
    with pytest.raises(RegistryError, match="upgrade loramux") as refused:
        migrate(engine)
    assert refused.value.code == "newer_schema"


def test_many_may_make_one_registry_at_once(empty_database: str, tmp_path: Path) -> None:
    start = threading.Barrier(4)
    seen: list[int] = []

    def make() -> None:
        start.wait()
        with Registry.open(tmp_path / "registry", url=empty_database) as registry:
            seen.append(registry.generation())

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1, 1, 1, 1]
