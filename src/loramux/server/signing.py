"""The key that signs receipts: Ed25519, made once, kept in a folder; public keys stay when it is rotated.

Why a file per public key: a receipt names its key by the key's own digest, so old receipts can be checked after any
number of rotations, and a public key that was swapped does not carry the name it is asked for by.

    FOLDER/signing.key        the private key, readable by its owner alone
    FOLDER/public/KEY_ID.json every public key that has signed
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loramux.errors import LoramuxError, require

PRIVATE = "signing.key"
PUBLIC = "public"
ALGORITHM = "ed25519"
KEY_ID_DIGITS = 32  # 128 bits of the SHA-256 of the public key
_MAX_BYTES = 64 * 2**10  # of any file of keys


class SigningError(LoramuxError):
    """A signing key, or a file of public keys, that cannot be used."""

    code = "bad_signing_key"


def key_id(public: bytes) -> str:
    """The name of a public key (its 32 raw bytes): from its own digest."""
    return hashlib.sha256(public).hexdigest()[:KEY_ID_DIGITS]


def encode(data: bytes) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def decode(text: str) -> bytes:
    """The inverse of `encode`; SigningError for every other spelling, so that one value has one text."""
    try:
        data = base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except (ValueError, binascii.Error):
        data = b""
    if not data or encode(data) != text:
        raise SigningError(f"not base64url without padding: {text[:40]!r}")
    return data


class PublicKeys:
    """Public keys by their id. Whoever checks a receipt needs nothing else. `current`: the one that signs."""

    def __init__(self, keys: Iterable[bytes] = (), current: str | None = None) -> None:
        self._keys = {key_id(raw): raw for raw in keys}
        self.current = current if current in self._keys else None

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    @property
    def ids(self) -> list[str]:
        return sorted(self._keys)

    def describe(self, name: str) -> str:
        """A key as people tell it from its siblings."""
        if self.current is None:
            return f"key {name}, one of {len(self._keys)}" if len(self._keys) > 1 else f"key {name}"
        return f"key {name}, {'the current one' if name == self.current else 'an earlier one'}"

    def verify(self, name: str, signature: bytes, message: bytes) -> bool:
        """Whether this key signed this message; False for a key that is not here."""
        raw = self._keys.get(name)
        if raw is None:
            return False
        ed25519 = _ed25519()
        try:
            ed25519.Ed25519PublicKey.from_public_bytes(raw).verify(signature, message)
        except _invalid_signature():
            return False
        return True

    def to_json(self, current: str | None = None) -> dict[str, Any]:
        keys = [
            {"key_id": name, "algorithm": ALGORITHM, "public_key": encode(self._keys[name])}
            for name in self.ids
        ]
        return {"current": current, "keys": keys}

    @classmethod
    def from_json(cls, value: Any) -> PublicKeys:
        """Reads what `to_json` gives, or one of its keys alone. A key under a name that is not its own is refused."""
        listed = value.get("keys", [value]) if isinstance(value, Mapping) else None
        if not isinstance(listed, list) or not listed:
            raise SigningError("public keys are JSON as the server gives at /v1/receipts/key")
        current = value.get("current")
        return cls(
            (_public_of(item) for item in listed), current if isinstance(current, str) else None
        )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> PublicKeys:
        """JSON as the server gives it, or a PEM file."""
        try:
            with Path(path).open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise SigningError(f"{path}: cannot be read ({error.strerror})") from None
        if len(data) > _MAX_BYTES:
            raise SigningError(f"{path} is too large for a file of public keys")
        if data.lstrip().startswith(b"-----BEGIN"):
            return cls([_from_pem(data, path)])
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise SigningError(f"{path} is neither JSON nor PEM") from None
        return cls.from_json(value)


class Signer:
    """Signs with the current key of a folder. `open` makes the folder and the key if there is none.

    `mark`: what `mark_of` said of the folder before it was read.
    """

    def __init__(
        self, folder: Path, private: bytes, public: PublicKeys, mark: object = None
    ) -> None:
        ed25519 = _ed25519()
        self.folder, self.public, self.mark = folder, public, mark
        self._private = ed25519.Ed25519PrivateKey.from_private_bytes(private)
        self.key_id = key_id(self._private.public_key().public_bytes_raw())

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Signer:
        """The signer of a folder; several processes that start at once end with one key."""
        folder = Path(folder)
        (folder / PUBLIC).mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (folder / PRIVATE).exists():
            _make(folder, replace=False)
        return cls._load(folder)

    @classmethod
    def rotate(cls, folder: str | os.PathLike[str]) -> Signer:
        """A new private key; the old one is gone, its public key stays. Running servers notice it within a second
        (`server.issuer`). SigningError where there is no key yet."""
        folder = Path(folder)
        if not (folder / PRIVATE).exists():
            raise SigningError(
                f"{folder} holds no signing key; the server makes one at its first start, so there is none to rotate"
            )
        cls.open(folder)
        _make(folder, replace=True)
        return cls._load(folder)

    def again(self) -> Signer:
        """The signer as the folder is now; no key is made. SigningError, and this one is as good as before."""
        return self._load(self.folder)

    @classmethod
    def _load(cls, folder: Path) -> Signer:
        mark = mark_of(folder)  # before reading: what changes meanwhile is seen at the next look
        private = _read_private(folder / PRIVATE)
        # The key's own public half first: the folder `public` may have been lost.
        own = _ed25519().Ed25519PrivateKey.from_private_bytes(private).public_key()
        _write_public(folder, own.public_bytes_raw())
        return cls(folder, private, published(folder), mark)

    def sign(self, message: bytes) -> bytes:
        return bytes(self._private.sign(message))

    def keys_json(self) -> dict[str, Any]:
        """What `GET /v1/receipts/key` says."""
        return self.public.to_json(self.key_id)


def mark_of(folder: Path) -> object:
    """Differs from what it was if the private key was replaced, or a public one added or removed; it never fails."""
    try:
        own, public = os.stat(folder / PRIVATE, follow_symlinks=False), os.stat(folder / PUBLIC)
    except OSError as error:
        return error.errno
    # The time of change, not of the content: a key that became readable again is looked at as well.
    return own.st_ino, own.st_ctime_ns, public.st_ino, public.st_mtime_ns


def published(folder: str | os.PathLike[str]) -> PublicKeys:
    """Every public key of a signer's folder; the private one is not looked at."""
    keys = []
    for path in sorted((Path(folder) / PUBLIC).glob("*.json")):
        try:
            keys.append(_public_of(json.loads(path.read_bytes())))
        except FileNotFoundError:  # removed since it was listed
            continue
        except (OSError, ValueError):
            raise SigningError(f"{path} is not a public key; remove it") from None
    return PublicKeys(keys)


