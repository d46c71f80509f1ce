"""vLLM's calls for loading and unloading an adapter by hand, with its answers: plain text, or its errors.

Here loading publishes: `lora_path` is a reference into the registry (the caller's own), or a folder under one of the
roots that the configuration allows, which is checked like any upload. The name then answers for the caller's tenant.
Unloading takes back only what was loaded this way; what was uploaded is deleted at /v1/adapters.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from loramux.errors import LoramuxError
from loramux.registry.errors import NotFound
from loramux.registry.names import NameProblem, Ref, check_name, parse_ref
from loramux.server.auth import CallerDep, ServicesDep
from loramux.server.config import ServerConfig
from loramux.server.errors import as_api_error
from loramux.server.services import Services
from loramux.server.views import actor_of, audit, in_thread

SOURCE = "load_lora_adapter"
SCHEMES = ("registry:", "loramux://")
_TEXT: dict[int | str, dict[str, Any]] = {
    200: {"description": "Success", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


class _Body(BaseModel):
    # vLLM ignores fields that it does not know, and its clients send such.
    model_config = ConfigDict(extra="ignore")


class LoadBody(_Body):
    lora_name: str = Field("", max_length=1000)
    lora_path: str = Field(
        "", max_length=4096, description="registry reference, or an allowed folder"
    )
    load_inplace: bool = False


class UnloadBody(_Body):
    lora_name: str = Field("", max_length=1000)
    lora_int_id: int | None = None


class VllmError(LoramuxError):
    """An error in vLLM's words: its type, and the status as its code."""

    code = "vllm"

    def __init__(self, message: str, kind: str, status: int) -> None:
        super().__init__(message)
        self.kind, self.status = kind, status

    def response(self) -> JSONResponse:
        said = {"message": str(self), "type": self.kind, "param": None, "code": self.status}
        return JSONResponse({"error": said}, self.status)


def router() -> APIRouter:
    """POST /v1/load_lora_adapter, /v1/unload_lora_adapter."""
    routes = APIRouter(tags=["vllm"], prefix="/v1")

    @routes.post("/load_lora_adapter", response_class=PlainTextResponse, responses=_TEXT,
                 summary="Make a name answer, as in vLLM")  # fmt: skip
    async def load(
        body: LoadBody, request: Request, services: ServicesDep, caller: CallerDep
    ) -> Response:
        config: ServerConfig = request.app.state.config
        try:
            await in_thread(lambda: _load(services, config, caller, body))
        except VllmError as error:
            return error.response()
        services.names.forget()
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @routes.post("/unload_lora_adapter", response_class=PlainTextResponse, responses=_TEXT,
                 summary="Take a loaded name back, as in vLLM")  # fmt: skip
    async def unload(body: UnloadBody, services: ServicesDep, caller: CallerDep) -> Response:
        try:
            await in_thread(lambda: _unload(services, caller, body))
        except VllmError as error:
            return error.response()
        services.names.forget()
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return routes


def _load(services: Services, config: ServerConfig, caller: Any, body: LoadBody) -> None:
    if not body.lora_name or not body.lora_path:
        raise VllmError(
            "Both 'lora_name' and 'lora_path' must be provided.", "InvalidUserInput", 400
        )
    name = _name(body.lora_name)
    if _known(services, caller, name) and not body.load_inplace:
        raise VllmError(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True.",
            "InvalidUserInput", 400,
        )  # fmt: skip
    try:
        source = _source(services, config, caller, body.lora_path)
        _publish(services, config, caller, name, source)
    except VllmError:
        raise
    except LoramuxError as error:
        said = as_api_error(error)  # its own text may hold a path
        raise VllmError(str(said), "BadRequestError", said.status) from None


def _publish(
    services: Services, config: ServerConfig, caller: Any, name: str, source: Path
) -> None:
    from loramux.registry.checks import UploadLimits, check_upload, from_folder

    limits = UploadLimits(max_rank=config.uploads.max_rank, max_bytes=config.uploads.max_bytes)
    with check_upload(from_folder(source), services.base, limits) as checked:
        room: Any = nullcontext()
        if services.tenancy is not None:
            room = services.tenancy.quotas.hold_upload(caller, checked.num_bytes, 1)
        with room:
            version = services.registry.publish(
                checked, tenant=caller.tenant, name=name, alias="latest",
                provenance={"source": SOURCE}, actor=actor_of(caller),
            )  # fmt: skip
        audit(services, caller, "adapter.load", version.ref, {"digest": version.digest})


def _unload(services: Services, caller: Any, body: UnloadBody) -> None:
    if not body.lora_name:
        raise VllmError("'lora_name' needs to be provided.", "InvalidUserInput", 400)
    name = body.lora_name
    missing = VllmError(f"The lora adapter '{_shown(name)}' cannot be found.", "NotFoundError", 404)
    try:
        versions = _known(services, caller, check_name(name))
    except NameProblem:
        raise missing from None
    if not versions:
        raise missing
    if any(version.provenance.get("source") != SOURCE for version in versions):
        raise VllmError(
            f"The lora adapter '{name}' was uploaded, not loaded; delete it with DELETE /v1/adapters/{name}.",
            "BadRequestError", 400,
        )  # fmt: skip
    services.registry.delete(f"{caller.tenant}/{name}", actor=actor_of(caller))
    audit(services, caller, "adapter.unload", f"{caller.tenant}/{name}")


def _name(given: str) -> str:
    try:
        return check_name(given)
    except NameProblem as error:
        raise VllmError(str(error), "BadRequestError", 400) from None


def _known(services: Services, caller: Any, name: str) -> Sequence[Any]:
    """The tenant's versions of a name; none if there is no such name."""
    try:
        found: Sequence[Any] = services.registry.versions(
            f"{caller.tenant}/{name}", caller=caller.tenant
        )
    except NotFound:
        return ()
    return found


def _source(services: Services, config: ServerConfig, caller: Any, given: str) -> Path:
    """The folder to publish. One answer for what is missing, foreign, or not allowed to be looked at."""
    missing = VllmError(f"No adapter found for {_shown(given)}", "NotFoundError", 404)
    if os.path.isabs(given):
        found = allowed_folder(given, config.uploads.lora_path_roots)
        if found is None:
            raise missing
        return found
    for scheme in SCHEMES:
        given = given.removeprefix(scheme)
    try:
        ref: Ref = parse_ref(given, default_tenant=caller.tenant)
        version = services.registry.resolve(ref, caller=caller.tenant)
    except (NameProblem, NotFound):
        raise missing from None
    if version.tenant != caller.tenant:
        # A copy would outlive the share.
        raise VllmError(
            f"{version.ref} is shared with you: use it by that name, without loading it",
            "BadRequestError", 400,
        )  # fmt: skip
    folder: Path = services.registry.folder(version)
    return folder


def allowed_folder(given: str, roots: Sequence[str]) -> Path | None:
    """The folder, if it lies under one of the roots and no part of its path below the root is a link."""
    if "\0" in given:
        return None
    path = os.path.normpath(given)
    for root in roots:
        home = os.path.realpath(root)
        for start in (os.path.normpath(root), home):
            if path == start or not path.startswith(start.rstrip("/") + "/"):
                continue
            inside = os.path.join(home, os.path.relpath(path, start))
            if os.path.realpath(inside) == inside and os.path.isdir(inside):
                return Path(inside)
    return None


def _shown(text: str) -> str:
    """What was given, if it can be shown."""
    return text if len(text) <= 200 and text.isprintable() else "what was given"
