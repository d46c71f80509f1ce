"""Who calls, and whether the route's policy lets them: one dependency in front of every route.

Why in front of all: a route that forgets to ask would be open. The table of rules is `loramux.tenancy.policy`.
"""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from typing import Annotated, Any, cast

from fastapi import Depends, Request

from loramux.server.errors import ApiError, as_api_error
from loramux.server.services import Services
from loramux.tenancy.caller import Caller
from loramux.tenancy.errors import AuthError
from loramux.tenancy.policy import ALLOW, NO_KEY, POLICY, PUBLIC, decide, rule_of

OPEN_PATHS = frozenset(path for (_, path), rule in POLICY.items() if rule.scope == PUBLIC)
# In the scope: whose key the request carries, and when that was looked at.
CALLER = "loramux.caller"
FRESH_S = 0.25  # how long that holds: a body may take minutes, and a key be revoked meanwhile
METRICS = "/metrics"  # `metrics.public`: may be asked without a key; one that is sent is checked


def services_of(request: Request) -> Services:
    """The server's parts."""
    return cast(Services, request.app.state.services)


async def authorise(request: Request) -> None:
    """Find the caller and ask the policy; what it refuses never reaches the route."""
    services = services_of(request)
    if services.tenancy is None:
        request.state.caller = Caller.local()
        return
    rule = rule_of(request.method, request.scope["route"].path)
    caller: Any = None
    # A public route does not look at the header: a health check may carry a proxy's own.
    if rule is None or rule.scope != PUBLIC:
        caller, seen = request.scope.get(CALLER, (None, 0.0))  # `check_key` has looked
        if caller is None or time.monotonic() - seen >= FRESH_S:
            secret = bearer(request)
            if secret is None and _is_keyless(request):
                request.state.caller = None
                return
            caller = None if secret is None else services.tenancy.keys.authenticate(secret)
    decision = decide(rule, caller)
    if decision == NO_KEY:
        raise ApiError(
            "no API key was given; send it as 'Authorization: Bearer KEY'", code="invalid_api_key"
        )
    if decision != ALLOW:
        scope = "no scope" if rule is None else f"the scope {rule.scope!r}"
        raise ApiError(f"this needs {scope}, which the key lacks", code="permission_denied")
    request.state.caller = caller


def check_key(services: Services, scope: MutableMapping[str, Any]) -> None:
    """Before anything else of a request is looked at: FastAPI reads the body before it asks `authorise`.

    Paths that are no route need a key as well, so that without one there is nothing to find out.
    """
    if services.tenancy is None or scope["path"] in OPEN_PATHS:
        return
    request = Request(scope)
    secret = bearer(request)
    if secret is None and _is_keyless(request):
        return
    try:
        scope[CALLER] = services.tenancy.keys.authenticate(secret), time.monotonic()
    except AuthError as error:
        raise as_api_error(error) from None


def _is_keyless(request: Request) -> bool:
    """Whether this may be asked without a key here, by the configuration."""
    return request.scope["path"] == METRICS and request.app.state.config.metrics.public is True


def bearer(request: Request) -> str | None:
    """The key in `Authorization: Bearer ...`; None where there is no such header."""
    given = request.headers.get("authorization")
    if given is None:
        return None
    scheme, _, secret = given.partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise ApiError("the Authorization header must be 'Bearer KEY'", code="invalid_api_key")
    return secret.strip()


# FastAPI runs a dependency that is no coroutine in a thread, which costs more than a whole answer of the stub.
async def _services(request: Request) -> Services:
    return services_of(request)


async def _caller(request: Request) -> Any:
    """The caller that `authorise` found; routes behind a scope always have one."""
    return request.state.caller


ServicesDep = Annotated[Services, Depends(_services)]
CallerDep = Annotated[Any, Depends(_caller)]
