"""Whether the blobs lie where a registry was told to look: the database and the place of its blobs know each other.

Why a mark and no address: a registry's folder may be moved, and hosts may reach one store by different names. Told of
a wrong place, a registry would find nothing of what it holds, and tidying up would remove what belongs to another.
"""

from __future__ import annotations

from sqlalchemy import select

from loramux.registry.db import reading
from loramux.registry.errors import StorageError
from loramux.registry.parts import Parts
from loramux.registry.tables import files, identity, versions

PROBES = 4


def check_place(parts: Parts, *, writes: bool) -> None:
    """StorageError `wrong_blobs` for the blobs of another registry, or for a place that has none of this one's.

    A place without a mark is given one before the first write, if it may be this registry's: it is a new registry, or
    one of its blobs is there.
    """
    with reading(parts.database) as connection:
        own = connection.execute(select(identity.c.id)).scalar_one()
        live = select(files.c.sha256).join(versions, versions.c.id == files.c.version_id)
        probes = list(
            connection.execute(live.where(versions.c.deleted_at.is_(None)).limit(PROBES)).scalars()
        )
    found = parts.blobs.mark()
    if found == own:
        return
    if found is not None:
        raise _others()
    if probes and all(parts.blobs.size(sha256) is None for sha256 in probes):
        raise StorageError(
            "the blobs of this registry are not at this place; name the place that they were stored at with --blobs "
            "(registry.blobs in a server's YAML), or bring them back",
            code="wrong_blobs",
        )
    if writes:
        parts.blobs.set_mark(own)
        if parts.blobs.mark() != own:  # another registry was first
            raise _others()


def _others() -> StorageError:
    return StorageError(
        "the blobs at this place belong to another registry; name this registry's own place with --blobs "
        "(registry.blobs in a server's YAML), and give every database a place of its own",
        code="wrong_blobs",
    )
