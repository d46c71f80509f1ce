"""The one key under which cached keys and values of a prefix may be found again.

Why: a cached block depends on every weight that touched its tokens. A key made of names or counters confuses two
contents sooner or later, so this one is made of digests: who may share (salt), the base, each adapter's content with
its weight in the mixture, the router, the mask. Two prefixes share a block only if all of these and all tokens up to
the block's end are equal. The encoding writes every field's length before its bytes, so no two keys have one
encoding.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

_KEY_KIND = b"loramux/prefix-key/1"
_BLOCK_KIND = b"loramux/prefix-block/1"


@dataclass(frozen=True, kw_only=True)
class PrefixKey:
    """What, besides its tokens, decides the keys and values of a prefix.

    parts: (content digest, weight) of each adapter, in the order in which they are summed; another order is another
    key, as sums of rounded numbers depend on it. `router` is the digest of what routes the mixture, `mask` of what
    restricts it; both are empty where there is none.
    """

    salt: str
    base: str
    parts: tuple[tuple[str, float], ...] = ()
    router: str = ""
    mask: str = ""

    def __post_init__(self) -> None:
        for name in ("salt", "base", "router", "mask"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}")
        object.__setattr__(self, "parts", tuple(_checked_part(part) for part in self.parts))

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits; equal for equal keys and, collisions of SHA-256 aside, for no others."""
        fields = [_text(self.salt), _text(self.base), struct.pack(">Q", len(self.parts))]
        for digest, weight in self.parts:
            fields += (_text(digest), struct.pack(">d", weight))
        fields += (_text(self.router), _text(self.mask))
        return _sha256(_KEY_KIND, fields)


def block_hash(parent: str, tokens: Sequence[int]) -> str:
    """The hash of a full block: of its tokens and, through `parent`, of everything before it.

    parent: the hash of the block before, or PrefixKey.digest for the first one.
    """
    count = len(tokens)
    return _sha256(_BLOCK_KIND, (_text(parent), struct.pack(f">Q{count}q", count, *tokens)))


def extend_hashes(
    hashes: list[str], seed: str, tokens: Sequence[int], count: int, block_size: int
) -> None:
    """Grow `hashes`, the chain of the full blocks of `tokens`, in place until it holds `count` of them."""
    assert count * block_size <= len(tokens), "only full blocks have a hash"
    for index in range(len(hashes), count):
        parent = hashes[-1] if hashes else seed
        start = index * block_size
        hashes.append(block_hash(parent, tokens[start : start + block_size]))


def _checked_part(part: tuple[str, float]) -> tuple[str, float]:
    digest, weight = part
    if not isinstance(digest, str) or not digest:
        raise ValueError(f"a part needs the digest of its content, got {digest!r}")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise ValueError(f"the weight of a part must be a number, got {weight!r}")
    if not math.isfinite(weight):
        raise ValueError(f"the weight of a part must be finite, got {weight!r}")
    # + 0.0 turns -0.0, which equals 0.0 but has other bits, into 0.0.
    return digest, float(weight) + 0.0


def _text(value: str) -> bytes:
    # Lone surrogates are legal in a Python text; they must not make a tenant's name unusable.
    data = value.encode("utf-8", "surrogatepass")
    return struct.pack(">Q", len(data)) + data


def _sha256(kind: bytes, fields: Iterable[bytes]) -> str:
    return hashlib.sha256(struct.pack(">Q", len(kind)) + kind + b"".join(fields)).hexdigest()
