"""Names of tenants, adapters, aliases and versions, and references made of them.

Why so narrow: a name is part of a URL, a metric label and a line in a log, and must never be part of a path. ASCII in
lower case leaves no two spellings that look alike, and nothing that a shell, a terminal or a browser reads as code.

    reference = [tenant/]name[@version]      version = number | alias | sha256:<64 hex digits>
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from loramux.errors import LoramuxError

LOCAL_TENANT = "local"  # the only tenant where there are no keys
LATEST = "latest"  # what a reference without a version means
MAX_REFERENCE = 63 + 1 + 128 + 1 + len("sha256:") + 64
MAX_VERSION = 2**31 - 1  # what a database keeps in an INTEGER

# What a `model` field means without a registry, and words of the server's own addresses.
RESERVED = frozenset(
    {
        *("base", "auto", "router", LATEST),
        *("adapters", "aliases", "versions", "version", "shares", "scores", "samples", "search"),
        *("models", "chat", "completions", "embeddings", "receipts", "tenants", "keys", "audit"),
        *("health", "ready", "metrics", "docs", "redoc", "openapi.json", "v1", "admin", "new"),
    }
)

_TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,63}")
_NUMBER = re.compile(r"[1-9][0-9]{0,9}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class NameProblem(LoramuxError):
    """A name that is not allowed."""

    code = "bad_name"


@dataclass(frozen=True)
class Ref:
    """Which version of which adapter: a number, an alias, or `sha256:` and the digest."""

    tenant: str
    name: str
    version: int | str = LATEST

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}@{self.version}"

    @property
    def digest(self) -> str | None:
        """The 64 hex digits, where the version is given by its content."""
        if isinstance(self.version, str) and self.version.startswith("sha256:"):
            return self.version.removeprefix("sha256:")
        return None

    @property
    def alias(self) -> str | None:
        """The alias, where the version is given by one."""
        return self.version if isinstance(self.version, str) and self.digest is None else None


def check_tenant(text: object) -> str:
    return _matching(
        text,
        _TENANT,
        "tenant name",
        "use lower-case letters, digits and '-', at most 63, starting with a letter or digit",
    )


def check_name(text: object) -> str:
    """An adapter's name; words with a meaning of their own are refused."""
    name = _matching(
        text,
        _NAME,
        "adapter name",
        "use lower-case letters, digits, '.', '_' and '-', at most 128, starting with a letter or digit",
    )
    if name in RESERVED:
        raise NameProblem(f"adapter name {name!r} is reserved; choose another")
    return name


def check_alias(text: object) -> str:
    return _matching(
        text,
        _ALIAS,
        "alias",
        "use lower-case letters, digits, '.', '_' and '-', at most 64, starting with a letter",
    )


def parse_version(text: object) -> int | str:
    """A number from 1, `sha256:` and 64 hex digits, or an alias."""
    if isinstance(text, str) and _NUMBER.fullmatch(text) and int(text) <= MAX_VERSION:
        return int(text)
    if isinstance(text, str) and _DIGEST.fullmatch(text):
        return text
    return _matching(
        text,
        _ALIAS,
        "version",
        f"use a number from 1 to {MAX_VERSION}, an alias such as 'latest', or sha256: and 64 lower-case hex digits",
    )


def parse_ref(text: object, default_tenant: str | None = LOCAL_TENANT) -> Ref:
    """`[tenant/]name[@version]`; whether there is such an adapter is not checked."""
    if not isinstance(text, str):
        raise NameProblem(
            f"a reference is text, got {type(text).__name__}; write [tenant/]name[@version]"
        )
    if len(text) > MAX_REFERENCE:
        raise NameProblem(f"a reference has at most {MAX_REFERENCE} characters, got {len(text):,}")
    tenant, slash, rest = text.rpartition("/")
    name, at, version = rest.partition("@")
    if not slash:
        if default_tenant is None:
            raise NameProblem(f"{shown(text)} names no tenant; write tenant/name[@version]")
        tenant = default_tenant
    return Ref(check_tenant(tenant), check_name(name), parse_version(version) if at else LATEST)


def shown(text: object, limit: int = 80) -> str:
    """A name out of somebody's request, safe to print: escaped, ASCII only, cut."""
    quoted = ascii(text if isinstance(text, str) else type(text).__name__)
    return quoted if len(quoted) <= limit else f"{quoted[:limit]}..."


def _matching(text: object, pattern: re.Pattern[str], what: str, rule: str) -> str:
    if not isinstance(text, str):
        raise NameProblem(f"{what} must be text, got {type(text).__name__}; {rule}")
    if not pattern.fullmatch(text):
        near = unicodedata.normalize("NFC", text) if len(text) <= MAX_REFERENCE else text
        hint = f"; did you mean {near!r}?" if near != text and pattern.fullmatch(near) else ""
        raise NameProblem(f"{what} {shown(text)} is not allowed; {rule}{hint}")
    return text
