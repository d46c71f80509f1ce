"""What to tell somebody whose new version has no samples: `auto` reads those of the version that `latest` leads to.

Why a note and no refusal: an adapter without samples is a good adapter; it only has to be asked for by its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from loramux.registry import tables
from loramux.registry.db import reading
from loramux.registry.names import LATEST
from loramux.retrieval.tables import profiles

if TYPE_CHECKING:
    from loramux.registry import Registry, Version


def samples_note(registry: Registry, version: Version) -> str | None:
    """A sentence if this version keeps its name from being found by a prompt; None if nothing is lost."""
    name = f"{version.tenant}/{version.name}"
    versions = registry.versions(name, None)
    if not versions or _looked_at(versions).version != version.version:
        return None
    query = (
        select(profiles.c.version_id)
        .join(tables.versions, tables.versions.c.id == profiles.c.version_id)
        .join(tables.adapters, tables.adapters.c.id == tables.versions.c.adapter_id)
        .where(tables.adapters.c.tenant == version.tenant, tables.adapters.c.name == version.name)
    )
    with reading(registry.database) as connection:
        known = set(connection.execute(query).scalars())
    if version.id in known:
        return None
    earlier = [each.ref for each in versions if each.id in known]
    if earlier:
        return (
            f"{version.ref} has no samples, so 'auto' no longer finds {name} by those of {earlier[-1]}; "
            "send the same again with samples, or move 'latest' back"
        )
    return f"{version.ref} has no samples, so 'auto' does not find {name}; send the same again with some to change that"


def _looked_at(versions: list[Version]) -> Version:
    """The version that stands for its name in lists: the one at `latest`, else the highest."""
    return next((each for each in versions if LATEST in each.aliases), versions[-1])
