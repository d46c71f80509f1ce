"""Profiles in the registry's database: written with the version they belong to, read by whoever keeps a retriever.

Why made before the transaction: encoding twenty samples takes most of a second, and while a publish holds the writers'
lock nobody else can publish. `ProfileStore.keep` takes texts too, for single users.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, delete, insert, select

from loramux.registry.db import begin, reading
from loramux.registry.tables import bump
from loramux.retrieval.encoder import Encoder
from loramux.retrieval.errors import ProfileError
from loramux.retrieval.profile import Profile, make_profile
from loramux.retrieval.tables import profiles

if TYPE_CHECKING:
    from loramux.registry import Registry, Version

_MANY = 500  # bodies per statement


class ProfileStore:
    """Reads and writes profiles. encoder: with it, samples given as texts get a dense half too."""

    def __init__(
        self, engine: Engine, encoder: Encoder | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.engine, self.encoder, self._clock = engine, encoder, clock

    @classmethod
    def beside(cls, registry: Registry, encoder: Encoder | None = None) -> ProfileStore:
        """The store of a registry, set to keep the samples that are given to `publish`."""
        made = cls(registry.database, encoder)
        registry.add_keeper(made.keep)
        return made

    def keep(self, connection: Connection, version: Version, samples: Any) -> None:
        """A keeper of the registry: samples are a Profile, its bytes, or texts."""
        self._put(connection, version.id, self._as_profile(samples))

    def put(self, version: Version, samples: Profile | bytes | Sequence[str]) -> None:
        """Add or replace the profile of a version; readers notice by the registry's generation."""
        profile = self._as_profile(samples)
        with begin(self.engine) as connection:
            bump(connection)
            self._put(connection, version.id, profile)

    def delete(self, version: Version) -> None:
        """Forget the profiles of a version; it can no longer be retrieved."""
        with begin(self.engine) as connection:
            bump(connection)
            connection.execute(delete(profiles).where(profiles.c.version_id == version.id))

    def get(self, version: Version, encoder_id: str | None = None) -> Profile | None:
        """The profile made with this encoder, None being the lexical one."""
        with reading(self.engine) as connection:
            found = dict(read_bodies(connection, [(version.id, encoder_id or "")]))
        body = found.get((version.id, encoder_id or ""))
        return None if body is None else Profile.from_bytes(body)

    def _as_profile(self, samples: Any) -> Profile:
        if isinstance(samples, Profile):
            return samples
        if isinstance(samples, bytes | bytearray | memoryview):
            return Profile.from_bytes(bytes(samples))
        if isinstance(samples, Sequence):
            return make_profile(samples, self.encoder)
        raise ProfileError(
            f"samples are a list of texts, a Profile or its bytes, not {type(samples).__name__}"
        )

    def _put(self, connection: Connection, version_id: int, profile: Profile) -> None:
        encoder_id, body = profile.encoder_id or "", profile.to_bytes()
        key = (profiles.c.version_id == version_id) & (profiles.c.encoder_id == encoder_id)
        connection.execute(delete(profiles).where(key))
        connection.execute(
            insert(profiles).values(
                version_id=version_id,
                encoder_id=encoder_id,
                num_samples=profile.num_samples,
                body=body,
                sha256=hashlib.sha256(body).hexdigest(),
                created_at=self._clock(),
            )
        )


def read_bodies(
    connection: Connection, keys: Iterable[tuple[int, str]]
) -> Iterator[tuple[tuple[int, str], bytes]]:
    """The bytes of profiles by (version id, encoder id); those that are gone are left out."""
    wanted = list(keys)
    for start in range(0, len(wanted), _MANY):
        part = set(wanted[start : start + _MANY])
        query = select(profiles.c.version_id, profiles.c.encoder_id, profiles.c.body).where(
            profiles.c.version_id.in_(sorted({version_id for version_id, _ in part}))
        )
        for version_id, encoder_id, body in connection.execute(query):
            if (version_id, encoder_id) in part:
                yield (version_id, encoder_id), bytes(body)
