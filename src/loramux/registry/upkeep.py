"""Looking after the store: `fsck` proves its books, `collect` removes bytes that nothing leads to.

Why collecting under the writers' lock: between the look and the removal nobody can lease or publish a blob. A removal
that is cut short leaves rows without bytes, which nothing leads to and the next publish fills again.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, exists, func, insert, select, text

from loramux.registry import read
from loramux.registry.cache import clear_unused, key_of
from loramux.registry.db import begin, reading
from loramux.registry.parts import Parts
from loramux.registry.tables import adapters, aliases, blobs, files, leases, lock_writers, versions
from loramux.registry.types import CollectReport, FsckReport

GRACE_S = 24 * 3600.0
BATCH = 100  # blobs removed in one hold of the writers' lock


def fsck(parts: Parts, *, repair: bool, deep: bool, grace_s: float) -> FsckReport:
    """Every promise checked; `repair` tidies leftovers older than the grace time, it cannot bring bytes back."""
    with reading(parts.database) as connection:
        used = _used(connection)
        dangling = [*_dangling(connection), *_database_problems(connection)]
        num_versions = connection.execute(_live_count()).scalar_one()
    missing, damaged = _compare(parts, used, deep)
    if missing or damaged:  # a version may have been deleted and collected while we read
        with reading(parts.database) as connection:
            still = _used(connection)
        missing, damaged = ([b for b in bad if b in still] for bad in (missing, damaged))
    # Blobs are listed before the rows: what is published meanwhile has its row by then.
    stored = list(parts.blobs.walk())
    with reading(parts.database) as connection:
        known = _known(connection)
        old = leases.c.taken_at <= parts.clock() - grace_s
        unfinished = [f"lease {t}" for t in connection.execute(_tokens().where(old)).scalars()]
    untracked = [sha256 for sha256 in stored if sha256 not in known]
    temporary = list(parts.blobs.temporary(grace_s))
    if repair:
        _tidy(parts, untracked, temporary, grace_s)
    return FsckReport(
        num_versions=num_versions,
        num_blobs=len(stored),
        num_bytes=sum(size for size, _ in used.values()),
        missing=tuple(f"{used[sha][1]}: blob {sha}" for sha in missing),
        damaged=tuple(f"{used[sha][1]}: blob {sha}" for sha in damaged),
        dangling=tuple(dangling),
        untracked=tuple(untracked),
        unfinished=(*unfinished, *temporary),
        repaired=repair,
    )


def collect(parts: Parts, grace_s: float) -> CollectReport:
    """Remove blobs that no live version uses, no publish counts on, and that are older than `grace_s`."""
    stored = list(parts.blobs.walk())
    with reading(parts.database) as connection:
        known = _known(connection)
    temporary = list(parts.blobs.temporary(grace_s))
    _tidy(parts, [sha256 for sha256 in stored if sha256 not in known], temporary, grace_s)
    num_blobs = num_bytes = 0
    while True:
        with begin(parts.database) as connection:
            lock_writers(connection)
            connection.execute(delete(leases).where(leases.c.taken_at <= parts.clock() - grace_s))
            old = _free().where(blobs.c.touched_at <= parts.clock() - grace_s)
            rows = connection.execute(old.limit(BATCH)).all()
            for row in rows:
                # The row first: where the connection is lost, and the lock with it, this fails and the bytes stay.
                connection.execute(delete(blobs).where(blobs.c.sha256 == row.sha256))
                parts.blobs.delete(row.sha256)
                parts.step(f"removed {row.sha256}")
        num_blobs += len(rows)
        num_bytes += sum(row.num_bytes for row in rows)
        if len(rows) < BATCH:
            break
    with reading(parts.database) as connection:
        num_young = len(connection.execute(_free()).all())
        used = {key_of(version) for version in read.everything(connection)}
    return CollectReport(
        num_blobs=num_blobs,
        num_bytes=num_bytes,
        num_temporary=len(temporary),
        num_cached=clear_unused(parts, used, grace_s),
        num_young=num_young,
    )


def _compare(
    parts: Parts, used: dict[str, tuple[int, str]], deep: bool
) -> tuple[list[str], list[str]]:
    missing, damaged = [], []
    for sha256, (num_bytes, _) in sorted(used.items()):
        size = parts.blobs.size(sha256)
        if size is None:
            missing.append(sha256)
        elif size != num_bytes or (deep and not parts.blobs.is_whole(sha256)):
            damaged.append(sha256)
    return missing, damaged


def _tidy(parts: Parts, untracked: list[str], temporary: list[str], grace_s: float) -> None:
    for name in temporary:
        parts.blobs.discard(name)
    with begin(parts.database) as connection:
        lock_writers(connection)
        connection.execute(delete(leases).where(leases.c.taken_at <= parts.clock() - grace_s))
        for sha256 in untracked:  # now known, and collected after the grace time if still unused
            known = select(blobs.c.sha256).where(blobs.c.sha256 == sha256)
            size = parts.blobs.size(sha256)
            if size is not None and connection.execute(known).first() is None:
                row = {"sha256": sha256, "num_bytes": size, "touched_at": parts.clock()}
                connection.execute(insert(blobs).values(row))


def _known(connection: Connection) -> set[str]:
    return set(connection.execute(select(blobs.c.sha256)).scalars())


def _free() -> Any:
    """Blobs that no live version uses and nobody leases."""
    live = exists().where(
        files.c.sha256 == blobs.c.sha256,
        versions.c.id == files.c.version_id,
        versions.c.deleted_at.is_(None),
    )
    leased = exists().where(leases.c.sha256 == blobs.c.sha256)
    return select(blobs).where(~live, ~leased).order_by(blobs.c.sha256)


def _used(connection: Connection) -> dict[str, tuple[int, str]]:
    """Blob -> (bytes, one version that uses it)."""
    query = (
        select(files.c.sha256, files.c.num_bytes, adapters.c.tenant, adapters.c.name)
        .add_columns(versions.c.version)
        .join(versions, versions.c.id == files.c.version_id)
        .join(adapters, adapters.c.id == versions.c.adapter_id)
        .where(versions.c.deleted_at.is_(None))
    )
    return {
        row.sha256: (row.num_bytes, f"{row.tenant}/{row.name}@{row.version}")
        for row in connection.execute(query)
    }


def _dangling(connection: Connection) -> list[str]:
    """What triggers and foreign keys rule out: looked for all the same, they may have been switched off."""
    target = (versions.c.adapter_id == aliases.c.adapter_id) & (
        versions.c.version == aliases.c.version
    )
    live = exists().where(target, versions.c.deleted_at.is_(None))
    loose = select(adapters.c.tenant, adapters.c.name, aliases.c.alias).join(
        aliases, aliases.c.adapter_id == adapters.c.id
    )
    problems = [
        f"{row.tenant}/{row.name}@{row.alias} leads nowhere"
        for row in connection.execute(loose.where(~live))
    ]
    count = select(func.count()).where(files.c.version_id == versions.c.id).scalar_subquery()
    short = (
        select(adapters.c.tenant, adapters.c.name, versions.c.version)
        .join(adapters, adapters.c.id == versions.c.adapter_id)
        .where(versions.c.deleted_at.is_(None), versions.c.num_files != count)
    )
    problems += [
        f"{row.tenant}/{row.name}@{row.version} lacks entries of its files"
        for row in connection.execute(short)
    ]
    return problems


def _database_problems(connection: Connection) -> list[str]:
    if connection.dialect.name != "sqlite":
        return []
    found = connection.execute(text("PRAGMA quick_check")).scalars().all()
    problems = [f"database: {line}" for line in found if line != "ok"]
    loose = connection.execute(text("PRAGMA foreign_key_check")).all()
    return problems + [f"database: a row of {row[0]} leads nowhere" for row in loose]


def _live_count() -> Any:
    return select(func.count()).select_from(versions).where(versions.c.deleted_at.is_(None))


def _tokens() -> Any:
    return select(leases.c.token).distinct().order_by(leases.c.token)
