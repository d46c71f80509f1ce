"""Changes to what is published: aliases by compare-and-swap, sharing, deleting, scores.

Why one shape: each is one transaction under the writers' lock that raises the generation, finds the name as its owner
sees it (a foreign name is a missing one), checks, and writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from loramux.registry.db import begin, reading
from loramux.registry.errors import Conflict, NotFound, RegistryError
from loramux.registry.names import MAX_VERSION, Ref, check_alias, check_tenant
from loramux.registry.parts import Parts, as_json, check_actor
from loramux.registry.publish import point, show_to
from loramux.registry.tables import adapters, aliases, blobs, bump, files, scores, shares, versions
from loramux.registry.types import EVERYONE, Score, Version

MAX_WORD = 100


def set_alias(
    parts: Parts,
    ref: Ref,
    alias: str,
    version: int,
    expect: int | None,
    actor: str,
    caller: str | None,
) -> None:
    check_alias(alias)
    with begin(parts.database) as connection:
        bump(connection)
        adapter_id = _own(connection, ref, caller)
        _check_expected(connection, adapter_id, ref, alias, expect)
        _live_id(connection, adapter_id, ref, version)
        point(connection, adapter_id, alias, version, parts.clock(), check_actor(actor))


def drop_alias(
    parts: Parts, ref: Ref, alias: str, expect: int | None, actor: str, caller: str | None
) -> None:
    check_alias(alias)
    check_actor(actor)
    with begin(parts.database) as connection:
        bump(connection)
        adapter_id = _own(connection, ref, caller)
        _check_expected(connection, adapter_id, ref, alias, expect)
        key = (aliases.c.adapter_id == adapter_id) & (aliases.c.alias == alias)
        if connection.execute(delete(aliases).where(key)).rowcount == 0:
            raise NotFound.of(f"{ref.tenant}/{ref.name}@{alias}")


def share(parts: Parts, ref: Ref, tenant: str, actor: str, caller: str | None) -> None:
    _check_receiver(tenant)
    with begin(parts.database) as connection:
        bump(connection)
        adapter_id = _own(connection, ref, caller)
        show_to(connection, adapter_id, tenant, parts.clock(), check_actor(actor))


def unshare(parts: Parts, ref: Ref, tenant: str, actor: str, caller: str | None) -> None:
    _check_receiver(tenant)
    check_actor(actor)
    with begin(parts.database) as connection:
        bump(connection)
        adapter_id = _own(connection, ref, caller)
        key = (shares.c.adapter_id == adapter_id) & (shares.c.tenant == tenant)
        connection.execute(delete(shares).where(key))


def shared_with(parts: Parts, ref: Ref, caller: str | None) -> tuple[str, ...]:
    """Tenants that may use a name besides its owner; only the owner may ask."""
    with reading(parts.database) as connection:
        adapter_id = _own(connection, ref, caller)
        query = select(shares.c.tenant).where(shares.c.adapter_id == adapter_id)
        return tuple(connection.execute(query.order_by(shares.c.tenant)).scalars())


def delete_version(
    parts: Parts, ref: Ref, force: bool, actor: str, caller: str | None
) -> tuple[int, ...]:
    """One version; aliases that lead to it are an error, or go with it by `force`."""
    with begin(parts.database) as connection:
        bump(connection)
        adapter_id = _own(connection, ref, caller)
        number = _number_of(connection, adapter_id, ref)
        version_id = _live_id(connection, adapter_id, ref, number)
        key = (aliases.c.adapter_id == adapter_id) & (aliases.c.version == number)
        leading = sorted(connection.execute(select(aliases.c.alias).where(key)).scalars())
        if leading and not force:
            raise Conflict(
                f"{', '.join(leading)} still lead{'s' if len(leading) == 1 else ''} to "
                f"{ref.tenant}/{ref.name}@{number}; move the alias to another version or force the deletion"
            )
        connection.execute(delete(aliases).where(key))
        _bury(connection, [version_id], parts.clock(), check_actor(actor))
        if not _has_live(connection, adapter_id):
            connection.execute(delete(shares).where(shares.c.adapter_id == adapter_id))
    return (number,)


def delete_name(parts: Parts, ref: Ref, actor: str, caller: str | None) -> tuple[int, ...]:
    """Every version, alias and share of a name. The name may be used again; its numbers go on."""
    with begin(parts.database) as connection:
        bump(connection)
        adapter_id = _own(connection, ref, caller)
        query = select(versions.c.id, versions.c.version).where(
            versions.c.adapter_id == adapter_id, versions.c.deleted_at.is_(None)
        )
        rows = connection.execute(query.order_by(versions.c.version)).all()
        connection.execute(delete(aliases).where(aliases.c.adapter_id == adapter_id))
        connection.execute(delete(shares).where(shares.c.adapter_id == adapter_id))
        _bury(connection, [row.id for row in rows], parts.clock(), check_actor(actor))
    return tuple(row.version for row in rows)


def add_score(
    parts: Parts,
    version: Version,
    suite: str,
    task: str,
    value: float,
    stderr: float | None,
    provenance: Mapping[str, Any],
    actor: str,
) -> None:
    """One measurement; it changes nothing that a reader of versions sees, so the generation stays."""
    for what, word in (("suite", suite), ("task", task)):
        if not word or len(word) > MAX_WORD or not word.isprintable():
            raise RegistryError(
                f"{what} {word!r:.80}: use 1 to {MAX_WORD} printable characters", code="bad_score"
            )
    if not math.isfinite(value) or (stderr is not None and not 0 <= stderr < math.inf):
        raise RegistryError(
            f"score {value!r} +- {stderr!r}: both must be finite, the error not negative",
            code="bad_score",
        )
    about = as_json(provenance, "provenance")
    with begin(parts.database) as connection:
        found = select(versions.c.id).where(
            versions.c.id == version.id, versions.c.deleted_at.is_(None)
        )
        if connection.execute(found).first() is None:
            raise NotFound.of(version.ref)
        row = {"version_id": version.id, "suite": suite, "task": task, "value": float(value)}
        row |= {"stderr": stderr, "provenance": about, "created_at": parts.clock()}
        connection.execute(insert(scores).values(created_by=check_actor(actor), **row))


def scores_of(parts: Parts, version: Version) -> tuple[Score, ...]:
    """Oldest first."""
    query = select(scores).where(scores.c.version_id == version.id).order_by(scores.c.id)
    with reading(parts.database) as connection:
        return tuple(
            Score(
                row.suite,
                row.task,
                row.value,
                row.stderr,
                json.loads(row.provenance),
                row.created_at,
            )
            for row in connection.execute(query)
        )


def _own(connection: Connection, ref: Ref, caller: str | None) -> int:
    """The name, if it has a live version and `caller` owns it. One query, whatever the answer."""
    wanted = select(adapters.c.id).where(
        adapters.c.tenant == ref.tenant,
        adapters.c.name == ref.name,
        adapters.c.tenant == (ref.tenant if caller is None else caller),
        select(versions.c.id)
        .where(versions.c.adapter_id == adapters.c.id, versions.c.deleted_at.is_(None))
        .exists(),
    )
    found = connection.execute(wanted).scalar()
    if found is None:
        raise NotFound.of(f"{ref.tenant}/{ref.name}")
    return int(found)


def _check_expected(
    connection: Connection, adapter_id: int, ref: Ref, alias: str, expect: int | None
) -> None:
    if expect is None:
        return
    key = (aliases.c.adapter_id == adapter_id) & (aliases.c.alias == alias)
    now = connection.execute(select(aliases.c.version).where(key)).scalar() or 0
    if now != expect:
        found = f"leads to version {now}" if now else "does not exist"
        wanted = f"version {expect}" if expect else "no such alias"
        raise Conflict(
            f"{alias!r} of {ref.tenant}/{ref.name} {found}, expected was {wanted}; "
            "nothing was changed, look again and repeat"
        )


def _number_of(connection: Connection, adapter_id: int, ref: Ref) -> int:
    if isinstance(ref.version, int):
        return ref.version
    if ref.digest is not None:
        query = select(versions.c.version).where(
            versions.c.adapter_id == adapter_id,
            versions.c.digest == ref.digest,
            versions.c.deleted_at.is_(None),
        )
    else:
        query = select(aliases.c.version).where(
            aliases.c.adapter_id == adapter_id, aliases.c.alias == ref.version
        )
    number = connection.execute(query).scalar()
    if number is None:
        raise NotFound.of(ref)
    return int(number)


def _live_id(connection: Connection, adapter_id: int, ref: Ref, version: int) -> int:
    query = select(versions.c.id).where(
        versions.c.adapter_id == adapter_id,
        versions.c.version == version,
        versions.c.deleted_at.is_(None),
    )
    # A number that no column holds is one that was never given out.
    found = connection.execute(query).scalar() if 0 < version <= MAX_VERSION else None
    if found is None:
        raise NotFound.of(f"{ref.tenant}/{ref.name}@{version}")
    return int(found)


def _has_live(connection: Connection, adapter_id: int) -> bool:
    query = select(versions.c.id).where(
        versions.c.adapter_id == adapter_id, versions.c.deleted_at.is_(None)
    )
    return connection.execute(query.limit(1)).first() is not None


def _bury(connection: Connection, version_ids: list[int], now: float, actor: str) -> None:
    """Mark as deleted. The blobs' grace time starts now: somebody may be about to read them."""
    for version_id in version_ids:
        gone = {"deleted_at": now, "deleted_by": actor}
        connection.execute(update(versions).where(versions.c.id == version_id).values(gone))
        used = select(files.c.sha256).where(files.c.version_id == version_id)
        connection.execute(update(blobs).where(blobs.c.sha256.in_(used)).values(touched_at=now))


def _check_receiver(tenant: str) -> None:
    if tenant != EVERYONE:
        check_tenant(tenant)
