"""Publishing: blobs first, then one transaction with the version, its files and its alias.

Why leases: a blob that lies there already may be about to be collected. A publish first leases every blob it counts on,
collecting spares leased blobs, and the transaction checks that the leases still hold; if not, the publish starts again.
A kill at any point leaves a version that is wholly there or not at all, and leftovers that fsck and collect know.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, CursorResult, delete, func, insert, select, update

from loramux.registry import read
from loramux.registry.db import begin
from loramux.registry.errors import Conflict, RegistryError, StorageError, Vanished
from loramux.registry.names import check_alias, check_name, check_tenant
from loramux.registry.parts import Parts, as_json, check_actor
from loramux.registry.tables import (
    adapters,
    aliases,
    blobs,
    bump,
    files,
    leases,
    lock_writers,
    shares,
    versions,
)
from loramux.registry.types import EVERYONE, CheckedUpload, Version, Visibility

TRIES = 5
SEARCHED_CHARACTERS = 8_000


def publish(
    parts: Parts,
    checked: CheckedUpload,
    *,
    tenant: str,
    name: str,
    alias: str | None,
    visibility: Visibility | None,
    metadata: Mapping[str, Any],
    provenance: Mapping[str, Any],
    samples: Any,
    actor: str,
) -> Version:
    """See `Registry.publish`."""
    check_tenant(tenant)
    check_name(name)
    if alias is not None:
        check_alias(alias)
    row = _row(checked, tenant, name, metadata, provenance, check_actor(actor))
    if visibility not in (None, "private", "shared"):
        raise RegistryError(f"visibility {visibility!r:.40}: allowed are 'private' and 'shared'")
    if samples is not None and not parts.keepers:
        raise RegistryError(
            "samples were given, but this registry was opened without retrieval; "
            "publish without samples or open it with a keeper for them",
            code="no_keeper",
        )
    for _ in range(TRIES):
        token = _lease(parts, checked)
        try:
            _store(parts, checked)
            with begin(parts.database) as connection:
                bump(connection)
                _check_leases(connection, token, checked)
                adapter_id = _adapter(connection, tenant, name, parts.clock())
                version_id = _insert_once(connection, adapter_id, row, checked, parts)
                parts.step("rows")
                number = _number(connection, version_id)
                if alias is not None:
                    point(connection, adapter_id, alias, number, parts.clock(), actor)
                parts.step("alias")
                _show(connection, adapter_id, visibility, parts.clock(), actor)
                published = read.by_id(connection, version_id)
                if samples is not None:
                    for keep in parts.keepers:
                        keep(connection, published, samples)
                connection.execute(delete(leases).where(leases.c.token == token))
                parts.step("before-commit")
        except Vanished:
            _release(parts, token)
            continue
        except BaseException:
            _release(parts, token)
            raise
        parts.step("committed")
        return published
    raise Vanished


def point(
    connection: Connection, adapter_id: int, alias: str, version: int, now: float, actor: str
) -> None:
    """Make or move an alias; the caller holds the writers' lock."""
    values = {"version": version, "updated_at": now, "updated_by": actor}
    key = (aliases.c.adapter_id == adapter_id) & (aliases.c.alias == alias)
    if connection.execute(update(aliases).where(key).values(values)).rowcount == 0:
        connection.execute(insert(aliases).values(adapter_id=adapter_id, alias=alias, **values))


def show_to(connection: Connection, adapter_id: int, tenant: str, now: float, actor: str) -> None:
    """Share with a tenant or everyone; again changes nothing."""
    key = (shares.c.adapter_id == adapter_id) & (shares.c.tenant == tenant)
    if connection.execute(select(shares.c.tenant).where(key)).first() is None:
        values = {"adapter_id": adapter_id, "tenant": tenant, "created_at": now}
        connection.execute(insert(shares).values(**values, created_by=actor))


def _row(
    checked: CheckedUpload,
    tenant: str,
    name: str,
    metadata: Mapping[str, Any],
    provenance: Mapping[str, Any],
    actor: str,
) -> dict[str, Any]:
    if not checked.files:
        raise RegistryError("there is nothing to publish: the upload has no files")
    described = as_json(metadata, "metadata")
    searched = f"{tenant}/{name} {checked.method} {' '.join(_texts(metadata))}".lower()
    return {
        "digest": checked.digest,
        "base_digest": checked.base_digest,
        "method": checked.method,
        "servability": str(getattr(checked.servability, "value", checked.servability)),
        "max_rank": checked.max_rank,
        "num_bytes": checked.num_bytes,
        "num_files": len(checked.files),
        "metadata": described,
        "provenance": as_json(provenance, "provenance"),
        # PostgreSQL keeps no NUL in text
        "search_text": searched.replace("\0", "")[:SEARCHED_CHARACTERS],
        "created_by": actor,
    }


