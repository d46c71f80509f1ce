"""Which key may use which route: one table, and everything that is not in it is refused.

Why a table: a check inside each handler is forgotten once (an administrative route of another server lacked it for
months). Here a route without a line stops the start, and so does a line without a route.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from loramux.tenancy.caller import SCOPES, Caller
from loramux.tenancy.errors import PolicyError

PUBLIC = "public"
# What a decision says; the server turns them into 200, 401, 403 and 404.
ALLOW, NO_KEY, FORBIDDEN, MISSING = "allow", "unauthenticated", "forbidden", "missing"


@dataclass(frozen=True)
class Rule:
    """scope: what the key needs, or "public". touches: "read" or "write" for routes about one adapter, else None."""

    scope: str
    touches: str | None = None

    def __post_init__(self) -> None:
        if self.scope != PUBLIC and self.scope not in SCOPES:
            raise PolicyError(f"a rule needs {PUBLIC!r} or a scope, got {self.scope!r}")
        if self.touches not in (None, "read", "write"):
            raise PolicyError(f"a rule touches 'read', 'write' or nothing, got {self.touches!r}")


_INFER = Rule("infer", "read")
_LIST = Rule("adapters:read")
_READ = Rule("adapters:read", "read")
_NEW = Rule("adapters:write")
_WRITE = Rule("adapters:write", "write")

POLICY: Mapping[tuple[str, str], Rule] = MappingProxyType(
    {
        ("POST", "/v1/chat/completions"): _INFER,
        ("POST", "/v1/completions"): _INFER,
        ("POST", "/v1/embeddings"): Rule("infer"),
        ("GET", "/v1/models"): _LIST,
        ("GET", "/v1/models/{model:path}"): _READ,
        ("POST", "/v1/load_lora_adapter"): Rule("admin", "read"),
        ("POST", "/v1/unload_lora_adapter"): Rule("admin", "write"),
        ("GET", "/v1/adapters"): _LIST,
        ("POST", "/v1/adapters"): _NEW,
        ("GET", "/v1/adapters/{name}"): _READ,
        ("DELETE", "/v1/adapters/{name}"): _WRITE,
        ("GET", "/v1/adapters/{name}/versions"): _READ,
        ("PUT", "/v1/adapters/{name}/aliases/{alias}"): _WRITE,
        ("POST", "/v1/adapters/{name}/shares"): _WRITE,
        ("DELETE", "/v1/adapters/{name}/shares/{tenant}"): _WRITE,
        ("GET", "/v1/receipts/key"): Rule(PUBLIC),
        ("GET", "/health"): Rule(PUBLIC),
        ("GET", "/ready"): Rule(PUBLIC),
        ("GET", "/version"): Rule(PUBLIC),
        ("GET", "/openapi.json"): Rule(PUBLIC),
        ("GET", "/metrics"): Rule("admin"),
    }
)


def rule_of(
    method: str, template: str, policy: Mapping[tuple[str, str], Rule] = POLICY
) -> Rule | None:
    """The rule of a route, None for one that is not declared; HEAD is what GET is."""
    return policy.get(("GET" if method == "HEAD" else method, template))


def decide(
    rule: Rule | None, caller: Caller | None, owner: str | None = None, *, is_shared: bool = False
) -> str:
    """ALLOW, NO_KEY, FORBIDDEN or MISSING.

    rule: None for a route that is not declared, which nobody may use. caller: None without a valid key. owner: the
    tenant of the adapter asked about, None if there is none. is_shared: its owner lets this caller use it.
    """
    if rule is None:
        return FORBIDDEN
    if rule.scope == PUBLIC:
        return ALLOW
    if caller is None:
        return NO_KEY
    if rule.scope not in caller.scopes:
        return FORBIDDEN
    # Scope first: who may not ask at all learns nothing about names.
    if rule.touches is None or owner is None or owner == caller.tenant:
        return ALLOW
    # Routes that write know only the caller's own names: what is shared may be read.
    return ALLOW if is_shared and rule.touches == "read" else MISSING


def check_routes(app: Any, policy: Mapping[tuple[str, str], Rule] = POLICY) -> None:
    """Every route has a rule and every rule a route, or PolicyError. `app`: a FastAPI or Starlette application."""
    served = set(_all_of(app.router))
    wild = sorted(f"{method} {path}" for method, path in served if (method, path) not in policy)
    idle = sorted(f"{method} {path}" for method, path in policy if (method, path) not in served)
    problems = []
    if wild:
        problems.append(f"routes without a policy: {', '.join(wild)}")
    if idle:
        problems.append(f"policies without a route: {', '.join(idle)}")
    if problems:
        raise PolicyError(f"{'; '.join(problems)}; declare them in loramux/tenancy/policy.py")


def _routes_of(routes: Iterable[Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for route in routes:
        # Newer FastAPI keeps an included router as one entry, which holds the router and the prefix it was given.
        held = getattr(route, "original_router", None)
        if held is not None:
            yield from _all_of(held, prefix + route.include_context.prefix)
            continue
        path = prefix + getattr(route, "path", "")
        methods = getattr(route, "methods", None)
        inner = getattr(route, "routes", None)
        if methods:
            yield from ((method, path) for method in methods if method != "HEAD")
        elif inner:
            yield from _routes_of(inner, path)
        else:  # a websocket, a mount of a foreign application: nothing that has a rule
            yield (type(route).__name__.upper(), path)


def _all_of(router: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Also what is asked last: newer FastAPI keeps it in a list of its own."""
    yield from _routes_of(router.routes, prefix)
    yield from _routes_of(getattr(router, "_low_priority_routes", ()), prefix)
