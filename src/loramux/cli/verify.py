"""`loramux verify`: is this receipt ours and unchanged, do we keep what it names, and does it run the same again?"""

from __future__ import annotations

import json as json_
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json, table
from loramux.errors import LoramuxError

MAX_BYTES = 4 * 2**20
_Path = Path | None


def verify(
    receipt: Annotated[
        str,
        typer.Argument(
            metavar="RECEIPT",
            help="A file (receipt, reply or header value), or '-' for standard input.",
        ),
    ],
    server_key: Annotated[
        _Path,
        typer.Option(metavar="FILE", help="Public keys: what /v1/receipts/key gives, or PEM."),
    ] = None,
    registry: Annotated[
        _Path,
        typer.Option(
            metavar="DIR", help="Compare what answered with this registry, byte for byte."
        ),
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Run a greedy request again and compare the tokens.")
    ] = False,
    base: Annotated[str | None, typer.Option(metavar="DIR", help="Base for --replay.")] = None,
    prompt: Annotated[
        _Path,
        typer.Option(
            metavar="FILE",
            help="Prompt for --replay: text, or JSON (messages, a prompt, token ids, a list of prompts).",
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Check the signature of a receipt; with --registry what it names; with --replay tokens and text.

    Exit code 0 if everything that was looked at is right, else 2.

    Example: loramux verify reply.json --server-key keys.json --registry /srv/loramux --replay --base smollm2-135m
    --prompt prompt.json
    """
    with only_json(json):
        result = run(receipt, server_key, registry, base if replay else None, prompt, replay)
    emit(result, json, show)
    if not result["is_right"]:
        raise LoramuxError(f"receipt {result['id']} does not hold; see the lines marked 'no'")


def run(
    given: str,
    server_key: Path | None,
    root: Path | None,
    base: str | None,
    prompt: Path | None,
    wants_replay: bool,
) -> dict[str, Any]:
    """All checks that were asked for."""
    from loramux.server.receipts import parse
    from loramux.server.receipts import verify as verify_signature
    from loramux.server.replay import Check, check_registry, check_reply

    if wants_replay and (base is None or prompt is None or root is None):
        raise LoramuxError("--replay needs --base, --prompt and --registry")
    text = _read(given)
    receipt = parse(text)
    reply = reply_of(text)
    keys = _keys(server_key, root)
    verify_signature(receipt, keys)
    checks = [Check("signature", True, keys.describe(str(receipt.body["key"])))]
    if reply is not None:
        checks.append(check_reply(reply, receipt))
    elif _has_choices(text):
        checks.append(
            Check(
                "reply", None, "not a whole reply: only the receipt that it carries was looked at"
            )
        )
    if root is not None:
        checks += _with_registry(root, lambda registry: check_registry(receipt, registry))
    if wants_replay:
        assert base is not None and prompt is not None and root is not None
        checks += _replay(receipt, root, base, prompt, reply)
    elif reply is not None:
        checks.append(
            Check("text", None, "not looked at: a receipt has hashes of tokens; --replay draws them again")
        )  # fmt: skip
    return {
        "id": receipt.id,
        "is_right": all(check.is_right is not False for check in checks),
        "receipt": receipt.to_json(),
        "checks": [check.as_dict() for check in checks],
    }


def show(result: dict[str, Any]) -> None:
    marks = {True: "yes", False: "no", None: "-"}
    rows = [[c["what"], marks[c["is_right"]], c["detail"]] for c in result["checks"]]
    table(f"receipt {result['id']}", ["checked", "right", "detail"], rows)


def reply_of(text: str) -> Mapping[str, Any] | None:
    """The whole reply, where the file is one: not a receipt by itself and not a chunk of a stream."""
    try:
        value = json_.loads(text)
    except ValueError:  # the header's value
        return None
    is_reply = isinstance(value, Mapping) and "signature" not in value
    if not is_reply or not isinstance(value.get("usage"), Mapping):
        return None
    choices = value.get("choices")
    if not isinstance(choices, list) or not all(isinstance(each, Mapping) for each in choices):
        return None
    assert isinstance(value, Mapping)
    return value


def _has_choices(text: str) -> bool:
    try:
        value = json_.loads(text)
    except ValueError:
        return False
    return isinstance(value, Mapping) and "signature" not in value and "choices" in value


def _replay(
    receipt: Any, root: Path, base: str, prompt: Path, reply: Mapping[str, Any] | None
) -> list[Any]:
    from loramux.engine.engine import Engine
    from loramux.server.replay import replay

    text = _text(str(prompt))
    with Engine(base) as engine:
        prompts = encode_prompts(engine.tokenizer, text)
        return _with_registry(
            root, lambda registry: replay(receipt, prompts, engine, registry, reply)
        )


def encode_prompts(tokenizer: Any, text: str) -> list[list[int]]:
    """Token ids of what was asked, as the server makes them of a chat or of a completion."""
    try:
        value = json_.loads(text)
    except ValueError:
        value = text
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt"))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_chat(tokenizer, value)]
    one = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(one, list) or not all(isinstance(p, str) or _is_ids(p) for p in one):
        raise LoramuxError("a prompt is text, a list of messages, token ids, or a list of prompts")
    return [list(tokenizer(p)["input_ids"]) if isinstance(p, str) else p for p in one]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _chat(tokenizer: Any, messages: list[Any]) -> list[int]:
    from loramux.server.asking import chat_prompt
    from loramux.server.bodies import ChatBody
    from loramux.server.config import LimitsConfig

    body = ChatBody.model_validate({"model": "base", "messages": messages})
    return list(chat_prompt(tokenizer, body, LimitsConfig())[1])


def _keys(server_key: Path | None, root: Path | None) -> Any:
    from loramux.server.signing import PublicKeys, published

    if server_key is not None:
        return PublicKeys.from_file(server_key)
    home = None if root is None else root / "server" / "receipts"
    if home is not None and home.is_dir():
        return published(home)
    raise LoramuxError(
        "whose signature shall it be? give --server-key FILE: the server's reply at /v1/receipts/key"
    )


def _with_registry(root: Path, use: Callable[[Any], list[Any]]) -> list[Any]:
    from loramux.registry import Registry

    if not root.is_dir():
        raise LoramuxError(f"--registry {root}: no such folder")
    with Registry.open(root) as registry:
        return use(registry)


def _read(given: str) -> str:
    if given == "-":
        return sys.stdin.read(MAX_BYTES)
    return _text(given)


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(MAX_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise LoramuxError(f"{path}: cannot be read ({reason})") from None
