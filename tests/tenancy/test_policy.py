"""The table of rules: every route has one, and it decides alone."""

from __future__ import annotations

import pytest
from fastapi import APIRouter, FastAPI
from starlette.routing import Mount, Route, WebSocketRoute

from loramux.tenancy import POLICY, SCOPES, Caller, PolicyError, Rule, check_routes, decide
from loramux.tenancy.policy import ALLOW, FORBIDDEN, MISSING, NO_KEY, PUBLIC, rule_of

OPEN = {
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/receipts/key"),
}
ONE = {("GET", "/a"): Rule(PUBLIC)}


def ends(*_: object) -> None:
    """An endpoint."""


def app_with(*paths: str) -> FastAPI:
    app = FastAPI(openapi_url=None)
    for path in paths:
        app.add_api_route(path, ends, methods=["GET"])
    return app


def test_only_these_routes_are_open_to_everybody():
    assert {route for route, rule in POLICY.items() if rule.scope == PUBLIC} == OPEN


def test_routes_that_equal_the_policy_pass():
    check_routes(app_with("/a"), ONE)


@pytest.mark.parametrize(
    "extra",
    [
        lambda app: app.add_api_route("/b", ends, methods=["GET"]),
        lambda app: app.add_api_route("/a", ends, methods=["POST"]),
        lambda app: app.routes.append(Route("/b", ends)),
        lambda app: app.routes.append(Mount("/b", FastAPI(openapi_url=None))),
        lambda app: app.routes.append(Mount("/b", app_with("/c"))),
        lambda app: app.routes.append(WebSocketRoute("/b", ends)),
        lambda app: app.include_router(_router("/b")),
        lambda app: app.include_router(_router("/a"), prefix="/b"),
    ],
    ids=["path", "method", "plain", "mount", "mounted", "websocket", "router", "prefix"],
)
def test_a_route_without_a_policy_stops_the_start(extra):
    app = app_with("/a")
    extra(app)
    with pytest.raises(PolicyError, match="routes without a policy"):
        check_routes(app, ONE)


def _router(path: str) -> APIRouter:
    router = APIRouter()
    router.add_api_route(path, ends, methods=["GET"])
    return router


def test_a_policy_without_a_route_stops_the_start():
    with pytest.raises(PolicyError, match="policies without a route: GET /a"):
        check_routes(app_with(), ONE)


def test_what_is_not_in_the_table_is_for_nobody():
    everything = Caller("acme", "k", frozenset(SCOPES))
    for route in (("GET", "/secret"), ("PATCH", "/v1/models"), ("GET", "/health/")):
        assert rule_of(*route) is None
        for caller in (None, everything):
            assert decide(rule_of(*route), caller) == FORBIDDEN


def test_head_is_what_get_is():
    assert rule_of("HEAD", "/metrics") == rule_of("GET", "/metrics")


@pytest.mark.parametrize("scope", sorted(SCOPES))
def test_no_scope_includes_another(scope):
    caller = Caller("acme", "k", frozenset({scope}))
    for rule in POLICY.values():
        may = rule.scope in (scope, PUBLIC)
        assert decide(rule, caller, "acme") == (ALLOW if may else FORBIDDEN)


@pytest.mark.parametrize("rule", sorted(set(POLICY.values()), key=str), ids=str)
def test_no_scope_reaches_over_the_tenants_edge(rule):
    caller = Caller("acme", "k", frozenset(SCOPES))
    hidden, shared = decide(rule, caller, "globex"), decide(rule, caller, "globex", is_shared=True)
    if rule.touches is None:
        assert (hidden, shared) == (ALLOW, ALLOW)
    else:
        assert (hidden, shared) == (MISSING, ALLOW if rule.touches == "read" else MISSING)


def test_who_lacks_the_scope_learns_nothing_about_names():
    caller = Caller("acme", "k", frozenset({"infer"}))
    rule = Rule("adapters:write", "write")
    answers = {decide(rule, caller, owner) for owner in ("acme", "globex", None)}
    assert answers == {FORBIDDEN}
    assert {decide(rule, None, owner) for owner in ("acme", "globex", None)} == {NO_KEY}


@pytest.mark.parametrize("bad", [("root", None), ("infer", "delete"), ("", None)])
def test_a_rule_that_means_nothing_is_refused(bad):
    with pytest.raises(PolicyError):
        Rule(*bad)