def _public_of(item: Any) -> bytes:
    if not isinstance(item, Mapping) or not isinstance(item.get("public_key"), str):
        raise SigningError("a public key is {key_id, algorithm, public_key}")
    if item.get("algorithm", ALGORITHM) != ALGORITHM:
        raise SigningError(f"unknown algorithm {item['algorithm']!r}; receipts use {ALGORITHM}")
    raw = decode(item["public_key"])
    if len(raw) != 32 or item.get("key_id", key_id(raw)) != key_id(raw):
        raise SigningError(f"the public key under {item.get('key_id')!r} is not the one of that id")
    return raw


def _from_pem(data: bytes, path: str | os.PathLike[str]) -> bytes:
    serialization = require(
        "cryptography.hazmat.primitives.serialization", "serve", "checking receipts"
    )
    try:
        key = serialization.load_pem_public_key(data)
        raw = bytes(key.public_bytes_raw())
    except Exception:  # the library raises many kinds, none of them ours to tell apart
        raise SigningError(f"{path} holds no Ed25519 public key") from None
    if len(raw) != 32:
        raise SigningError(f"{path} holds no Ed25519 public key")
    return raw


def _make(folder: Path, *, replace: bool) -> None:
    private = _ed25519().Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes_raw()
    record = {
        "algorithm": ALGORITHM,
        "created_at": int(time.time()),
        "private_key": encode(private.private_bytes_raw()),
    }
    temporary = folder / f".{PRIVATE}-{secrets.token_hex(8)}"
    # O_EXCL and the mode at creation: at no moment can somebody else read it.
    with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(json.dumps(record).encode("ascii"))
        file.flush()
        os.fsync(file.fileno())
    try:
        if replace:
            _write_public(folder, public)  # before the first receipt that needs it
            os.replace(temporary, folder / PRIVATE)
        else:
            os.link(temporary, folder / PRIVATE)  # fails if another process was first
    except FileExistsError:
        pass
    finally:
        temporary.unlink(missing_ok=True)


def _write_public(folder: Path, public: bytes) -> None:
    name = key_id(public)
    path = folder / PUBLIC / f"{name}.json"
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{name}-{secrets.token_hex(8)}")
    value = {"key_id": name, "algorithm": ALGORITHM, "public_key": encode(public)}
    temporary.write_bytes(json.dumps(value).encode("ascii"))
    os.replace(temporary, path)


def _read_private(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise SigningError(f"{path}: cannot be opened ({error.strerror})") from None
    with open(descriptor, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode) or stat.S_IMODE(info.st_mode) & 0o077:
            raise SigningError(
                f"{path} can be read by others; chmod 600 it, or rotate the key if it may have been read"
            )
        data = file.read(_MAX_BYTES)
    try:
        raw = decode(json.loads(data)["private_key"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raw = b""
    if len(raw) != 32:
        raise SigningError(f"{path} holds no private key; remove it and a new one is made")
    return raw


def _ed25519() -> Any:
    return require(
        "cryptography.hazmat.primitives.asymmetric.ed25519",
        "serve",
        "signing and checking receipts",
    )


def _invalid_signature() -> type[Exception]:
    error: type[Exception] = require(
        "cryptography.exceptions", "serve", "checking receipts"
    ).InvalidSignature
    return error
