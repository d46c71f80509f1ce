"""schemathesis over the OpenAPI description, good data and bad: no 5xx, and every answer as described.

The suite tries a few examples of each operation; LORAMUX_FUZZ_EXAMPLES=500 tries as many as a release does.
"""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from loramux.registry import Registry
from loramux.registry.checks import BaseShape
from loramux.server.app import create_app
from loramux.server.stub import BASE_DIGEST
from server.rig import config, stub_services

EXAMPLES = int(os.environ.get("LORAMUX_FUZZ_EXAMPLES", "8"))
HERE = {"Host": "127.0.0.1"}  # a server without keys answers to no other name


class Encoder:
    def encode(self, texts: list[str]) -> Any:
        return np.ones((len(texts), 4), np.float32)


schema = schemathesis.openapi.from_asgi(
    "/openapi.json", create_app(config(), stub_services()), headers=HERE
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What the cases are sent to: a real registry, and a stub in the engine's place."""
    shape = BaseShape(BASE_DIGEST, "pico", {"model.layers.0.self_attn.q_proj": (32, 32)})
    with Registry.open(tmp_path_factory.mktemp("registry")) as registry:
        services = stub_services(
            registry=registry, base=shape, retriever=SimpleNamespace(encoder=Encoder())
        )
        yield create_app(config(limits={"max_n": 4, "max_tokens": 64}), services)


@schema.parametrize()
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_whatever_is_sent_is_answered_as_described(case, served):
    response = case.call(app=served, headers=HERE)
    case.validate_response(
        response, checks=[not_a_server_error, status_code_conformance, response_schema_conformance]
    )


def test_the_description_names_the_error_of_every_operation_and_the_key():
    app = create_app(config(), stub_services())
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            assert "default" in operation["responses"], (method, path)
            assert "422" not in operation["responses"], (method, path)
