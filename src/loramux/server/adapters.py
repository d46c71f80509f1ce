"""`/v1/adapters`: list, show, upload and delete. Aliases, versions and shares are in `versions.py`.

Why the order of an upload: bytes are counted while they come, then the checks, then the quota, then one transaction;
whatever is refused has left nothing. The prompts that describe an adapter become a profile and are not kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from loramux.registry.names import check_alias, check_name
from loramux.registry.types import EVERYONE
from loramux.server.auth import CallerDep, ServicesDep, authorise
from loramux.server.config import ServerConfig
from loramux.server.errors import ApiError
from loramux.server.services import Services
from loramux.server.uploads import Form, UploadSlots, received, to_the_end
from loramux.server.views import actor_of, adapter_view, audit, etag, in_thread, own, ref_of

SLOTS = "upload_slots"  # of Services.extras
STAGING = "staging"
FOLLOWER = "follower"  # retrieval.Follower, of a registry that keeps profiles
FIELDS = ("name", "alias", "visibility", "samples", "metadata", "provenance")
MAX_SAMPLES = 1000
PAGE, MAX_PAGE = 100, 1000
# PostgreSQL keeps no NUL in text.
Word = Annotated[str | None, Query(max_length=200, pattern=r"^[^\x00]*$")]
Tenant = Annotated[str | None, Query(max_length=63, description="owner, of a shared adapter")]
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "zip, tar or tar.gz",
                        },
                        "files": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "the files themselves, by their names in the folder",
                        },
                        "name": {"type": "string"},
                        "alias": {"type": "string", "default": "latest"},
                        "visibility": {"type": "string", "enum": ["private", "shared"]},
                        "samples": {
                            "type": "string",
                            "description": "JSON list of at least 10 prompts that it is made for",
                        },
                        "metadata": {"type": "string", "description": "JSON object"},
                        "provenance": {"type": "string", "description": "JSON object"},
                    },
                }
            }
        },
    }
}


def router() -> APIRouter:
    """GET, POST /v1/adapters; GET, DELETE /v1/adapters/{name}."""
    routes = APIRouter(prefix="/v1/adapters", tags=["adapters"])

    @routes.get("", summary="Adapters the caller may use")
    async def list_adapters(
        services: ServicesDep,
        caller: CallerDep,
        query: Annotated[Word, Query(description="part of a name")] = None,
        base: Annotated[Word, Query(description="digest of the base it was made for")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="of one page")] = PAGE,
        after: Annotated[Word, Query(description="`next` of the page before")] = None,
    ) -> dict[str, Any]:
        found = await in_thread(
            lambda: services.registry.list(
                caller.tenant, base=base, query=query, limit=limit + 1, after=after
            )
        )
        page = found[:limit]
        has_more = len(found) > limit
        return {
            "object": "list",
            "data": [adapter_view(version, caller) for version in page],
            "has_more": has_more,
            "next": f"{page[-1].tenant}/{page[-1].name}" if has_more else None,
        }

    @routes.post("", status_code=201, summary="Upload an adapter", openapi_extra=_FORM)
    async def upload(request: Request, services: ServicesDep, caller: CallerDep) -> JSONResponse:
        config: ServerConfig = request.app.state.config
        slots = services.extras.setdefault(SLOTS, UploadSlots())
        with slots.enter(caller.tenant):
            await in_thread(lambda: _check_room(services, caller, request))
            taken = received(
                request,
                config.uploads.max_bytes,
                config.limits.request_timeout_s,
                services.extras.get(STAGING),
            )
            async with taken as form:
                await authorise(request)  # the key may have been revoked while the bytes came
                began = time.time()
                version, notes = await to_the_end(lambda: _publish(services, config, caller, form))
        is_new = version.created_at >= began
        headers = {**etag(version), "Location": f"/v1/adapters/{version.name}"}
        view = {**adapter_view(version, caller), "notes": notes}
        return JSONResponse(view, 201 if is_new else 200, headers)

    @routes.get("/{name}", summary="One adapter, or one version as NAME@VERSION")
    async def show(
        name: str,
        response: Response,
        services: ServicesDep,
        caller: CallerDep,
        tenant: Tenant = None,
    ) -> dict[str, Any]:
        ref = ref_of(name, caller, tenant)
        found = await in_thread(lambda: services.registry.resolve(ref, caller=caller.tenant))
        response.headers.update(etag(found))
        return adapter_view(found, caller)

    @routes.delete("/{name}", summary="Delete an adapter, or one version as NAME@VERSION")
    async def delete(
        name: str,
        services: ServicesDep,
        caller: CallerDep,
        force: Annotated[bool, Query(description="aliases that point there go as well")] = False,
    ) -> dict[str, Any]:
        ref = ref_of(name, caller)
        await own(services, ref, caller)

        def run() -> None:
            target: Any = ref if "@" in name else f"{ref.tenant}/{ref.name}"
            services.registry.delete(target, actor=actor_of(caller), force=force)
            audit(services, caller, "adapter.delete", f"{ref.tenant}/{name}")

        await in_thread(run)
        return {"object": "adapter.deleted", "id": name, "deleted": True}

    return routes


# --- Uploading --------------------------------------------------------------------------------------


def _check_room(services: Services, caller: Any, request: Request) -> None:
    """Before the first byte is read, as far as the headers tell."""
    if services.base is None:
        raise ApiError(
            "this server takes no uploads: its base is not known", code="no_uploads", status=503
        )
    given = request.headers.get("content-length", "")
    if services.tenancy is not None:
        size = int(given) if given.isdigit() else 0
        services.tenancy.quotas.check_upload(caller, size, 1)


def _publish(
    services: Services, config: ServerConfig, caller: Any, form: Form
) -> tuple[Any, list[str]]:
    """The version, and what the checks remarked."""
    from loramux.registry.checks import UploadLimits, check_upload

    unknown = sorted(set(form.fields) - set(FIELDS))
    if unknown:
        raise ApiError(
            f"unknown field {unknown[0][:40]!r}; allowed: {', '.join((*FIELDS, 'file', 'files'))}",
            code="unknown_parameter",
        )
    if not form.fields.get("name"):
        raise ApiError("name is missing", code="missing_parameter", param="name")
    name = check_name(form.fields["name"])
    alias = check_alias(form.fields.get("alias", "latest"))
    visibility = form.fields.get("visibility")
    if visibility not in (None, "private", "shared"):
        raise ApiError(
            f"visibility {visibility[:40]!r}: allowed are 'private' and 'shared'",
            code="invalid_value", param="visibility",
        )  # fmt: skip
    metadata = _object(form, "metadata")
    provenance = _object(form, "provenance")
    profile = _profile(services, form)
    limits = UploadLimits(max_rank=config.uploads.max_rank, max_bytes=config.uploads.max_bytes)
    taken = check_upload(_source(form), services.base, limits, staging=form.home)
    with taken as checked, _room(services, caller, checked):
        kept = {} if profile is None or FOLLOWER not in services.extras else {"samples": profile}
        version = services.registry.publish(
            checked,
            tenant=caller.tenant,
            name=name,
            alias=alias,
            visibility=visibility,
            metadata=metadata,
            provenance={**provenance, "source": "upload"},
            actor=actor_of(caller),
            **kept,
        )
        audit(services, caller, "adapter.publish", version.ref, {"digest": version.digest})
    notes = list(checked.notes)
    if profile is not None:
        remember(services, version, profile)
    elif FOLLOWER in services.extras:
        from loramux.retrieval.unfound import samples_note

        note = samples_note(services.registry, version)
        notes += [] if note is None else [note]
    return version, notes


def _source(form: Form) -> Any:
    from loramux.registry.checks import from_archive, from_members

    archives = [path for field, _, path in form.files if field == "file"]
    members = [(filename, path) for field, filename, path in form.files if field == "files"]
    other = [field for field, _, _ in form.files if field not in ("file", "files")]
    if other:
        raise ApiError(
            f"unknown file field {other[0][:40]!r}; use file or files", code="unknown_parameter"
        )
    if (len(archives), bool(members)) not in ((1, False), (0, True)):
        raise ApiError(
            "send one archive as `file`, or the files themselves as `files`", code="bad_form"
        )
    if archives:
        return from_archive(archives[0])
    if len({filename for filename, _ in members}) != len(members):
        raise ApiError("two files have the same name", code="duplicate_name")
    return from_members(dict(members))


def _room(services: Services, caller: Any, checked: Any) -> Any:
    """The tenant's room for these bytes, held until the publish is committed."""
    if services.tenancy is None:
        return nullcontext()
    return services.tenancy.quotas.hold_upload(caller, checked.num_bytes, 1)


