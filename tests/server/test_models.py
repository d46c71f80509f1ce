"""GET /v1/models, /v1/embeddings, health, and what a failure looks like."""

import base64
from types import SimpleNamespace

import numpy as np
import pytest

from loramux.server.stub import StubRegistry
from server.rig import client, error_of, stub_services


def test_models_are_the_base_and_what_the_caller_may_use_page_by_page():
    registry = StubRegistry()
    for name in ("b", "a", "c"):
        registry.add("local", name)
    registry.add("other", "foreign")
    registry.add("other", "shared", visibility="shared")
    http = client(stub_services(registry=registry))
    seen: list[str] = []
    after = None
    while True:
        params = {"limit": 2} | ({} if after is None else {"after": after})
        page = http.get("/v1/models", params=params).json()
        seen += [card["id"] for card in page["data"]]
        if not page["has_more"]:
            break
        after = seen[-1]
    assert seen == ["pico", "a", "b", "c", "other/shared"]
    card = http.get("/v1/models/local/a").json()
    assert (card["parent"], card["root"], card["owned_by"]) == ("pico", "local/a@1", "local")
    for name in ("other/foreign", "other/none", "auto", "../x", "%00"):
        assert error_of(http.get(f"/v1/models/{name}"), 404)["code"] in (
            "model_not_found",
            "not_found",
        )
    assert error_of(http.get("/v1/models", params={"after": "other/foreign"}), 400)


class Encoder:
    def encode(self, texts):
        return np.array([[len(text), 1.0] for text in texts], np.float32)


def test_embeddings_are_the_retrievers_and_in_both_formats():
    http = client(stub_services(retriever=SimpleNamespace(encoder=Encoder())))
    body = http.post("/v1/embeddings", json={"model": "minilm", "input": ["a", "bbb"]}).json()
    assert [row["embedding"] for row in body["data"]] == [[1.0, 1.0], [3.0, 1.0]]
    coded = http.post(
        "/v1/embeddings", json={"model": "minilm", "input": "a", "encoding_format": "base64"}
    ).json()
    raw = base64.b64decode(coded["data"][0]["embedding"])
    assert np.frombuffer(raw, np.float32).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": "law"}, 404, "model_not_found"),
        ({"input": ""}, 400, "invalid_value"),
        ({"input": []}, 400, "invalid_value"),
        ({"input": ["x"] * 300}, 400, "invalid_value"),
        ({"dimensions": 8}, 400, "unsupported_parameter"),
    ],
)
def test_embeddings_refuse_what_they_cannot_do(fields, status, code):
    http = client(stub_services(retriever=SimpleNamespace(encoder=Encoder())))
    response = http.post("/v1/embeddings", json={"model": "minilm", "input": "x", **fields})
    error = error_of(response, status)
    assert error["code"] == code
    if code == "model_not_found":
        assert "'minilm'" in error["message"], "the one name that would do"


def test_embeddings_without_an_encoder_say_what_is_missing():
    response = client().post("/v1/embeddings", json={"model": "minilm", "input": "x"})
    assert error_of(response, 501)["code"] == "no_encoder"


def test_health_ready_and_version_need_nothing():
    http = client()
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.get("/version").json()["base"] == "pico"


def test_routes_that_do_not_exist_answer_with_the_envelope_too():
    http = client()
    assert error_of(http.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(http.delete("/health"), 405)["code"] == "method_not_allowed"


def test_an_unforeseen_failure_tells_the_client_an_id_and_the_log_the_rest(caplog):
    registry = StubRegistry()
    registry.add("local", "law")

    def broken(version):
        raise RuntimeError("/srv/secret/path")

    registry.folder = broken  # type: ignore[method-assign]
    response = client(stub_services(registry=registry)).post(
        "/v1/completions", json={"model": "law", "prompt": "kanarienvogel"}
    )
    error = error_of(response, 500)
    assert error["code"] == "internal_error" and "/srv" not in response.text
    assert response.headers["x-request-id"] in error["message"]
    assert "/srv/secret/path" in caplog.text and "kanarienvogel" not in caplog.text
