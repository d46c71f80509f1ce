"""POST /v1/embeddings: the sentence encoder that retrieval uses, under the name `minilm`."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramux.server.auth import CallerDep, ServicesDep
from loramux.server.bodies import EmbeddingBody
from loramux.server.errors import ApiError
from loramux.server.streams import to_json

NAME = "minilm"
MAX_TEXTS = 256
MAX_CHARS = 20_000


def router() -> APIRouter:
    """The one route."""
    routes = APIRouter(tags=["inference"])

    @routes.post("/v1/embeddings", summary="Sentence embeddings of texts")
    async def embeddings(
        body: EmbeddingBody, request: Request, services: ServicesDep, caller: CallerDep
    ) -> Response:
        body.check_extras()
        if body.model not in (NAME, f"{request.app.state.config.name}:{NAME}"):
            # One answer for all other names: whether one is somebody's adapter is not told.
            raise ApiError(
                f"embeddings are made by the model '{NAME}' alone",
                code="model_not_found",
                param="model",
            )
        encoder = getattr(services.retriever, "encoder", None)
        if encoder is None:
            raise ApiError(
                "this server has no sentence encoder; its operator can install loramux[retrieval]",
                code="no_encoder", status=501, param="model",
            )  # fmt: skip
        texts = _texts(body)
        used = sum(_num_tokens(text) for text in texts)
        with services.gate.enter(caller.tenant):
            reserved = None
            if services.tenancy is not None:
                reserved = services.tenancy.quotas.reserve(caller, used)
            try:
                rows = await asyncio.to_thread(encoder.encode, texts)
            except BaseException:
                if reserved is not None:
                    reserved.cancel()
                raise
            if reserved is not None:
                reserved.settle(used)
        data = [
            {"object": "embedding", "index": place, "embedding": _row(row, body.encoding_format)}
            for place, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": used, "total_tokens": used}
        return Response(
            to_json({"object": "list", "model": NAME, "data": data, "usage": usage}),
            media_type="application/json",
        )

    return routes


def _num_tokens(text: str) -> int:
    """About as many as the encoder reads: words, or a quarter of the characters of a text without blanks."""
    return max(len(text.split()), len(text) // 4) + 2


def _texts(body: EmbeddingBody) -> list[str]:
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not texts or not all(text.strip() for text in texts):
        raise ApiError(
            "input: give at least one text, none of them empty", code="invalid_value", param="input"
        )
    if len(texts) > MAX_TEXTS or any(len(text) > MAX_CHARS for text in texts):
        raise ApiError(
            f"input: at most {MAX_TEXTS} texts of at most {MAX_CHARS} characters",
            code="invalid_value", param="input",
        )  # fmt: skip
    if body.dimensions is not None:
        raise ApiError(
            "dimensions is not supported", code="unsupported_parameter", param="dimensions"
        )
    return texts


def _row(row: Any, form: str | None) -> list[float] | str:
    numbers = [float(number) for number in row]
    if form == "base64":
        return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
    return numbers
