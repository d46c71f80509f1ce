"""POST /v1/chat/completions over the stub: what is taken, what is refused, what a reply and a stream look like."""

import json
from typing import Any

import pytest

from loramux.engine.request import NOT_FINITE, Reason
from loramux.formats.errors import OTHER_BASE
from server.rig import client, error_of, stub_services

HI = [{"role": "user", "content": "hi"}]


def ask(http: Any, **fields: Any) -> Any:
    return http.post("/v1/chat/completions", json={"model": "law", "messages": HI, **fields})


def events(response: Any) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_reply_names_the_version_that_answered_and_counts_tokens():
    response = ask(client())
    body = response.json()
    assert body["model"] == response.headers["x-loramux-adapter"] == "local/law@1"
    (part,) = body["loramux"]["adapters"]
    assert part["ref"] == "local/law@1" and part["weight"] == 1.0
    assert body["choices"][0]["message"]["content"] == part["digest"][:8]
    assert body["usage"]["completion_tokens"] == 8
    assert response.headers["x-request-id"].startswith("req-")


def test_each_sample_of_a_stream_starts_with_the_role_and_ends_with_a_reason():
    got = events(ask(client(), stream=True, n=2, stream_options={"include_usage": True}))
    for index in (0, 1):
        mine = [c["choices"][0] for c in got if c["choices"] and c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert [choice["finish_reason"] for choice in mine].count("stop") == 1
        assert mine[-1]["finish_reason"] == "stop"
    assert got[-1]["choices"] == [] and got[-1]["usage"]["completion_tokens"] == 16
    assert all(chunk["usage"] is None for chunk in got[:-1])
    assert "loramux" in got[-2] and all("loramux" not in chunk for chunk in got[:-2])


def test_without_include_usage_no_chunk_is_without_a_choice():
    got = events(ask(client(), stream=True, stream_options=None))
    assert all(chunk["choices"] and "usage" not in chunk for chunk in got)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"logit_bias": {"1": 2}}, "unsupported_parameter", "logit_bias"),
        ({"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort"),
        ({"temperatur": 1}, "unknown_parameter", "temperatur"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"temperature": "1"}, "invalid_value", "temperature"),
        ({"n": 17}, "invalid_value", "n"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"max_tokens": 5000}, "invalid_value", "max_tokens"),
        ({"max_tokens": 999}, "context_length_exceeded", "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "invalid_value", "max_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"stop": ["x"] * 17}, "invalid_value", "stop"),
        ({"stop": [""]}, "invalid_value", "stop"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "invalid_value", "messages.0.role"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "unsupported_parameter",
            "messages.0.role",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "unsupported_parameter",
            "messages.0.content",
        ),
        ({"skip_special_tokens": False}, "unsupported_parameter", "skip_special_tokens"),
        ({"guided_json": {}}, "unsupported_parameter", "guided_json"),
        ({"add_special_tokens": True}, "unsupported_parameter", "add_special_tokens"),
        ({"continue_final_message": True}, "unsupported_parameter", "continue_final_message"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
            "unsupported_parameter",
            "messages.0.tool_calls",
        ),
        ({"adapter_id": "tone"}, "invalid_value", "model"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(fields, code, param):
    services = stub_services()
    error = error_of(ask(client(services), **fields), 400)
    assert (error["code"], error["param"]) == (code, param), error
    assert services.engine.served == 0 and services.gate.num_inflight == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}]},
        {"messages": [{"role": "assistant", "content": "x", "refusal": None, "tool_calls": None}]},
        {"max_completion_tokens": 5, "stop": "x", "seed": 1, "top_k": -1},
        {"skip_special_tokens": True, "length_penalty": 1.0, "guided_json": None, "bad_words": []},
        {"add_generation_prompt": True, "add_special_tokens": False, "chat_template_kwargs": {}},
    ],
)
def test_what_asks_for_nothing_is_accepted(fields):
    assert ask(client(), **fields).status_code == 200


def test_a_prompt_is_not_repeated_by_an_error():
    secret = "kanarienvogel"
    for fields in (
        {"messages": [{"role": "user", "content": secret, "x": secret}]},
        {"messages": secret},
    ):
        assert secret not in ask(client(), **fields).text


def test_an_answer_that_fails_is_an_error_with_a_status_and_without_the_engines_own_words():
    services = stub_services()
    services.engine.fail = Reason("folder /srv/secret/adapter is of elsewhere", OTHER_BASE)
    error = error_of(ask(client(services)), 400)
    assert error["code"] == "wrong_base" and "/srv" not in error["message"]
    services.engine.fail = Reason("row 3 of /srv/secret/adapter", NOT_FINITE)
    error = error_of(ask(client(services)), 500)
    assert error["code"] == "not_finite" and "/srv" not in error["message"]
    # What it is comes from its code: a file may be called as it likes.
    services.engine.fail = "/srv/secret/trained on another base, not finite/adapter is gone"
    error = error_of(ask(client(services)), 500)
    assert error["code"] == "engine_error" and "/srv" not in error["message"]
    services.engine.fail = "the same"
    response = ask(client(services), stream=True)
    assert response.status_code == 200  # it had begun
    got = events(response)
    assert got[-1]["error"]["code"] == "engine_error" and "loramux" in got[-1]


def test_a_stream_whose_model_does_not_exist_has_a_status():
    assert error_of(ask(client(), model="nobody", stream=True), 404)["code"] == "model_not_found"


def test_bodies_that_are_no_json_or_too_large_are_refused():
    http = client(limits={"body_bytes": 2000})
    sent = http.post(
        "/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}
    )
    assert error_of(sent, 400)["code"] == "invalid_json"
    large = ask(http, messages=[{"role": "user", "content": "x" * 3000}])
    assert error_of(large, 413)["code"] == "too_large"

    def pieces() -> Any:
        for _ in range(5):
            yield b"x" * 1000

    chunked = http.post(
        "/v1/chat/completions", content=pieces(), headers={"content-type": "application/json"}
    )
    assert error_of(chunked, 413)["code"] == "too_large"
