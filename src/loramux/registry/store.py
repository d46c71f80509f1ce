"""`Registry`: the one object through which adapters are published, found, shared, deleted and loaded.

Why a thin front: every operation lives in a file of its own; here is what they promise together. `caller` is the tenant
whose rights count, None the operator. Safe to use from several threads and processes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine

from loramux.registry import manage, publish, read, upkeep
from loramux.registry.blobs import open_blobs, storing
from loramux.registry.cache import folder_of
from loramux.registry.db import begin, open_database, reading
from loramux.registry.errors import RegistryError
from loramux.registry.names import LOCAL_TENANT, Ref, parse_ref
from loramux.registry.parts import Keeper, Parts, check_text
from loramux.registry.place import check_place
from loramux.registry.schema import migrate
from loramux.registry.tables import bump, current_generation
from loramux.registry.types import (
    CheckedUpload,
    CollectReport,
    FsckReport,
    Score,
    Version,
    Visibility,
)

ROOT_ENV = "LORAMUX_REGISTRY"
DATABASE = "registry.sqlite3"
MAX_LISTED = 100_000


def default_root() -> Path:
    """$LORAMUX_REGISTRY, else ~/.local/share/loramux/registry."""
    given = os.environ.get(ROOT_ENV)
    return Path(given) if given else Path.home() / ".local" / "share" / "loramux" / "registry"


class Registry:
    """Open one with `Registry.open`; close it, or use it in a `with`."""

    def __init__(self, parts: Parts):
        self._parts = parts
        self._may_read = self._may_write = False  # the place of the blobs was looked at

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str] | None = None,
        *,
        url: str | URL | None = None,
        blobs: str | os.PathLike[str] | None = None,
        **more: Any,
    ) -> Registry:
        """Open or make a registry: database and blobs under `root`, unless `url` or `blobs` say otherwise.

        Several hosts share one by naming the same PostgreSQL `url` and the same `blobs` folder or URL; `root` then
        holds only the local copies. `more` are further fields of `Parts`.
        """
        folder = Path(root).expanduser() if root is not None else default_root()
        with storing():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        here = URL.create("sqlite", database=str((folder / DATABASE).absolute()))
        database = open_database(url if url is not None else here)
        try:
            migrate(database)
            store = open_blobs(blobs if blobs is not None else folder / "blobs")
        except BaseException:
            database.dispose()
            raise
        return cls(Parts(database, store, cache=folder / "cache", **more))

    def close(self) -> None:
        """Give the database's connections back; the registry cannot be used afterwards."""
        self._parts.database.dispose()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def database(self) -> Engine:
        """For packages that keep tables beside the registry's."""
        return self._parts.database

    def add_keeper(self, keeper: Keeper) -> None:
        """From now on `samples` given to `publish` are handed to `keeper` inside its transaction."""
        self._parts = dataclasses.replace(self._parts, keepers=(*self._parts.keepers, keeper))

    def publish(
        self,
        checked: CheckedUpload,
        *,
        tenant: str,
        name: str,
        alias: str | None = "latest",
        visibility: Visibility | None = None,
        metadata: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        samples: Any = None,
        actor: str,
    ) -> Version:
        """A new version of `tenant/name`, and `alias` on it; whole or not at all.

        Content that is there already under this name stays the version it is (its metadata too) and only gets the
        alias. `visibility` is the name's: None leaves it, "shared" shows it to every tenant.
        """
        return publish.publish(
            self._placed(writes=True),
            checked,
            tenant=tenant,
            name=name,
            alias=alias,
            visibility=visibility,
            metadata=metadata or {},
            provenance=provenance or {},
            samples=samples,
            actor=actor,
        )

    def resolve(self, ref: str | Ref, *, caller: str | None) -> Version:
        """What a reference means now. NotFound for missing and foreign alike."""
        with reading(self.database) as connection:
            return read.one_version(connection, as_ref(ref, caller), caller)

    def list(
        self,
        caller: str | None,
        base: str | None = None,
        query: str | None = None,
        limit: int = 1000,
        after: str | None = None,
    ) -> list[Version]:
        """One version per name that `caller` may use (`latest`, else the highest), by tenant and name.

        `query`: part of the name or of the metadata. `after`: "tenant/name" of the last one already seen.
        """
        if not 1 <= limit <= MAX_LISTED:
            raise RegistryError(f"limit {limit}: allowed are 1 to {MAX_LISTED:,}", code="bad_limit")
        for what, text in (("tenant", caller), ("base", base), ("query", query), ("after", after)):
            check_text(what, text)
        with reading(self.database) as connection:
            return read.newest(connection, caller, base=base, query=query, limit=limit, after=after)

    def visible(self, caller: str | None, base: str | None = None) -> list[Version]:  # type: ignore[valid-type]
        """All that `list` would give: own and shared, what `auto` may choose from."""
        with reading(self.database) as connection:
            return read.newest(connection, caller, base=base)

    def versions(self, ref: str | Ref, caller: str | None) -> list[Version]:  # type: ignore[valid-type]
        """Every version of a name that is not deleted, oldest first."""
        with reading(self.database) as connection:
            return read.all_versions(connection, as_ref(ref, caller), caller)

    def set_alias(
        self,
        ref: str | Ref,
        alias: str,
        version: int,
        *,
        expect: int | None = None,
        actor: str,
        caller: str | None = None,
    ) -> None:
        """Make or move an alias. `expect`: the version it must lead to now, 0 for "must not exist"; else Conflict.

        `caller` must own the name (also below); None is the operator.
        """
        found = as_ref(ref, caller)
        manage.set_alias(self._parts, found, alias, version, expect, actor, caller)

    def drop_alias(
        self,
        ref: str | Ref,
        alias: str,
        *,
        expect: int | None = None,
        actor: str,
        caller: str | None = None,
    ) -> None:
        manage.drop_alias(self._parts, as_ref(ref, caller), alias, expect, actor, caller)

    def share(self, ref: str | Ref, tenant: str, actor: str, caller: str | None = None) -> None:
        """Let a tenant use every version of a name; "*" means every tenant."""
        manage.share(self._parts, as_ref(ref, caller), tenant, actor, caller)

    def unshare(self, ref: str | Ref, tenant: str, actor: str, caller: str | None = None) -> None:
        """Take a share back; one that is not there is fine."""
        manage.unshare(self._parts, as_ref(ref, caller), tenant, actor, caller)

    def shared_with(self, ref: str | Ref, caller: str | None = None) -> tuple[str, ...]:
        return manage.shared_with(self._parts, as_ref(ref, caller), caller)

    def delete(
        self, ref: str | Ref, actor: str, *, force: bool = False, caller: str | None = None
    ) -> tuple[int, ...]:
        """Delete a version (`name@3`, a Ref) or a whole name (text without "@"); returns the deleted numbers.

        Aliases to a single version must be moved first, or go with it by `force`. A number is never given out again.
        """
        found = as_ref(ref, caller)
        if isinstance(ref, str) and "@" not in ref:
            return manage.delete_name(self._parts, found, actor, caller)
        return manage.delete_version(self._parts, found, force, actor, caller)

    def add_score(
        self,
        version: Version,
        suite: str,
        task: str,
        value: float,
        stderr: float | None = None,
        provenance: Mapping[str, Any] | None = None,
        actor: str = "operator",
    ) -> None:
        """Record a measurement; rights are the caller's to have checked by resolving the version."""
        about = provenance or {}
        manage.add_score(self._parts, version, suite, task, value, stderr, about, actor)

    def scores(self, version: Version) -> tuple[Score, ...]:
        return manage.scores_of(self._parts, version)

    def folder(self, version: Version) -> Path:
        """A local read-only folder with the version's files, every byte verified at this call."""
        return folder_of(self._placed(), version)

    def fsck(
        self, *, repair: bool = False, deep: bool = True, grace_s: float = upkeep.GRACE_S
    ) -> FsckReport:
        """Check every promise of the store; `deep` reads every byte, `repair` tidies leftovers."""
        return upkeep.fsck(self._placed(writes=repair), repair=repair, deep=deep, grace_s=grace_s)

    def collect(self, grace_s: float = upkeep.GRACE_S) -> CollectReport:
        """Remove unused blobs, temporary files and local copies that are older than the grace time."""
        return upkeep.collect(self._placed(writes=True), grace_s)

    def _placed(self, *, writes: bool = False) -> Parts:
        """The parts, once it is known that the blobs there are this registry's. Looked at once: lists need no blobs."""
        if not (self._may_write if writes else self._may_read):
            check_place(self._parts, writes=writes)
            self._may_read, self._may_write = True, self._may_write or writes
        return self._parts

    def generation(self) -> int:
        """Rises with every change that a reader of versions, aliases or rights must notice."""
        with reading(self.database) as connection:
            return current_generation(connection)

    def touch(self) -> None:
        """Raise the generation: for packages whose own tables a reader of the registry follows."""
        with begin(self.database) as connection:
            bump(connection)


def as_ref(ref: str | Ref, caller: str | None) -> Ref:
    """Text without a tenant means the caller's own, or the single user's."""
    return ref if isinstance(ref, Ref) else parse_ref(ref, caller or LOCAL_TENANT)
