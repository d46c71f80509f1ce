"""Versions, aliases and shares of an adapter: `/v1/adapters/{name}/...`.

An alias moves by compare-and-swap. `If-Match: "3"` moves it only if it points at version 3 (409 `conflict` if not);
`If-Match: *` only if there is one, `If-None-Match: *` only if there is none (412 `precondition_failed`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Response
from pydantic import BaseModel, ConfigDict, Field

from loramux.registry.errors import Conflict, NotFound
from loramux.registry.names import LATEST, Ref, check_alias, check_tenant
from loramux.server.adapters import Tenant
from loramux.server.auth import CallerDep, ServicesDep
from loramux.server.errors import ApiError
from loramux.server.services import Services
from loramux.server.views import actor_of, adapter_view, audit, etag, in_thread, own, ref_of

_TAG = re.compile(r'(?:W/)?"([1-9][0-9]{0,9})"|([1-9][0-9]{0,9})')
EVERYONE = "*"
MUST_NOT_EXIST = 0  # to the registry's compare-and-swap
Tag = Annotated[str | None, Header(max_length=64)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AliasBody(_Body):
    version: int = Field(ge=1, le=2**31 - 1, description="where the alias shall point")


class ShareBody(_Body):
    tenant: str = Field(max_length=63, description='who may use it; "*": everyone')


def router() -> APIRouter:
    """Versions, aliases, shares."""
    routes = APIRouter(prefix="/v1/adapters/{name}", tags=["adapters"])

    @routes.get("/versions", summary="All versions of an adapter, oldest first")
    async def versions(
        name: str, services: ServicesDep, caller: CallerDep, tenant: Tenant = None
    ) -> dict[str, Any]:
        ref = _whole(name, caller, tenant)
        found = await in_thread(lambda: services.registry.versions(ref, caller=caller.tenant))
        return {"object": "list", "data": [adapter_view(version, caller) for version in found]}

    @routes.put("/aliases/{alias}", summary="Make or move an alias")
    async def set_alias(
        name: str,
        alias: str,
        body: AliasBody,
        response: Response,
        services: ServicesDep,
        caller: CallerDep,
        if_match: Tag = None,
        if_none_match: Tag = None,
    ) -> dict[str, Any]:
        ref = _whole(name, caller)
        check_alias(alias)
        target = Ref(ref.tenant, ref.name, body.version)
        await own(services, target, caller)
        pointed = Ref(ref.tenant, ref.name, alias)
        expect = await _expected(services, pointed, if_match, if_none_match)

        def move() -> Any:
            try:
                services.registry.set_alias(
                    f"{ref.tenant}/{ref.name}",
                    alias,
                    body.version,
                    expect=expect,
                    actor=actor_of(caller),
                )
            except Conflict:
                if expect == MUST_NOT_EXIST:
                    raise ApiError("the alias exists already", code="precondition_failed") from None
                raise
            audit(services, caller, "alias.set", f"{pointed}", {"version": body.version})
            return services.registry.resolve(target, caller=caller.tenant)

        moved = await in_thread(move)
        response.headers.update(etag(moved))
        return adapter_view(moved, caller)

    @routes.post("/shares", status_code=201, summary="Let another tenant use an adapter")
    async def share(
        name: str, body: ShareBody, services: ServicesDep, caller: CallerDep
    ) -> dict[str, Any]:
        return await _share(services, caller, name, body.tenant, "share")

    @routes.delete("/shares/{tenant}", summary="End a share")
    async def unshare(
        name: str, tenant: str, services: ServicesDep, caller: CallerDep
    ) -> dict[str, Any]:
        return await _share(services, caller, name, tenant, "unshare")

    return routes


async def _share(
    services: Services, caller: Any, name: str, tenant: str, verb: Literal["share", "unshare"]
) -> dict[str, Any]:
    ref = _whole(name, caller)
    if tenant != EVERYONE:
        check_tenant(tenant)
    await _own_name(services, ref, caller)

    def run() -> None:
        change = getattr(services.registry, verb)
        change(f"{ref.tenant}/{ref.name}", tenant, actor=actor_of(caller))
        audit(services, caller, f"adapter.{verb}", f"{ref.tenant}/{ref.name}", {"tenant": tenant})

    await in_thread(run)
    return {"object": "adapter.share", "id": name, "tenant": tenant, "shared": verb == "share"}


async def _own_name(services: Services, ref: Ref, caller: Any) -> None:
    """The caller owns a version under this name, whatever its aliases are."""
    found = await in_thread(
        lambda: services.registry.versions(f"{ref.tenant}/{ref.name}", caller=caller.tenant)
    )
    await own(services, Ref(ref.tenant, ref.name, found[0].version), caller)


async def _expected(
    services: Services, ref: Ref, if_match: str | None, if_none_match: str | None
) -> int | None:
    """The version that the alias must point at, 0 if it must not exist; None: wherever it points."""
    if if_none_match is not None:
        if if_none_match.strip() != "*" or if_match is not None:
            raise _bad("If-None-Match", "is '*', without If-Match")
        return MUST_NOT_EXIST
    if if_match is None:
        return None
    if if_match.strip() != "*":
        found = _TAG.fullmatch(if_match.strip())
        if found is None:
            raise _bad("If-Match", "is the number of a version in quotes, as in ETag, or '*'")
        return int(found[1] or found[2])
    try:
        current = await in_thread(lambda: services.registry.resolve(ref, caller=ref.tenant))
    except NotFound:
        raise ApiError("the alias does not exist", code="precondition_failed") from None
    return int(current.version)


def _bad(header: str, rule: str) -> ApiError:
    return ApiError(f"{header} {rule}", code="invalid_value", param=header)


def _whole(name: str, caller: Any, tenant: str | None = None) -> Ref:
    ref = ref_of(name, caller, tenant)
    if ref.version != LATEST:
        raise ApiError("give the name without a version", code="bad_name", param="name")
    return ref
