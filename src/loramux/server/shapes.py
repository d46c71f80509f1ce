"""What the routes answer, as JSON Schema: the shape of each success, and which errors each operation can give.

Why beside the routes and not as response models: answers are made once and sent; nothing is validated twice on the way
out. That these are true is shown by the test that sends thousands of requests of every kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
ANY: Schema = {"type": "object"}
DIGEST: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


def maybe(schema: Schema) -> Schema:
    """This, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def many(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def constant(value: str) -> Schema:
    return {"type": "string", "const": value}


def thing(_optional: Mapping[str, Schema] | None = None, /, **fields: Schema) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "required": sorted(fields),
        "properties": {**fields, **(_optional or {})},
        "additionalProperties": False,
    }


ADAPTER = thing(
    {"provenance": ANY, "notes": many(TEXT)},
    object=constant("adapter"), id=TEXT, ref=TEXT, tenant=TEXT, name=TEXT, version=WHOLE,
    aliases=many(TEXT), digest=DIGEST, base_digest=maybe(DIGEST), method=TEXT, servability=TEXT,
    max_rank=WHOLE, bytes=WHOLE, created=WHOLE, visibility={"enum": ["private", "shared"]},
    metadata=ANY, files=many(thing(path=TEXT, sha256=DIGEST, bytes=WHOLE)),
)  # fmt: skip
MODEL = thing(
    {"max_model_len": maybe(WHOLE)},
    id=TEXT, object=constant("model"), created=WHOLE, owned_by=TEXT, root=TEXT, parent=maybe(TEXT),
    loramux=ANY,
)  # fmt: skip
USAGE = thing(
    prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE,
    prompt_tokens_details=thing(cached_tokens=WHOLE),
)  # fmt: skip
OURS = thing(
    {"router": TEXT},
    adapters=many(thing(ref=TEXT, digest=DIGEST, weight=maybe(NUMBER))),
    routing=maybe(ANY), receipt=maybe(ANY),
)  # fmt: skip
FINISH: Schema = {"enum": ["stop", "length"]}
_TOKEN = {"token": TEXT, "logprob": NUMBER, "bytes": many(WHOLE)}
CHAT_LOGPROBS = thing(
    content=many(thing(**_TOKEN, top_logprobs=many(thing(**_TOKEN)))), refusal={"type": "null"}
)
TEXT_LOGPROBS = thing(
    tokens=many(TEXT), token_logprobs=many(maybe(NUMBER)),
    top_logprobs=many(maybe({"type": "object", "additionalProperties": NUMBER})),
    text_offset=many(WHOLE),
)  # fmt: skip


def _answer(kind: str, **choice: Schema) -> Schema:
    return thing(
        id=TEXT, object=constant(kind), created=WHOLE, model=TEXT,
        choices=many(thing(index=WHOLE, finish_reason=FINISH, **choice)), usage=USAGE, loramux=OURS,
    )  # fmt: skip


_SAID = {"role": constant("assistant"), "content": TEXT, "refusal": {"type": "null"}}
CHAT = _answer("chat.completion", message=thing(**_SAID), logprobs=maybe(CHAT_LOGPROBS))
COMPLETION = _answer("text_completion", text=TEXT, logprobs=maybe(TEXT_LOGPROBS))
EMBEDDINGS = thing(
    object=constant("list"), model=TEXT,
    data=many(
        thing(object=constant("embedding"), index=WHOLE, embedding={"anyOf": [many(NUMBER), TEXT]})
    ),
    usage=thing(prompt_tokens=WHOLE, total_tokens=WHOLE),
)  # fmt: skip
MODELS = thing(object=constant("list"), data=many(MODEL), has_more=FLAG)
ADAPTERS = thing(object=constant("list"), data=many(ADAPTER), has_more=FLAG, next=maybe(TEXT))
VERSIONS = thing(object=constant("list"), data=many(ADAPTER))
DELETED = thing(object=constant("adapter.deleted"), id=TEXT, deleted=FLAG)
SHARED = thing(object=constant("adapter.share"), id=TEXT, tenant=TEXT, shared=FLAG)
VERSION = thing(version=TEXT, base=TEXT, base_digest=maybe(TEXT))

