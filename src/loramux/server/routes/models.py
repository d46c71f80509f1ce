"""GET /v1/models: the base, then every adapter the caller may use, as OpenAI and vLLM list them.

Why `root` is the adapter's reference: vLLM puts the file's path there, and paths are nobody's business.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from loramux.server.auth import CallerDep, ServicesDep
from loramux.server.choosing import version_of
from loramux.server.errors import ApiError
from loramux.server.resolve import AUTO, unknown_model

PAGE = 1000
LATEST = "latest"


def router() -> APIRouter:
    """GET /v1/models and /v1/models/{model}."""
    routes = APIRouter(tags=["models"])

    @routes.get("/v1/models", summary="What `model` may name")
    async def models(
        request: Request,
        services: ServicesDep,
        caller: CallerDep,
        limit: Annotated[int, Query(ge=1, le=PAGE, description="of one page")] = PAGE,
        after: Annotated[
            str | None, Query(max_length=300, description="id of the last model of the page before")
        ] = None,
    ) -> dict[str, Any]:
        config = request.app.state.config
        found = await services.names.visible(caller, services.base_digest)
        # In order of their names, so that a page follows the one before whatever is published meanwhile.
        versions = sorted(found, key=_order)
        ids = [config.name, *(_id(version, config.name, caller.tenant) for version in versions)]
        start = 0
        if after is not None:
            if after not in ids:
                raise ApiError(
                    "after: not the id of a model of this list", code="invalid_value", param="after"
                )
            start = ids.index(after) + 1
        page = range(start, min(start + limit, len(ids)))
        data = [
            _card(versions[place - 1], config.name, caller.tenant) if place else _base_card(request)
            for place in page
        ]
        return {"object": "list", "data": data, "has_more": page.stop < len(ids)}

    @routes.get("/v1/models/{model:path}", summary="One of them")
    async def model(
        model: str, request: Request, services: ServicesDep, caller: CallerDep
    ) -> dict[str, Any]:
        config = request.app.state.config
        if model in (config.name, "base"):
            return _base_card(request)
        if model == AUTO or services.registry is None or len(model) > 2048:
            raise unknown_model(model)
        return _card(await version_of(services, model, caller), config.name, caller.tenant)

    return routes


def _order(version: Any) -> tuple[str, str]:
    return version.tenant, version.name


def _base_card(request: Request) -> dict[str, Any]:
    config, services = request.app.state.config, request.app.state.services
    return {
        "id": config.name,
        "object": "model",
        "created": 0,
        "owned_by": "loramux",
        "root": config.name,
        "parent": None,
        "max_model_len": services.max_length,
        "loramux": {"digest": services.base_digest},
    }


def _id(version: Any, base_name: str, own: str) -> str:
    """An own adapter has the plain name, as whoever loaded it by vLLM's call looks for it; what the name alone
    does not lead to has its number too."""
    is_plain = version.tenant == own and version.name != base_name
    name = str(version.name if is_plain else f"{version.tenant}/{version.name}")
    return name if LATEST in version.aliases else f"{name}@{version.version}"


def _card(version: Any, base_name: str, own: str) -> dict[str, Any]:
    return {
        "id": _id(version, base_name, own),
        "object": "model",
        "created": int(version.created_at),
        "owned_by": version.tenant,
        "root": version.ref,
        "parent": base_name,
        "loramux": {
            "digest": version.digest,
            "method": version.method,
            "servability": version.servability,
            "max_rank": version.max_rank,
            "aliases": list(version.aliases),
        },
    }
