"""Receipts: which weights answered, signed. One per response, of one answer per prompt.

Why integers and texts only: weights and sampling parameters are decimal texts, so the signed form (sorted keys, no
blanks, ASCII) is the same in every language, and no JSON library on the way can change a number. Nothing that was
said is in a receipt: token ids are there as a SHA-256, over each id as four bytes, little-endian.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from loramux.errors import LoramuxError
from loramux.formats.errors import FormatError
from loramux.formats.jsonio import canonical_json, parse_json
from loramux.server.signing import PublicKeys, Signer, SigningError, decode, encode

try:
    import orjson
except ImportError:  # slower, and the same
    orjson = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from loramux.engine.request import Completion, SamplingParams

VERSION = 1
HEADER = "x-loramux-receipt"
ID_HEADER = "x-loramux-receipt-id"
HEADER_LIMIT = (
    4096  # clients and proxies allow 8 KiB for all headers; a larger receipt is in the body alone
)
_DOMAIN = b"loramux receipt v1\0"  # a signature of ours is never one of something else
_MAX_BYTES = 16 * 2**20  # of a reply that carries one


class ReceiptError(LoramuxError):
    """A receipt that is not one, or does not hold. `code`: bad_receipt, bad_signature, unknown_key, not_found,
    digest_mismatch, prompt_mismatch, not_replayable."""

    def __init__(self, message: str, *, code: str = "bad_receipt") -> None:
        super().__init__(message)
        self.code = code


def token_digest(tokens: Iterable[int]) -> str:
    """SHA-256 hex of token ids."""
    ids = list(tokens)
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()


def decimal(number: float) -> str:
    """The shortest text that gives this number back."""
    return repr(int(number)) if float(number).is_integer() else repr(float(number))


@dataclass(frozen=True)
class Part:
    """An adapter that answered. `digest`: what the registry keeps; `content`: what the engine says it computed with,
    None if the request never ran."""

    ref: str
    digest: str
    weight: float = 1.0
    content: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "ref": self.ref,
            "digest": self.digest,
            "weight": decimal(self.weight),
            "content": self.content,
        }


@dataclass(frozen=True)
class Router:
    """What mixed, and its own content. `members`: (ref, digest) of the adapters put under it for this call."""

    ref: str
    digest: str
    members: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        members = [{"ref": ref, "digest": digest} for ref, digest in self.members]
        return {"ref": self.ref, "digest": self.digest, "members": members}


def describe_answer(
    completions: Sequence[Completion],
    *,
    prompt: Sequence[int],
    parts: Sequence[Part] = (),
    refs: Mapping[str, str] | None = None,
    base: str = "",
    router: Router | None = None,
    routing: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One prompt's part of a receipt. `parts`: what was pinned at admission, base digest and contents as reported by
    the engine take precedence. `refs`: registry reference by digest, for names that the engine reports beyond these.
    """
    told = next((done.answered for done in completions if done.answered.base), None)
    if told is not None:
        named = {part.digest: part.ref for part in parts} | dict(refs or {})
        # What the engine says, not what was asked of it: a receipt that repeats the question proves nothing.
        parts = [
            Part(named.get(name, "unknown"), name, weight, content)
            for name, content, weight in told.parts
        ]
        base = told.base
    return {
        "base": base,
        "parts": [part.to_json() for part in parts],
        "router": None if router is None else router.to_json(),
        "routing": None if routing is None else plain(routing),
        "prompt": {"tokens": len(prompt), "sha256": token_digest(prompt)},
        "completions": [
            {
                "index": done.index,
                "tokens": len(done.token_ids),
                "sha256": token_digest(done.token_ids),
                "finish_reason": done.finish_reason,
            }
            for done in sorted(completions, key=lambda done: done.index)
        ],
    }


def describe_sampling(params: SamplingParams) -> dict[str, Any]:
    """Sampling as it was run. Stop texts are the caller's words: only how many there were is told."""
    return {
        "max_tokens": params.max_tokens,
        "min_tokens": params.min_tokens,
        "temperature": decimal(params.temperature),
        "top_p": decimal(params.top_p),
        "top_k": params.top_k,
        "min_p": decimal(params.min_p),
        "repetition_penalty": decimal(params.repetition_penalty),
        "presence_penalty": decimal(params.presence_penalty),
        "frequency_penalty": decimal(params.frequency_penalty),
        "seed": params.seed,
        "n": params.n,
        "num_stop": len(params.stop),
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": params.ignore_eos,
    }


def plain(value: Any) -> Any:
    """Numbers with a fraction become texts; tuples lists."""
    if isinstance(value, bool) or value is None or isinstance(value, int | str):
        return value
    if isinstance(value, float):
        return decimal(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value]