# The success of each operation that answers with JSON.
SUCCESSES: Mapping[tuple[str, str], Mapping[str, Schema]] = {
    ("post", "/v1/chat/completions"): {"200": CHAT},
    ("post", "/v1/completions"): {"200": COMPLETION},
    ("post", "/v1/embeddings"): {"200": EMBEDDINGS},
    ("get", "/v1/models"): {"200": MODELS},
    ("get", "/v1/models/{model}"): {"200": MODEL},
    ("get", "/v1/adapters"): {"200": ADAPTERS},
    ("post", "/v1/adapters"): {"200": ADAPTER, "201": ADAPTER},
    ("get", "/v1/adapters/{name}"): {"200": ADAPTER},
    ("delete", "/v1/adapters/{name}"): {"200": DELETED},
    ("get", "/v1/adapters/{name}/versions"): {"200": VERSIONS},
    ("put", "/v1/adapters/{name}/aliases/{alias}"): {"200": ADAPTER},
    ("post", "/v1/adapters/{name}/shares"): {"201": SHARED},
    ("delete", "/v1/adapters/{name}/shares/{tenant}"): {"200": SHARED},
    ("get", "/health"): {"200": thing(status=TEXT)},
    ("get", "/ready"): {"200": thing(status=TEXT)},
    ("get", "/version"): {"200": VERSION},
}
MEANINGS: Mapping[int, str] = {
    200: "Done; it was there already",
    201: "Made",
    400: "The request cannot be answered as it is; nothing was changed",
    401: "No key, or none that is valid",
    403: "The key may not do this",
    404: "There is no such thing, or it is not the caller's",
    408: "The body did not arrive in time",
    409: "Somebody else changed it meanwhile, or it exists",
    412: "What If-Match or If-None-Match asked for does not hold",
    413: "The body is too large",
    415: "Not the media type that this takes",
    429: "A limit of the tenant, or the queue, is full; Retry-After says when to come again",
    500: "The answer could not be made",
    501: "This server was not set up for it",
    503: "Not now; try again",
}
_INFER = (400, 404, 408, 413, 429, 500, 503)
# Beside what all have (`errors_of`).
ERRORS: Mapping[tuple[str, str], tuple[int, ...]] = {
    ("post", "/v1/chat/completions"): _INFER,
    ("post", "/v1/completions"): _INFER,
    ("post", "/v1/embeddings"): (*_INFER, 501),
    ("get", "/v1/models"): (400, 503),
    ("get", "/v1/models/{model}"): (400, 404, 503),
    ("get", "/v1/adapters"): (400, 503),
    ("post", "/v1/adapters"): (400, 403, 408, 409, 413, 415, 429, 503),
    ("get", "/v1/adapters/{name}"): (400, 404, 503),
    ("delete", "/v1/adapters/{name}"): (400, 403, 404, 409, 503),
    ("get", "/v1/adapters/{name}/versions"): (400, 404, 503),
    ("put", "/v1/adapters/{name}/aliases/{alias}"): (400, 403, 404, 408, 409, 412, 413, 503),
    ("post", "/v1/adapters/{name}/shares"): (400, 403, 404, 408, 409, 413, 503),
    ("delete", "/v1/adapters/{name}/shares/{tenant}"): (400, 403, 404, 409, 503),
    ("post", "/v1/load_lora_adapter"): (400, 403, 404, 408, 409, 413, 503),
    ("post", "/v1/unload_lora_adapter"): (400, 404, 408, 409, 413, 503),
    ("get", "/v1/receipts/key"): (404,),
    ("get", "/ready"): (503,),
    ("get", "/metrics"): (404,),
}


def errors_of(verb: str, path: str, *, needs_key: bool, is_local: bool) -> list[int]:
    """The statuses with which this operation can fail."""
    found = set(ERRORS.get((verb, path), ()))
    if needs_key:
        found |= {401, 403, 503}
    if is_local:
        found.add(403)  # whoever is not on this machine
    return sorted(found)
