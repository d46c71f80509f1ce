"""`metrics.public`: the page without a key, and what a key adds to it."""

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from loramux.registry import Registry
from loramux.server.app import create_app
from loramux.tenancy import Tenancy
from server.rig import LOCAL, config, error_of, stub_services


@pytest.fixture
def make(tmp_path) -> Any:
    """A server with the tenants ann and ops, whose metrics are as given."""
    with Registry.open(tmp_path / "registry") as registry:
        tenancy = Tenancy.open(registry.database)
        keys = {}
        for tenant in ("ann", "ops"):
            tenancy.tenants.create(tenant, actor="test")
            keys[tenant] = tenancy.keys.create(tenant, ("admin", "infer"), actor="test").secret

        def served(**metrics: Any) -> SimpleNamespace:
            made = config(tenants={"enabled": True}, metrics={"operators": ["ops"], **metrics})
            app = create_app(made, stub_services(tenancy=tenancy, registry=registry))
            http = TestClient(app, base_url=LOCAL)
            heads = {name: {"authorization": f"Bearer {key}"} for name, key in keys.items()}
            body = {"model": "pico", "prompt": "x", "max_tokens": 1}
            assert http.post("/v1/completions", json=body, headers=heads["ann"]).is_success
            return SimpleNamespace(http=http, heads=heads)

        yield served


def test_without_a_key_there_is_no_page_unless_it_is_public(make):
    served = make()
    assert error_of(served.http.get("/metrics"), 401)["code"] == "invalid_api_key"
    assert (
        served.http.get("/openapi.json").json()["paths"]["/metrics"]["get"].get("security") is None
    )


def test_a_public_page_has_totals_and_no_name(make):
    served = make(public=True)
    page = served.http.get("/metrics")
    assert page.status_code == 200 and "vllm:generation_tokens_total" in page.text
    assert "ann" not in page.text and "ops" not in page.text
    assert served.http.get("/openapi.json").json()["paths"]["/metrics"]["get"]["security"][0] == {}


def test_a_public_page_opens_no_other_route_and_checks_every_key(make):
    served = make(public=True)
    for path in ("/v1/models", "/metrics/", "/v1/adapters", "/nothing"):
        assert error_of(served.http.get(path), 401)["code"] == "invalid_api_key", path
    for wrong in ("Bearer lmx_wrong", "Basic abc"):
        given = served.http.get("/metrics", headers={"authorization": wrong})
        assert error_of(given, 401)["code"] == "invalid_api_key"
    assert served.http.post("/metrics").status_code in (401, 405)


def test_a_key_adds_its_own_names_to_a_public_page_and_an_operator_s_all(make):
    served = make(public=True)
    assert 'tenant="ann"' in served.http.get("/metrics", headers=served.heads["ann"]).text
    assert 'tenant="ann"' in served.http.get("/metrics", headers=served.heads["ops"]).text
