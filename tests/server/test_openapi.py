"""schemathesis over the OpenAPI description, good data and bad, by every role: no 5xx, every answer as described.

The suite tries 50 examples of each operation; LORAMUX_FUZZ_EXAMPLES=500 (`make fuzz`) as many as a release. Each is
sent in one of three ways in turn, for a release in all three: by a key with every right, by one of another role or
without one, and with the names of adapters that exist in the places of the random ones, so that what lies behind the
look-up is reached as well.
"""

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from loramux.registry import Registry
from loramux.registry.checks import BaseShape
from loramux.retrieval import Retriever, make_profile
from loramux.server.app import create_app
from loramux.server.stub import BASE_DIGEST
from loramux.tenancy import Limits, Tenancy
from registry.uploads import put
from server.rig import config, stub_services
from tenancy.test_matrix import ROLES

IN_SUITE = 50
EXAMPLES = int(os.environ.get("LORAMUX_FUZZ_EXAMPLES", IN_SUITE))
WAYS = ("all", "other", "aimed")
SAID = [not_a_server_error, status_code_conformance, response_schema_conformance]
PUBLIC = ("/health", "/ready", "/version", "/v1/receipts/key")
POOR = "poor"  # a tenant whose minute is soon spent


class Encoder:
    id, dim = "ones", 4

    def encode(self, texts: list[str]) -> Any:
        return np.full((len(texts), self.dim), 0.5, np.float32)


class World:
    """A server over a real registry, real tenants and keys, with a stub in the engine's place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = Registry.open(folder / "registry")
        self.tenancy = Tenancy.open(self.registry.database)
        for name in ("acme", "globex"):
            self.tenancy.tenants.create(name, limits=Limits.none(), actor="test")
        self.tenancy.tenants.create(
            POOR, limits=Limits(3, 50, 1000, 2, max_concurrency=1), actor="test"
        )
        self.keys = {
            role: self.tenancy.keys.create("acme", scopes, actor="test").secret
            for role, scopes in ROLES.items()
        }
        self.keys[POOR] = self.tenancy.keys.create(POOR, ROLES["all"], actor="test").secret
        self.retriever = Retriever(encoder=Encoder(), base=BASE_DIGEST)
        put(self.registry, folder, "open", "open", tenant="globex", base=BASE_DIGEST)
        self.registry.share("globex/open", "*", actor="test")
        self.num = 0
        self.restore()
        shape = BaseShape(BASE_DIGEST, "pico", {"model.layers.0.self_attn.q_proj": (32, 32)})
        self.app = create_app(
            config(tenants={"enabled": True}, limits={"max_n": 4, "max_tokens": 64}),
            stub_services(
                registry=self.registry, tenancy=self.tenancy, base=shape, retriever=self.retriever
            ),
        )
        self.others = itertools.cycle([None, *self.keys])
        self.ways = itertools.cycle(WAYS)

    def restore(self) -> None:
        """Make acme/mine, which an example may have deleted."""
        self.num += 1
        made = put(
            self.registry, self.folder, f"mine {self.num}", "mine", tenant="acme", base=BASE_DIGEST
        )
        profile = make_profile([f"a prompt of number {i}" for i in range(10)], encoder=Encoder())
        self.retriever.upsert(made.ref, profile, owner="acme", tags={"base": BASE_DIGEST})

    def send(self, case: Any, role: str | None) -> Any:
        headers = {} if role is None else {"Authorization": f"Bearer {self.keys[role]}"}
        return case.call(app=self.app, headers=headers)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"))
    yield made
    made.registry.close()


schema = schemathesis.openapi.from_dict(
    create_app(config(tenants={"enabled": True}), stub_services(tenancy=object())).openapi()
)


@schema.parametrize()
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_whatever_is_sent_is_answered_as_described(case, world):
    ways = WAYS if EXAMPLES > IN_SUITE else (next(world.ways),)
    if "all" in ways:
        check(case, world.send(case, "all"))
    if "other" in ways:
        role = next(world.others)
        other = world.send(case, role)
        check(case, other)
        if role is None:
            assert case.path in PUBLIC or other.status_code == 401, other.text
    if "aimed" in ways:
        is_aimed = aim(case, next(MODELS))
        check(case, world.send(case, "all"))
        if is_aimed and case.method == "DELETE":
            world.restore()


def check(case: Any, response: Any) -> None:
    """As the description says; methods that it does not know get 405, or 401 before that."""
    if case.method.lower() in schema.raw_schema["paths"][case.path]:
        case.validate_response(response, checks=SAID)
    else:
        assert response.status_code in (401, 405), (case.method, case.path, response.text)
    if response.status_code >= 400 and case.method != "HEAD":
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, error


MODELS = itertools.cycle(
    ["mine", "auto", "base", "mine*0.5+globex/open*-1", "router:mine", "globex/open", "pico:mine"]
)


def aim(case: Any, model: str) -> bool:
    """Put names that exist into a case; False where it has no place for one."""
    if "name" in case.path_parameters:
        case.path_parameters["name"] = "mine"
        return True
    if "model" in case.path_parameters:
        case.path_parameters["model"] = "globex/open"
        return True
    if isinstance(case.body, Mapping) and case.media_type == "application/json":
        known = {key: "mine" for key in ("lora_name", "name") if key in case.body}
        path = {"lora_path": "mine@1"} if "lora_name" in case.body else {}
        named = {"model": model} if "model" in case.body else {}
        case.body = {**case.body, **known, **path, **named}
        return bool(known or named)
    return False


def test_the_description_names_the_errors_of_every_operation_and_the_key():
    for tenancy in (None, object()):
        has_keys = tenancy is not None
        app = create_app(
            config(tenants={"enabled": has_keys}), stub_services(tenancy=tenancy)
        ).openapi()
        for path, operations in app["paths"].items():
            for method, operation in operations.items():
                said = set(operation["responses"])
                assert "422" not in said and "default" not in said, (method, path)
                if not has_keys:
                    assert "403" in said, (method, path)
                elif path in PUBLIC:
                    assert operation["security"] == []
                else:
                    assert {"401", "403"} <= said, (method, path)
        assert ("security" in app) == has_keys


def test_a_public_route_takes_any_authorization_header(world):
    from fastapi.testclient import TestClient

    client = TestClient(world.app)
    for given in ("Basic abc", "Bearer wrong", "x"):
        for path in ("/health", "/ready", "/version"):
            assert client.get(path, headers={"Authorization": given}).status_code == 200, path
        assert client.get("/v1/models", headers={"Authorization": given}).status_code == 401
