"""`Caller` and `Limits`: who is calling and what the tenant may use. What the rest of the server sees of tenancy.

Why frozen values: they are made when a key is read and shared by every request that brings it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any

from loramux.errors import suggest
from loramux.tenancy.errors import TenancyError

LOCAL = "local"  # the tenant of the single-user mode
# Independent of each other: `admin` does not include the rest, and no scope reaches over the tenant's edge.
SCOPES: Mapping[str, str] = MappingProxyType(
    {
        "infer": "send prompts",
        "adapters:read": "list and look at adapters",
        "adapters:write": "upload, share, alias and delete adapters",
        "admin": "load and unload by hand, read metrics",
    }
)


@dataclass(frozen=True)
class Limits:
    """None is no limit. Requests and tokens per minute count what *starts* within any 60 seconds."""

    requests_per_minute: int | None = 600
    tokens_per_minute: int | None = 200_000
    max_bytes: int | None = 10 * 2**30
    max_adapters: int | None = 1000
    max_concurrency: int | None = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if value is not None and not is_count:
                raise TenancyError(
                    f"{name} must be a whole number from 0, or none for no limit, got {value!r}"
                )

    @classmethod
    def none(cls) -> Limits:
        """No limit at all."""
        return cls(**{item.name: None for item in fields(cls)})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Limits:
        """What `to_dict` gave; a missing name has its default, an unknown one is an error."""
        names = [item.name for item in fields(cls)]
        for name in values:
            if name not in names:
                raise TenancyError(f"unknown limit {name!r}; {suggest(name, names)}")
        return cls(**values)

    def to_dict(self) -> dict[str, int | None]:
        return asdict(self)


@dataclass(frozen=True)
class Caller:
    """A proven identity. salt: random per tenant, keeps the tenants' cached prefixes apart."""

    tenant: str
    key_id: str
    scopes: frozenset[str]
    weight: float = 1.0
    limits: Limits = field(default_factory=Limits)
    salt: str = field(default="", repr=False)

    @classmethod
    def local(cls) -> Caller:
        """Who calls in the single-user mode: every scope, no limit."""
        return cls(LOCAL, "local", frozenset(SCOPES), limits=Limits.none(), salt=LOCAL)


def check_scopes(scopes: Iterable[str]) -> frozenset[str]:
    """The scopes, or which one does not exist."""
    given = list(scopes)
    for scope in given:
        if scope not in SCOPES:
            raise TenancyError(f"unknown scope {scope!r}; {suggest(scope, SCOPES)}")
    if not given:
        raise TenancyError(f"a key needs at least one scope of: {', '.join(SCOPES)}")
    return frozenset(given)


def check_weight(weight: float) -> float:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (is_number and math.isfinite(weight) and 0.001 <= weight <= 1000):
        raise TenancyError(f"a weight must be from 0.001 to 1000, got {weight!r}")
    return float(weight)