def _texts(value: Any) -> list[str]:
    """Keys and values of metadata, flat, for searching."""
    if isinstance(value, Mapping):
        return [text for key, item in value.items() for text in (str(key), *_texts(item))]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return [str(value)]


def _lease(parts: Parts, checked: CheckedUpload) -> str:
    """Tell collectors which blobs this publish counts on, before looking whether they are there."""
    token, now = secrets.token_hex(16), parts.clock()
    sizes = {file.sha256: file.num_bytes for file in checked.files}
    with begin(parts.database) as connection:
        lock_writers(connection)
        for sha256, num_bytes in sorted(sizes.items()):
            touched = update(blobs).where(blobs.c.sha256 == sha256).values(touched_at=now)
            if connection.execute(touched).rowcount == 0:
                row = {"sha256": sha256, "num_bytes": num_bytes, "touched_at": now}
                connection.execute(insert(blobs).values(row))
            connection.execute(insert(leases).values(token=token, sha256=sha256, taken_at=now))
    parts.step("leased")
    return token


def _store(parts: Parts, checked: CheckedUpload) -> None:
    for file in checked.files:
        parts.blobs.put(file.staged, file.sha256)
        parts.step(f"blob {file.path}")


def _check_leases(connection: Connection, token: str, checked: CheckedUpload) -> None:
    held = select(func.count()).select_from(leases).where(leases.c.token == token)
    if connection.execute(held).scalar_one() != len({file.sha256 for file in checked.files}):
        raise Vanished


def _release(parts: Parts, token: str) -> None:
    """After a failure; a lease that cannot be given back runs out by itself."""
    try:
        with begin(parts.database) as connection:
            connection.execute(delete(leases).where(leases.c.token == token))
    except StorageError:
        return


def _adapter(connection: Connection, tenant: str, name: str, now: float) -> int:
    key = (adapters.c.tenant == tenant) & (adapters.c.name == name)
    found = connection.execute(select(adapters.c.id).where(key)).scalar()
    if found is None:
        row = {"tenant": tenant, "name": name, "last_version": 0, "created_at": now}
        found = _new_id(connection.execute(insert(adapters).values(row)))
    return int(found)


def _insert_once(
    connection: Connection,
    adapter_id: int,
    row: dict[str, Any],
    checked: CheckedUpload,
    parts: Parts,
) -> int:
    """The live version with this content under this name; a new one where there is none."""
    same = select(versions.c.id, versions.c.version, versions.c.base_digest).where(
        versions.c.adapter_id == adapter_id,
        versions.c.digest == row["digest"],
        versions.c.deleted_at.is_(None),
    )
    known = connection.execute(same).first()
    if known is not None:
        if known.base_digest != row["base_digest"]:
            raise Conflict(
                f"this content is version {known.version} already, checked against another base (digest "
                f"{str(known.base_digest)[:12]}, now {str(row['base_digest'])[:12]}); publish it under another name, "
                "or delete that version first"
            )
        return int(known.id)
    mine = adapters.c.id == adapter_id
    connection.execute(
        update(adapters).where(mine).values(last_version=adapters.c.last_version + 1)
    )
    number = connection.execute(select(adapters.c.last_version).where(mine)).scalar_one()
    made = connection.execute(
        insert(versions).values(
            adapter_id=adapter_id, version=number, created_at=parts.clock(), **row
        )
    )
    version_id = _new_id(made)
    parts.step("version")
    connection.execute(
        insert(files),
        [
            {"version_id": version_id, "path": f.path, "sha256": f.sha256, "num_bytes": f.num_bytes}
            for f in checked.files
        ],
    )
    return version_id


def _new_id(inserted: CursorResult[Any]) -> int:
    key = inserted.inserted_primary_key
    assert key is not None
    return int(key[0])


def _number(connection: Connection, version_id: int) -> int:
    query = select(versions.c.version).where(versions.c.id == version_id)
    return int(connection.execute(query).scalar_one())


def _show(
    connection: Connection, adapter_id: int, wanted: Visibility | None, now: float, actor: str
) -> None:
    """Visibility belongs to the name: a version that asks to be private must not appear under a shared one."""
    if wanted == "shared":
        show_to(connection, adapter_id, EVERYONE, now, actor)
    elif wanted == "private":
        key = (shares.c.adapter_id == adapter_id) & (shares.c.tenant == EVERYONE)
        if connection.execute(select(shares.c.tenant).where(key)).first() is not None:
            raise RegistryError(
                "this name is shared with everyone, a new version of it cannot be private; "
                "unshare the name first or publish under another one",
                code="conflict",
            )
