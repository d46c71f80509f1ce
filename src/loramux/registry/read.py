"""Questions to the registry: one version, the versions of a name, what a caller may see.

Why rights are part of the query: a foreign adapter and a missing one take the same statement and give the same error.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    bindparam,
    exists,
    func,
    or_,
    select,
    true,
)

from loramux.registry.errors import NotFound
from loramux.registry.names import LATEST, Ref
from loramux.registry.tables import adapters, aliases, files, shares, versions
from loramux.registry.types import EVERYONE, FileEntry, Version

_MANY = 1000  # ids per statement
_BETWEEN = "\n"  # aliases in one text; none has it
_ABOUT = [
    *(versions.c[name] for name in ("id", "adapter_id", "version", "digest", "base_digest")),
    *(versions.c[name] for name in ("method", "servability", "max_rank", "num_bytes")),
    *(versions.c[name] for name in ("created_at", "metadata", "provenance")),
]


def one_version(connection: Connection, ref: Ref, caller: str | None) -> Version:
    """The version a reference means now; NotFound where there is none that `caller` may use."""
    kind = "number" if isinstance(ref.version, int) else "alias" if ref.digest is None else "digest"
    wanted = ref.version if ref.digest is None else ref.digest
    given = {"of": ref.tenant, "called": ref.name, "wanted": wanted, "caller": caller}
    query = _ONE[kind, caller is None]
    rows = connection.execute(query, given).all()
    if not rows:
        raise NotFound.of(ref)
    row = rows[0]
    entries = [FileEntry(*each[-3:]) for each in rows if each.path is not None]
    return _version(row, row.named.split(_BETWEEN) if row.named else [], entries)


def by_id(connection: Connection, version_id: int) -> Version:
    row = connection.execute(_live(None).where(versions.c.id == version_id)).first()
    if row is None:
        raise NotFound.of(f"version #{version_id}")
    return whole(connection, [row])[0]


def all_versions(connection: Connection, ref: Ref, caller: str | None) -> list[Version]:
    """Every live version of a name, oldest first."""
    query = _live(caller).where(adapters.c.tenant == ref.tenant, adapters.c.name == ref.name)
    rows = connection.execute(query.order_by(versions.c.version)).all()
    if not rows:
        raise NotFound.of(f"{ref.tenant}/{ref.name}")
    return whole(connection, rows)


def everything(connection: Connection) -> list[Version]:
    """Every live version of every name."""
    return whole(connection, connection.execute(_live(None)).all())


def newest(
    connection: Connection,
    caller: str | None,
    *,
    base: str | None = None,
    query: str | None = None,
    limit: int | None = None,
    after: str | None = None,
) -> list[Version]:
    """One version per name, by tenant and name: where `latest` points, else the highest."""
    found = _live(caller).where(versions.c.version == _default_version())
    if base is not None:
        found = found.where(versions.c.base_digest == base)
    if query:
        found = found.where(versions.c.search_text.contains(query.lower(), autoescape=True))
    if after is not None:
        tenant, _, name = after.partition("/")
        later = and_(adapters.c.tenant == tenant, adapters.c.name > name)
        found = found.where(or_(adapters.c.tenant > tenant, later))
    found = found.order_by(adapters.c.tenant, adapters.c.name)
    if limit is not None:
        found = found.limit(limit)
    return whole(connection, connection.execute(found).all())


def whole(connection: Connection, rows: Sequence[Row[Any]]) -> list[Version]:
    """Rows with their files and aliases."""
    names: dict[tuple[int, int], list[str]] = defaultdict(list)
    for some in _chunks(sorted({row.adapter_id for row in rows})):
        for alias in connection.execute(select(aliases).where(aliases.c.adapter_id.in_(some))):
            names[alias.adapter_id, alias.version].append(alias.alias)
    entries: dict[int, list[FileEntry]] = defaultdict(list)
    for some in _chunks([row.id for row in rows]):
        for file in connection.execute(select(files).where(files.c.version_id.in_(some))):
            entries[file.version_id].append(FileEntry(file.path, file.sha256, file.num_bytes))
    return [_version(row, names[row.adapter_id, row.version], entries[row.id]) for row in rows]


def _version(row: Row[Any], names: list[str], entries: list[FileEntry]) -> Version:
    return Version(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        version=row.version,
        digest=row.digest,
        base_digest=row.base_digest,
        method=row.method,
        servability=row.servability,
        max_rank=row.max_rank,
        num_bytes=row.num_bytes,
        created_at=row.created_at,
        visibility="shared" if row.everyone else "private",
        metadata=json.loads(row.metadata),
        provenance=json.loads(row.provenance),
        aliases=tuple(sorted(names)),
        files=tuple(sorted(entries, key=lambda entry: entry.path)),
    )


def _live(caller: Any) -> Select[Any]:
    everyone = _shared_with(EVERYONE).label("everyone")
    return (
        select(*_ABOUT, adapters.c.tenant, adapters.c.name, everyone)
        .join(adapters, adapters.c.id == versions.c.adapter_id)
        .where(versions.c.deleted_at.is_(None), may_use(caller))
    )


def may_use(caller: Any) -> ColumnElement[bool]:
    """Own, shared with the caller, or shared with all; everything for the operator (None)."""
    if caller is None:
        return true()
    return or_(adapters.c.tenant == caller, _shared_with(caller, EVERYONE))


def _shared_with(*tenants: Any) -> Any:
    return exists().where(shares.c.adapter_id == adapters.c.id, shares.c.tenant.in_(tenants))


def _default_version() -> Any:
    other = versions.alias("other")
    pointed = select(aliases.c.version).where(
        aliases.c.adapter_id == adapters.c.id, aliases.c.alias == LATEST
    )
    highest = select(func.max(other.c.version)).where(
        other.c.adapter_id == adapters.c.id, other.c.deleted_at.is_(None)
    )
    return func.coalesce(
        pointed.correlate(adapters).scalar_subquery(),
        highest.correlate(adapters).scalar_subquery(),
    )


def _chunks(ids: Sequence[int]) -> Iterable[Sequence[int]]:
    return (ids[i : i + _MANY] for i in range(0, len(ids), _MANY))


def _one(kind: str, is_operator: bool) -> Select[Any]:
    # With its aliases as one text and a row per file: one statement, as each costs more than its answer.
    named = aliases.alias("named")
    names = select(func.aggregate_strings(named.c.alias, _BETWEEN)).where(
        named.c.adapter_id == versions.c.adapter_id, named.c.version == versions.c.version
    )
    query = (
        _live(None if is_operator else bindparam("caller"))
        .add_columns(names.correlate(versions).scalar_subquery().label("named"))
        .add_columns(files.c.path, files.c.sha256, files.c.num_bytes.label("file_bytes"))
        .outerjoin(files, files.c.version_id == versions.c.id)
        .where(adapters.c.tenant == bindparam("of"), adapters.c.name == bindparam("called"))
    )
    wanted: Any = bindparam("wanted")
    if kind == "number":
        return query.where(versions.c.version == wanted)
    if kind == "digest":
        return query.where(versions.c.digest == wanted)
    pointed = and_(
        aliases.c.adapter_id == versions.c.adapter_id, aliases.c.version == versions.c.version
    )
    return query.join(aliases, pointed).where(aliases.c.alias == wanted)


# Built once: a server looks a name up for nearly every new one it meets, and building these takes longer than the
# database does to answer.
_ONE = MappingProxyType(
    {
        (kind, is_operator): _one(kind, is_operator)
        for kind in ("number", "alias", "digest")
        for is_operator in (True, False)
    }
)
