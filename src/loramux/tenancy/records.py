"""A tenant as it is stored, and how it is found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, select

from loramux.errors import suggest
from loramux.tenancy import tables
from loramux.tenancy.caller import Limits
from loramux.tenancy.errors import TenancyError


@dataclass(frozen=True)
class Tenant:
    """salt: random, part of every cached prefix of the tenant; shown to nobody."""

    name: str
    weight: float
    limits: Limits
    created_at: float
    disabled_at: float | None
    salt: str = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "weight": self.weight,
            "limits": self.limits.to_dict(),
            "created_at": self.created_at,
            "disabled_at": self.disabled_at,
        }


def find(connection: Connection, name: str) -> Tenant | None:
    rows = connection.execute(select(tables.tenants).where(tables.tenants.c.name == name))
    row = rows.first()
    return None if row is None else as_tenant(row._asdict())


def get(connection: Connection, name: str) -> Tenant:
    tenant = find(connection, name)
    if tenant is None:
        names = list(connection.execute(select(tables.tenants.c.name).limit(50)).scalars())
        hint = suggest(name, names) if names else "there are none yet"
        raise coded("tenant_not_found", f"there is no tenant {name!r}; {hint}")
    return tenant


def as_tenant(row: Mapping[str, Any]) -> Tenant:
    limits = Limits.from_dict(json.loads(row["limits"]))
    return Tenant(
        row["name"], row["weight"], limits, row["created_at"], row["disabled_at"], row["salt"]
    )


def coded(code: str, message: str) -> TenancyError:
    error = TenancyError(message)
    error.code = code
    return error
