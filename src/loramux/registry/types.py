"""What the registry hands out: frozen facts about versions, scores and its own state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Visibility = Literal["private", "shared"]
EVERYONE = "*"


@dataclass(frozen=True)
class FileEntry:
    """A file of a version, by its content."""

    path: str
    sha256: str
    num_bytes: int


class StagedFile(Protocol):
    """A file that passed the checks and waits in a staging folder."""

    @property
    def path(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def staged(self) -> Path: ...


class CheckedUpload(Protocol):
    """The part of `checks.Checked` that publishing reads."""

    @property
    def files(self) -> tuple[Any, ...]: ...
    @property
    def digest(self) -> str: ...
    @property
    def base_digest(self) -> str | None: ...
    @property
    def method(self) -> str: ...
    @property
    def servability(self) -> Any: ...
    @property
    def max_rank(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True)
class Version:
    """One immutable version. `visibility` and `aliases` belong to the moment it was read; all else never changes."""

    id: int
    tenant: str
    name: str
    version: int
    digest: str
    base_digest: str | None
    method: str
    servability: str
    max_rank: int
    num_bytes: int
    created_at: float  # seconds since 1970, UTC
    visibility: Visibility
    metadata: Mapping[str, Any] = field(hash=False)
    provenance: Mapping[str, Any] = field(hash=False)
    aliases: tuple[str, ...]
    files: tuple[FileEntry, ...]

    @property
    def ref(self) -> str:
        """`tenant/name@3`: names this version for ever."""
        return f"{self.tenant}/{self.name}@{self.version}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ref": self.ref,
            **asdict(self),
            "metadata": dict(self.metadata),
            "provenance": dict(self.provenance),
            "aliases": list(self.aliases),
            "files": [asdict(file) for file in self.files],
        }


@dataclass(frozen=True)
class Score:
    """What a version reached on a task; several of one task are several measurements."""

    suite: str
    task: str
    value: float
    stderr: float | None
    provenance: Mapping[str, Any] = field(hash=False)
    created_at: float


@dataclass(frozen=True)
class FsckReport:
    """What is wrong (a promise is broken) and what is merely left over (a publish was cut short)."""

    num_versions: int
    num_blobs: int
    num_bytes: int
    missing: tuple[str, ...] = ()  # files of live versions without bytes
    damaged: tuple[str, ...] = ()  # blobs whose bytes are not what their name says
    dangling: tuple[
        str, ...
    ] = ()  # aliases that lead nowhere, versions without all their file entries
    untracked: tuple[str, ...] = ()  # blobs that the database does not know
    unfinished: tuple[str, ...] = ()  # temporary files and leases older than the grace time
    repaired: bool = False

    @property
    def is_clean(self) -> bool:
        return not (self.missing or self.damaged or self.dangling)

    @property
    def has_leftovers(self) -> bool:
        return bool(self.untracked or self.unfinished)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "is_clean": self.is_clean}


@dataclass(frozen=True)
class CollectReport:
    """What collecting removed, and what it kept only because it is young."""

    num_blobs: int
    num_bytes: int
    num_temporary: int
    num_cached: int
    num_young: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
