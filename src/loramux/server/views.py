"""What `/v1/adapters` says of an adapter, and the steps its routes share: references, rights, threads, audit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from loramux.registry.names import Ref, parse_ref
from loramux.server.errors import ApiError
from loramux.server.services import Services

Result = TypeVar("Result")


def adapter_view(version: Any, caller: Any) -> dict[str, Any]:
    """A version as JSON. Where it came from is its owner's to know."""
    is_own = version.tenant == caller.tenant
    view = {
        "object": "adapter",
        "id": version.name if is_own else f"{version.tenant}/{version.name}",
        "ref": version.ref,
        "tenant": version.tenant,
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "digest": version.digest,
        "base_digest": version.base_digest,
        "method": version.method,
        "servability": version.servability,
        "max_rank": version.max_rank,
        "bytes": version.num_bytes,
        "created": int(version.created_at),
        "visibility": version.visibility,
        "metadata": dict(version.metadata),
        "files": [
            {"path": file.path, "sha256": file.sha256, "bytes": file.num_bytes}
            for file in version.files
        ],
    }
    if is_own:
        view["provenance"] = dict(version.provenance)
    return view


def etag(version: Any) -> dict[str, str]:
    """The number of a version is what `If-Match` of an alias compares."""
    return {"ETag": f'"{version.version}"'}


def ref_of(name: str, caller: Any, tenant: str | None = None) -> Ref:
    """The reference in a path: NAME or NAME@VERSION, of the caller's tenant unless the query names another."""
    if "/" in name:
        raise ApiError("name another tenant's adapter with ?tenant=", code="bad_name", param="name")
    return parse_ref(name, default_tenant=tenant or caller.tenant)


async def in_thread(function: Callable[[], Result]) -> Result:
    """Databases and disks block; the event loop must not."""
    return await asyncio.to_thread(function)


async def own(services: Services, ref: Ref, caller: Any) -> Any:
    """The version, if it is the caller's to change. Somebody else's is missing, or visible and not to be changed."""
    found = await in_thread(lambda: services.registry.resolve(ref, caller=caller.tenant))
    if found.tenant != caller.tenant:
        raise ApiError(
            "this adapter is shared with you, and only its owner may change it",
            code="permission_denied",
        )
    return found


def actor_of(caller: Any) -> str:
    return f"{caller.tenant}:{caller.key_id}"


def audit(
    services: Services,
    caller: Any,
    action: str,
    target: str,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """A line in the audit log, where there is one; blocks."""
    if services.tenancy is not None:
        services.tenancy.audit.append(actor_of(caller), action, target, detail)
