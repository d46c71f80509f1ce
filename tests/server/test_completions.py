"""POST /v1/completions over the stub: prompts of every shape, echo, several prompts and samples in order."""

import json
from typing import Any

import pytest

from server.rig import client, error_of, stub_services


def ask(http: Any, **fields: Any) -> Any:
    return http.post("/v1/completions", json={"model": "law", "prompt": "abc", **fields})


@pytest.mark.parametrize(
    ("prompt", "count"), [("abc", 1), ([97, 98], 1), (["a", "b", "c"], 3), ([[97], [98, 99]], 2)]
)
def test_prompts_are_a_text_token_ids_or_lists_of_either(prompt, count):
    body = ask(client(), prompt=prompt, n=2, echo=True).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * count))
    texts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    for choice in body["choices"]:
        own = texts[choice["index"] // 2]
        assert choice["text"].startswith(own if isinstance(own, str) else bytes(own).decode())
    assert body["usage"]["completion_tokens"] == 8 * 2 * count


def test_all_prompts_of_a_call_are_streamed_under_their_own_indices():
    response = ask(client(), prompt=["a", "b"], n=2, stream=True)
    texts: dict[int, str] = {}
    for line in response.text.split("\n\n"):
        if line.startswith("data: {"):
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert sorted(texts) == [0, 1, 2, 3] and len(set(texts.values())) == 1


def test_log_probabilities_have_offsets_that_go_on_through_a_stream():
    response = ask(client(), logprobs=1, stream=True)
    offsets = []
    for line in response.text.split("\n\n"):
        if line.startswith("data: {"):
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            offsets += choice["logprobs"]["text_offset"]
    assert offsets == list(range(8))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": []}, "invalid_value"),
        ({"prompt": ""}, "invalid_value"),
        ({"prompt": ["a", ""]}, "invalid_value"),
        ({"prompt": [["a"]]}, "invalid_value"),
        ({"prompt": ["a"] * 300}, "invalid_value"),
        ({"max_tokens": 0}, "invalid_value"),
        ({"best_of": 3}, "unsupported_parameter"),
        ({"suffix": "x"}, "unsupported_parameter"),
        ({"echo": True, "logprobs": 1, "stream": True}, "unsupported_parameter"),
        ({"logprobs": 21}, "invalid_value"),
        ({"model": None}, "missing_parameter"),
    ],
)
def test_calls_that_cannot_be_answered_are_refused_before_anything_runs(fields, code):
    services = stub_services()
    assert error_of(ask(client(services), **fields), 400)["code"] == code
    assert services.engine.served == 0


def test_lorax_and_tgi_spellings_name_registered_adapters_only():
    http = client()
    assert ask(http, model="pico", adapter_id="tone").json()["model"] == "local/tone@1"
    assert ask(http, model=None, lora_path="tone").json()["model"] == "local/tone@1"
    assert (
        error_of(ask(http, model="pico", lora_path="/etc/passwd"), 404)["code"] == "model_not_found"
    )
