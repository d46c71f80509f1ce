"""mixture_config.json: what it must say, and the refusals when it does not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loramux.formats.errors import FormatError, listed
from loramux.formats.jsonio import canonical_json, check_keys

SCHEMA_VERSION = 1
SERVABILITY = ("static", "per_request", "per_token")
EXPERTS_NAME = "experts"
EXPERT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")

_KEYS = frozenset(
    {
        "schema_version",
        "method",
        "servability",
        "config",
        "base_model_name_or_path",
        "base_digest",
        "base_dtype",
        "experts",
        "router",
        "sites",
    }
)
_EXPERT_KEYS = frozenset({"name", "path", "digest"})


def check_header(header: Mapping[str, Any], where: str) -> None:
    """Refuse another version, unknown or missing keys, values of the wrong kind, and unsafe expert names."""
    version = header.get("schema_version")
    if version != SCHEMA_VERSION or type(version) is not int:
        raise FormatError(
            f"{where}: schema_version is {version!r}, this loramux reads {SCHEMA_VERSION}; "
            "use the loramux that wrote it",
            code="version",
        )
    check_keys(dict(header), _KEYS, where)
    missing = sorted(_KEYS - header.keys())
    if missing:
        raise FormatError(f"{where} lacks {listed(missing)}", code="bad_value")
    for key, is_valid in _VALID.items():
        if not is_valid(header[key]):
            raise FormatError(
                f"{where}: {key} is not valid: {header[key]!r:.200}", code="bad_value"
            )
    if header["servability"] not in SERVABILITY:
        raise FormatError(
            f"{where}: servability is {header['servability']!r}, expected one of {', '.join(SERVABILITY)}",
            code="bad_value",
        )
    canonical_json(dict(header))
    _check_experts(header["experts"], where)


def _check_experts(entries: list[Any], where: str) -> None:
    if not entries:
        raise FormatError(f"{where} lists no experts", code="bad_value")
    for entry in entries:
        if not isinstance(entry, dict):
            raise FormatError(f"{where}: an expert is not an object", code="bad_value")
        check_keys(entry, _EXPERT_KEYS, f"{where}, an expert")
        name, path = entry.get("name"), entry.get("path")
        if not isinstance(name, str) or not EXPERT_NAME.fullmatch(name):
            raise FormatError(
                f"{where}: expert name {name!r:.150} is not allowed; use lower-case letters, digits, '.', '_', '-', "
                "at most 128, starting with a letter or digit",
                code="bad_name",
            )
        if path != f"{EXPERTS_NAME}/{name}":
            raise FormatError(
                f"{where}: expert {name!r} must be at {EXPERTS_NAME}/{name}, not {path!r:.150}",
                code="unsafe_path",
            )
        if not _is_digest(entry.get("digest")):
            raise FormatError(f"{where}: expert {name!r} has no digest", code="bad_value")
    names = [entry["name"] for entry in entries]
    if len(set(names)) != len(names):
        raise FormatError(f"{where}: an expert is listed twice: {listed(names)}", code="bad_name")


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_text_or_none(value: object) -> bool:
    return value is None or isinstance(value, str)


_VALID = {
    "method": _is_text,
    "servability": _is_text,
    "config": lambda value: isinstance(value, dict),
    "base_model_name_or_path": _is_text_or_none,
    "base_digest": _is_text_or_none,
    "base_dtype": _is_text_or_none,
    "experts": lambda value: isinstance(value, list),
    "router": _is_digest,
    "sites": lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value),
}
