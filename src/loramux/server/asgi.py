"""Around every request: an id, a cap on the body, who may reach a server without keys, and what went unforeseen.

Why plain ASGI: Starlette's middleware class copies every chunk of a stream through a queue of its own.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from loramux.errors import LoramuxError
from loramux.server.auth import CALLER, check_key
from loramux.server.config import LimitsConfig
from loramux.server.errors import ApiError, as_api_error, envelope, response_of
from loramux.server.limits import PROBES, RETRY_S
from loramux.server.services import Services
from loramux.tenancy.caller import Caller

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LARGE_BODIES = frozenset({"/v1/adapters"})  # their routes count bytes themselves
LEAST_RATE = 4096  # bytes per second that a body must come at, beyond the first `read_timeout_s`
_CHANGING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_INFERENCE = ("/v1/chat/", "/v1/completions", "/v1/embeddings")
_METERED = frozenset({"/v1/chat/completions", "/v1/completions"})  # by tokens a minute


class Outer:
    """The outermost layer of the application."""

    def __init__(self, app: App, services: Services, limits: LimitsConfig, is_local: bool):
        self.app, self.services = app, services
        self.limits, self.is_local = limits, is_local
        # Half: connections that wait for their next request are open as well.
        self.most = max(1, limits.max_connections // 2)
        # Or one tenant's bodies, each a byte at a time, would keep everybody else out.
        self.most_of_one = max(1, self.most * 3 // 4)
        self.num_active = 0
        self._by_tenant: Counter[str] = Counter()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        is_change = scope["method"] in _CHANGING and not scope["path"].startswith(_INFERENCE)
        is_started = False

        async def tagged(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                if is_change and message["status"] < 400:
                    self.services.names.forget()  # before the client can ask for what it changed
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        self.num_active += 1
        try:
            if self.num_active > self.most and scope["path"] not in PROBES:
                raise self._turned_away(scope)
            self._check(scope)
            with self._counted(scope):
                if scope["path"] not in LARGE_BODIES:
                    receive = self._capped(scope, receive)
                await self.app(scope, receive, tagged)
        except ApiError as error:
            if is_started:
                raise
            await response_of(error)(scope, receive, tagged)
        except Exception:
            if is_started:
                raise
            # The trace goes to the log; what it says may hold paths, or names that are not the caller's.
            log.exception("%s: %s failed", request_id, scope["method"])
            body = envelope(500, f"the server failed at {request_id}", "internal_error")
            await JSONResponse(body, 500)(scope, receive, tagged)
        finally:
            self.num_active -= 1

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        """Without keys only this machine may call, and no web page through its user's browser."""
        if not self.is_local:
            check_key(self.services, scope)
            return
        headers = dict(scope["headers"])
        hosts = [headers.get(b"host", b"").decode("latin-1")]
        origin = headers.get(b"origin")
        if origin is not None:
            hosts.append(urlsplit(origin.decode("latin-1")).netloc)
        if not all(_is_loopback(host) for host in hosts):
            raise ApiError(
                "this server has no keys and answers to http://127.0.0.1 and http://localhost only",
                code="permission_denied",
            )

    @contextmanager
    def _counted(self, scope: MutableMapping[str, Any]) -> Iterator[None]:
        """One of the tenant's requests under way, whatever it is at; a refusal if it has too many."""
        if CALLER not in scope:
            yield
            return
        tenant = scope[CALLER][0].tenant
        self._check_share(tenant)
        self._by_tenant[tenant] += 1
        try:
            yield
        finally:
            self._by_tenant[tenant] -= 1
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]

    def _check_share(self, tenant: str) -> None:
        if self._by_tenant.get(tenant, 0) >= self.most_of_one:
            raise ApiError(
                f"you have {self.most_of_one} requests under way already; wait for one to end",
                code="too_many_requests", status=429, headers={"Retry-After": str(RETRY_S)},
            )  # fmt: skip

    def _turned_away(self, scope: MutableMapping[str, Any]) -> ApiError:
        """What a call is told when more are under way than can be: 429 if its own tenant has no room, else 503.

        Nothing of it is read, and a key that is not valid learns nothing but that.
        """
        full = ApiError(
            "the server has too many calls under way; try again shortly",
            code="overloaded", headers={"Retry-After": str(RETRY_S)},
        )  # fmt: skip
        try:
            self._check(scope)
        except ApiError:
            return full
        caller = Caller.local() if self.is_local else scope.get(CALLER, (None,))[0]
        try:
            if caller is not None:
                self._check_share(caller.tenant)
                if scope["path"].startswith(_INFERENCE):
                    self.services.gate.check_share(caller.tenant)
                if scope["path"] in _METERED:
                    self.services.check_room(caller)
        except LoramuxError as error:
            return as_api_error(error)
        return full

    def _capped(self, scope: MutableMapping[str, Any], receive: Receive) -> Receive:
        limit = self.limits.body_bytes
        refusal = ApiError(f"the body exceeds {limit} bytes", code="too_large")
        given = dict(scope["headers"]).get(b"content-length", b"0")
        if given.isdigit() and int(given) > limit:
            raise refusal
        seen, is_whole = 0, False
        clock, patience = asyncio.get_running_loop().time, self.limits.read_timeout_s
        began = clock()

        async def counted() -> Message:
            nonlocal seen, is_whole
            if is_whole:  # what may still come is that the client goes away
                return await receive()
            # Both silence and a drip are bounded: a byte now and then would hold the call for days.
            until = min(clock() + patience, began + patience + seen / LEAST_RATE)
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time") from None
            if message["type"] == "http.request":
                is_whole = not message.get("more_body", False)
                seen += len(message.get("body", b""))
                if seen > limit:  # FastAPI lets only its own exception out of reading a body
                    raise HTTPException(413, str(refusal))
            return message

        return counted


def _is_loopback(netloc: str) -> bool:
    """Whether "host:port" names this machine."""
    try:
        host = urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return False
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
