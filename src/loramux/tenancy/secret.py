"""API keys as text: `lmx_` + 16 hex digits that name the key + `_` + 64 hex digits that prove it (256 random bits).

Why SHA-256 and no slow hash: those guard guessable passwords; 256 random bits cannot be guessed, and every request
pays for the hash. The fixed shape lets secret scanners find a key that leaked.
"""

from __future__ import annotations

import hashlib
import re
import secrets

PREFIX = "lmx"
_SHAPE = re.compile(rf"{PREFIX}_([0-9a-f]{{16}})_[0-9a-f]{{64}}")


def new_secret() -> tuple[str, str]:
    """The id of a new key, and the whole secret."""
    key_id = secrets.token_hex(8)
    return key_id, f"{PREFIX}_{key_id}_{secrets.token_hex(32)}"


def key_id_of(secret: object) -> str | None:
    """The id inside a secret, None for anything that does not look like one."""
    found = _SHAPE.fullmatch(secret) if isinstance(secret, str) and len(secret) < 100 else None
    return found.group(1) if found else None


def hash_of(secret: str) -> str:
    """What is stored."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_salt() -> str:
    """Random per tenant: part of every key of the prefix cache."""
    return secrets.token_hex(32)