def _object(form: Form, field: str) -> dict[str, Any]:
    value = _json(form, field, {})
    if not isinstance(value, Mapping):
        raise ApiError(f"{field} must be a JSON object", code="invalid_value", param=field)
    return dict(value)


def _profile(services: Services, form: Form) -> Any:
    """What retrieval keeps of the sample prompts; None without any."""
    samples = _json(form, "samples", None)
    if samples is None:
        return None
    is_texts = isinstance(samples, list) and all(isinstance(text, str) for text in samples)
    if not is_texts or len(samples) > MAX_SAMPLES:
        raise ApiError(
            f"samples must be a JSON list of at most {MAX_SAMPLES} texts",
            code="invalid_value",
            param="samples",
        )
    if services.retriever is None:
        return None
    from loramux.retrieval import make_profile

    return make_profile(samples, encoder=services.retriever.encoder)


def _json(form: Form, field: str, default: Any) -> Any:
    text = form.fields.get(field, "")
    if not text.strip():
        return default
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ApiError(f"{field} is not valid JSON", code="invalid_value", param=field) from None


def remember(services: Services, version: Any, profile: Any) -> None:
    """Let `auto` find it from now on; blocks."""
    follower = services.extras.get(FOLLOWER)
    if follower is not None:
        follower.sync()  # the profile is in the registry's database, with the version
        return
    readers = (EVERYONE,) if version.visibility == "shared" else ()
    tags = {"base": version.base_digest or "", "method": version.method, "readers": readers}
    services.retriever.upsert(version.ref, profile, owner=version.tenant, tags=tags)
