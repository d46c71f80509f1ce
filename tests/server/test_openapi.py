"""schemathesis over the OpenAPI description: whatever is sent, no 5xx, and every error in the envelope.

The suite tries a few examples per operation; LORAMUX_FUZZ_EXAMPLES=500 tries as many as a release does.
"""

import os
from types import SimpleNamespace

import numpy as np
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from loramux.server.app import create_app
from loramux.server.stub import StubRegistry
from server.rig import config, stub_services

EXAMPLES = int(os.environ.get("LORAMUX_FUZZ_EXAMPLES", "5"))


class Encoder:
    def encode(self, texts):
        return np.ones((len(texts), 4), np.float32)


def served():
    registry = StubRegistry()
    for name in ("law", "tone"):
        registry.add("local", name)
    services = stub_services(registry=registry, retriever=SimpleNamespace(encoder=Encoder()))
    return create_app(config(limits={"max_n": 4, "max_tokens": 64}), services)


app = served()
HERE = {"Host": "127.0.0.1"}  # a server without keys answers to no other name
schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HERE)
OPERATIONS = r"^/v1/(chat/)?completions$|^/v1/embeddings|^/v1/models|^/(health|ready|version)$"


@schema.include(path_regex=OPERATIONS).parametrize()
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_whatever_is_sent_is_answered_as_described(case):
    response = case.call(headers=HERE)
    case.validate_response(
        response, checks=[not_a_server_error, status_code_conformance, response_schema_conformance]
    )
