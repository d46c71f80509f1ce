"""Tenants: their weight in the engine, their limits, and whether they are served at all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sqlalchemy import Engine, insert, select, update

from loramux.registry.db import begin, reading
from loramux.registry.names import check_tenant
from loramux.tenancy import tables
from loramux.tenancy.audit import Audit
from loramux.tenancy.cache import KeyCache
from loramux.tenancy.caller import Limits, check_weight
from loramux.tenancy.records import Tenant, as_tenant, coded, find, get
from loramux.tenancy.secret import new_salt


class Tenants:
    """Created and changed, never deleted: old receipts and audit entries name them."""

    def __init__(
        self,
        engine: Engine,
        audit: Audit,
        cache: KeyCache,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._engine, self._audit, self._cache, self._wall = engine, audit, cache, wall

    def create(
        self, name: str, *, weight: float = 1.0, limits: Limits | None = None, actor: str
    ) -> Tenant:
        """A new tenant; TenancyError (code "tenant_exists") where the name is taken."""
        tenant = Tenant(
            check_tenant(name), check_weight(weight), limits or Limits(), self._wall(), None, new_salt()
        )  # fmt: skip
        with begin(self._engine) as connection:
            changed = tables.bump(connection)
            if find(connection, name) is not None:
                raise coded("tenant_exists", f"tenant {name!r} exists; choose another name")
            row = {"name": tenant.name, "salt": tenant.salt, "created_at": tenant.created_at}
            values = {**row, **_changeable(tenant), "changed": changed}
            connection.execute(insert(tables.tenants).values(**values))
            detail = {"weight": tenant.weight, "limits": tenant.limits.to_dict()}
            self._audit.write(connection, actor, "tenant.create", name, detail)
        return tenant

    def get(self, name: str) -> Tenant:
        """TenancyError (code "tenant_not_found") with what there is."""
        with reading(self._engine) as connection:
            return get(connection, name)

    def list(self) -> list[Tenant]:
        with reading(self._engine) as connection:
            rows = connection.execute(select(tables.tenants).order_by(tables.tenants.c.name))
            return [as_tenant(row._asdict()) for row in rows]

    def set_limits(self, name: str, limits: Limits, *, actor: str) -> Tenant:
        """From the next request on, in all processes within a second."""
        return self._change(name, actor, "tenant.limits", limits=limits)

    def set_weight(self, name: str, weight: float, *, actor: str) -> Tenant:
        """The share of service beside other tenants'; 2 is twice as much as 1."""
        return self._change(name, actor, "tenant.weight", weight=check_weight(weight))

    def disable(self, name: str, *, actor: str) -> Tenant:
        """None of its keys is valid until `enable`; its adapters stay."""
        return self._change(name, actor, "tenant.disable", disabled_at=self._wall())

    def enable(self, name: str, *, actor: str) -> Tenant:
        return self._change(name, actor, "tenant.enable", disabled_at=None)

    def _change(self, name: str, actor: str, action: str, **values: Any) -> Tenant:
        with begin(self._engine) as connection:
            changed = tables.bump(connection)
            tenant = replace(get(connection, name), **values)
            where = tables.tenants.c.name == name
            row = {**_changeable(tenant), "changed": changed}
            connection.execute(update(tables.tenants).where(where).values(**row))
            detail = {key: value for key, value in tenant.to_dict().items() if key in values}
            self._audit.write(connection, actor, action, name, detail)
        self._cache.look_again()
        return tenant


def _changeable(tenant: Tenant) -> dict[str, Any]:
    limits = json.dumps(tenant.limits.to_dict(), sort_keys=True)
    return {"weight": tenant.weight, "limits": limits, "disabled_at": tenant.disabled_at}
