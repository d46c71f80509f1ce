"""POST /v1/completions over the stub: prompts of every shape, echo, several prompts and samples in order."""

import json
from typing import Any, ClassVar

import pytest

from loramux.server.replies import Words
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


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": [1, "a"]}, "prompt: must be a text, token ids, or a list of either"),
        ({"prompt": [-1]}, "prompt: must be a text, token ids, or a list of either"),
        ({"stop": 3}, "stop: must be a text or a list of texts"),
        ({"temperature": 2.5}, "less than or equal to 2, got 2.5"),
        ({"n": 0}, "greater than or equal to 1, got 0"),
        ({"max_token": 3}, "unknown parameter 'max_token'; did you mean 'max_tokens'?"),
        ({"nonsense": 3}, "unknown parameter 'nonsense'; remove it"),
        ({"model": ""}, "model: String should have at least 1 character"),
        ({"prompt_logprobs": 1}, "'prompt_logprobs' is not supported by this server"),
        ({"model": "law*0.5+base*0.5"}, "a mix is of adapters"),
        ({"model": "auto*0.5+law"}, "a mix is of adapters"),
        ({"model": "router:law+tone"}, "a mix is of adapters"),
    ],
)
def test_a_refusal_says_what_was_given_and_what_is_allowed(fields, said):
    assert said in error_of(ask(client(), **fields), 400)["message"]


def test_a_list_with_a_broken_text_is_told_what_is_broken_and_not_that_lists_are_wrong():
    response = client().post(
        "/v1/completions",
        content='{"model": "law", "prompt": ["\\ud800"]}',
        headers={"content-type": "application/json"},
    )
    assert "half of a surrogate pair is no character" in error_of(response, 400)["message"]


def test_a_body_that_is_no_json_object_is_told_which_header_it_needs():
    for sent in ({"data": {"model": "law"}}, {"content": "{}"}, {"json": [1]}):
        error = error_of(client().post("/v1/completions", **sent), 400)
        assert error["message"].endswith("a JSON object, sent with Content-Type: application/json")


@pytest.mark.parametrize(
    ("model", "shown"),
    [("x" * 300, "that was given"), ("router:", "'router:'"), ("pico:", "'pico:'"), ("none", "'none'")],
)  # fmt: skip
def test_an_unknown_model_is_shown_as_it_was_written(model, shown):
    error = error_of(ask(client(), model=model), 404)
    assert error["message"].startswith(f"The model {shown} does not exist")


class Pieces:
    """A tokenizer whose tokens are parts of characters, of a byte-level and of a SentencePiece vocabulary."""

    texts: ClassVar = ["\ufffd", "\ufffd", "\ufffd", "\ufffd", "a", "\ufffd"]
    pieces: ClassVar = ["Ã", "©", "<0xE2>", "<0x82>", "a", "\u4e00"]

    def decode(self, ids):
        return self.texts[ids[0]]

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[token] for token in ids]


def test_the_bytes_of_tokens_that_are_parts_of_a_character_make_it_together():
    words = Words(Pieces())
    assert bytes([*words.bytes_of(0), *words.bytes_of(1)]).decode() == "é"
    assert [*words.bytes_of(2), *words.bytes_of(3)] == [0xE2, 0x82]
    assert words.bytes_of(4) == [97]
    assert bytes(words.bytes_of(5)).decode() == "\ufffd"  # nothing is known of its bytes


def test_lorax_and_tgi_spellings_name_registered_adapters_only():
    http = client()
    assert ask(http, model="pico", adapter_id="tone").json()["model"] == "local/tone@1"
    assert ask(http, model=None, lora_path="tone").json()["model"] == "local/tone@1"
    assert (
        error_of(ask(http, model="pico", lora_path="/etc/passwd"), 404)["code"] == "model_not_found"
    )