@dataclass(frozen=True)
class Receipt:
    """A signed statement. `body`: everything but the signature. Made by `issue`, or read with `parse`."""

    body: Mapping[str, Any]
    signature: str

    @property
    def id(self) -> str:
        return str(self.body["id"])

    @property
    def answers(self) -> list[dict[str, Any]]:
        return list(self.body["answers"])

    def to_json(self) -> dict[str, Any]:
        return {**self.body, "signature": self.signature}

    def to_header(self) -> str | None:
        """The receipt as a header's value; None if it is too long for one."""
        text = encode(canonical_of_ours(self.to_json()))
        return text if len(text) <= HEADER_LIMIT else None

    def headers(self) -> dict[str, str]:
        """For a response whose receipt is known before its first byte."""
        value = self.to_header()
        return {ID_HEADER: self.id} | ({} if value is None else {HEADER: value})


def issue(
    signer: Signer,
    *,
    id: str,
    tenant: str,
    model: str,
    answers: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    debit: int,
    now: float | None = None,
) -> Receipt:
    """Sign what `describe_answer` gave. `model`: the resolved label; `debit`: tokens charged to the tenant."""
    body = {
        "version": VERSION,
        "id": id,
        "time": _utc(time.time() if now is None else now),
        "tenant": tenant,
        "model": model,
        "answers": [dict(answer) for answer in answers],
        "sampling": describe_sampling(params),
        "debit": debit,
        "key": signer.key_id,
    }
    return Receipt(body, encode(signer.sign(_DOMAIN + canonical_of_ours(body))))


def parse(given: str | bytes | Mapping[str, Any]) -> Receipt:
    """A receipt from its JSON, the header's value, or a whole response that carries one; nothing is verified."""
    value: Any = given
    if not isinstance(given, Mapping):
        value = _read_text(given.encode() if isinstance(given, str) else given)
    for key in ("loramux", "receipt"):
        if isinstance(value, Mapping) and "signature" not in value and key in value:
            value = value[key]
    if not isinstance(value, Mapping) or not isinstance(value.get("signature"), str):
        raise ReceiptError("not a receipt: it has no signature")
    body = {key: item for key, item in value.items() if key != "signature"}
    if body.get("version") != VERSION:
        raise ReceiptError(f"receipt version {body.get('version')!r}; this reads version {VERSION}")
    missing = [key for key in ("id", "answers", "sampling", "key") if key not in body]
    if missing or not isinstance(body["answers"], list):
        raise ReceiptError(f"not a receipt: {', '.join(missing) or 'answers'} missing")
    return Receipt(body, value["signature"])


def verify(receipt: Receipt, keys: PublicKeys) -> None:
    """ReceiptError unless one of these keys signed exactly this receipt."""
    name = str(receipt.body["key"])
    if name not in keys:
        raise ReceiptError(
            f"signed with the key {name}, which is not among the {len(keys.ids)} given; "
            "get the server's keys at /v1/receipts/key",
            code="unknown_key",
        )
    try:
        is_ours = keys.verify(name, decode(receipt.signature), _message(receipt.body))
    except (SigningError, FormatError):
        is_ours = False
    if not is_ours:
        raise ReceiptError(
            "the signature does not belong to this receipt: it was changed", code="bad_signature"
        )


def _read_text(data: bytes) -> Any:
    if len(data) > _MAX_BYTES:
        raise ReceiptError(f"{len(data)} bytes are too many for a receipt")
    data = data.strip()
    try:
        if data.startswith(b"{"):
            return parse_json(data, "the receipt")
        inner = decode(data.decode("ascii", "replace"))
        value = parse_json(inner, "the receipt")
        # A header's value has one spelling: whoever compares the texts compares the receipts.
        if canonical_json(value) != inner:
            raise ReceiptError("not a receipt: its JSON is not canonical")
        return value
    except (SigningError, FormatError) as error:
        raise ReceiptError(f"not a receipt: {error}") from None


def canonical_of_ours(value: Any) -> bytes:
    """`canonical_json` of what this server made: no fractions, so that a faster library spells it the same."""
    if orjson is not None:
        with suppress(TypeError):  # numbers beyond 64 bits
            found = bytes(orjson.dumps(value, option=orjson.OPT_SORT_KEYS))
            # The canonical form is ASCII, and escapes DEL as well.
            if found.isascii() and b"\x7f" not in found:
                return found
    return canonical_json(value)


def _message(body: Mapping[str, Any]) -> bytes:
    return _DOMAIN + canonical_json(body)


def _utc(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, tz=UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
