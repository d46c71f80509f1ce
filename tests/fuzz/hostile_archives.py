"""Archives that try to leave their place, to swell, to hide a member behind another, or to break whoever reads them.

`attacks` must all be refused; `mutations` of good archives may survive, if the adapter in them is still a sound one.
"""

from __future__ import annotations

import gzip
import io
import random
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from fuzz.hostile_names import PIECES
from fuzz.parcels import CONFIG, WEIGHTS, parcel

KINDS = ("zip", "stored", "tar", "pax", "gz")
BAD_PATHS = (
    *(
        "../escaped",
        "../../escaped",
        "a/../../escaped",
        "/tmp/escaped",
        "//escaped",
        "./../escaped",
        "..",
        ".",
    ),
    *(
        "..\\escaped",
        "C:\\escaped",
        "C:escaped",
        "a\\..\\escaped",
        "\\\\host\\share\\escaped",
        "~/escaped",
    ),
    *(
        "adapter_config.json/../../escaped",
        "a//b",
        "a/./b",
        "a/",
        " ",
        "a\x00b",
        "a\nb",
        "a\x1b[2J",
        "é",
        "a\u202eb",
    ),
    *(
        "ａ",
        "adapter_config.json\x00.txt",
        "x" * 256,
        "x/" * 130 + "x",
        "...",
        "a/..",
        "a/ /b",
        "con:",
        "a*b",
        "a?b",
    ),
    *(
        "$(touch escaped)",
        "`touch escaped`",
        "|touch escaped",
        "%2e%2e/escaped",
        "..%2fescaped",
        "\ufeffa",
        "a;b",
        "<x>",
    ),
)
TYPES = {
    "symlink": tarfile.SYMTYPE,
    "hardlink": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE,
    "character device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
    "contiguous": tarfile.CONTTYPE,
    "sparse": tarfile.GNUTYPE_SPARSE,
    "unknown": b"Z",
}
TARGETS = (
    "/etc/passwd",
    "../../../etc/passwd",
    CONFIG,
    "../outside",
    ".",
    "/",
    "/proc/self/environ",
)
PICKLES = (
    "adapter_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "a.pkl",
    "a.PTH",
    "a.ckpt",
    "a.joblib",
    "a.npy",
)
EXTRAS = (
    "evil.py",
    "setup.py",
    "sitecustomize.py",
    "adapter.json",
    "model.safetensors",
    "a/b/c.json",
    "x.so",
    "x.dll",
)
SPECIAL_EXTRAS = (
    "conftest.py",
    "adapter_config.json.bak",
    "experts/x/adapter_config.json",
    ".pth",
    "__init__.py",
)


class Attack(NamedTuple):
    label: str
    data: bytes


def good(kind: str, files: Mapping[str, bytes] | None = None, top: str = "") -> bytes:
    """The files of a sound adapter in an archive."""
    own = [(f"{top}{name}", data) for name, data in (files or parcel()).items()]
    return packed(kind, own)


def packed(kind: str, members: list[tuple[str, bytes]]) -> bytes:
    if kind in ("zip", "stored"):
        return _zip(members, zipfile.ZIP_DEFLATED if kind == "zip" else zipfile.ZIP_STORED)
    form = tarfile.PAX_FORMAT if kind == "pax" else tarfile.GNU_FORMAT
    plain = tar(
        [tar_member(name, len(data)) for name, data in members], [d for _, d in members], form
    )
    return gzip.compress(plain, 1) if kind == "gz" else plain


def _zip(
    members: list[tuple[str, bytes]], method: int, change: Callable[..., object] | None = None
) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as parcel_:
        for name, data in members:
            info = zipfile.ZipInfo("x")
            info.filename = name  # as given: the constructor would mend it
            info.compress_type = method
            if change is not None:
                change(info)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a name that is there twice
                parcel_.writestr(info, data)
    return out.getvalue()


def tar_member(
    name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname, info.mtime = size, kind, link, 1.5
    return info


def tar(infos: list[tarfile.TarInfo], bodies: list[bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    parts = [
        info.tobuf(form, "utf-8", "surrogateescape") + body + b"\0" * (-len(body) % 512)
        for info, body in zip(infos, bodies, strict=True)
    ]
    return b"".join(parts) + b"\0" * 1024


def raw_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with any bytes as its size, and a checksum that is right."""
    head = bytearray(tar_member("x").tobuf(tarfile.USTAR_FORMAT))
    head[:100], head[124:136], head[156:157] = name.ljust(100, b"\0"), size.ljust(12, b"\0"), kind
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def attacks() -> Iterator[Attack]:
    """Every crafted archive."""
    files = list(parcel().items())
    for kind in ("zip", "pax", "tar", "gz"):
        for path in BAD_PATHS:
            if not (kind == "tar" and "\x00" in path):  # the format itself ends a name there
                yield Attack(f"{kind}: path {path[:40]!r}", packed(kind, [*files, (path, b"x")]))
        for name in (*PICKLES, *EXTRAS, *SPECIAL_EXTRAS):
            yield Attack(f"{kind}: member {name}", packed(kind, [*files, (name, b"x")]))
        for name, data in files:
            for other in (name, name.upper(), f"./{name}"):
                yield Attack(f"{kind}: twice {other}", packed(kind, [*files, (other, data)]))
            yield Attack(f"{kind}: only {name}", packed(kind, [(name, data)]))
        yield Attack(f"{kind}: empty", packed(kind, []))
        yield Attack(
            f"{kind}: many", packed(kind, [*files, *((f"{i}.log", b"") for i in range(1100))])
        )
        yield Attack(f"{kind}: two tops", packed(kind, [(f"{n[8]}/{n}", d) for n, d in files]))
    yield from _tar_attacks(files)
    yield from _zip_attacks(files)
    yield from _stream_attacks()


def _tar_attacks(files: list[tuple[str, bytes]]) -> Iterator[Attack]:
    sound = [tar_member(name, len(data)) for name, data in files]
    bodies = [data for _, data in files]
    for label, kind in TYPES.items():
        for target in TARGETS:
            for name in ("link", CONFIG, "README.md"):
                link = tar_member(name, 0, kind, target)
                yield Attack(
                    f"tar: {label} {name} -> {target}", tar([link, *sound], [b"", *bodies])
                )
    start = tar(sound, bodies)[:-1024]
    for size in (
        b"-1",
        b"\xff" * 12,
        b"\x80" + b"\xff" * 11,
        b"77777777777",
        b"zzz",
        b"\x80" + b"\0" * 3 + b"\x7f" * 8,
    ):
        for kind in (b"0", b"L", b"x", b"g", b"K", b"S"):
            head = raw_header(b"README.md", size, kind)
            yield Attack(f"tar: size {size!r} of {kind!r}", start + head + b"\0" * 1024)
            yield Attack(f"tar: size {size!r} of {kind!r}, first", head + start + b"\0" * 1024)
    records = (
        b"9" * 60_000, b"12 size=-9\n", b"11 size=x\n\n", b"0 path=a\n", b"99999 path=a\n", b"path=a\n", b"-1 path=a\n",
        b"11 path=../x", b"13 path=../x\n", b"22 GNU.sparse.major=1\n", b"18 path=/etc/passwd\n", b"\xff" * 512,
        b"19 path=\xff\xfe/../../x\n", b"13 path=a\x00b\n", b"24 size=99999999999999\n\n", b"5 =\n\n" * 100,
    )  # fmt: skip
    for record in records:
        for kind in (b"x", b"g"):
            head = raw_header(b"pax", b"%011o" % len(record), kind) + record
            head += b"\0" * (-len(record) % 512)
            yield Attack(
                f"tar: record {record[:20]!r} {kind!r}", head + raw_header(b"k", b"0") + start
            )
    yield Attack("tar: endless extended headers", raw_header(b"x", b"0", b"L") * 9000 + start)
    yield Attack(
        "tar: a name of 2 MB", raw_header(b"x", b"%011o" % 2**21, b"L") + b"a" * 2**21 + start
    )
    yield Attack("tar: cut", start[: len(start) - 700])


def _zip_attacks(files: list[tuple[str, bytes]]) -> Iterator[Attack]:
    for mode in (0o120777, 0o010644, 0o020644, 0o060644, 0o140644, 0o040755):
        for name in (CONFIG, "README.md"):
            own = [(n, d) for n, d in files if n != name]

            def special(info: zipfile.ZipInfo, wanted: str = name, bits: int = mode) -> None:
                if info.filename == wanted:
                    info.create_system, info.external_attr = 3, bits << 16

            made = _zip([*own, (name, b"/etc/passwd")], zipfile.ZIP_DEFLATED, special)
            yield Attack(f"zip: mode {mode:o} {name}", made)
    plain = good("stored")
    end = plain.rindex(b"PK\x05\x06")
    for count, size, start in (
        (0xFFFF, 0, 0),
        (2, 2**32 - 1, 0),
        (2, 100, 2**32 - 1),
        (40_000, 9, 9),
    ):
        tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, size, start, 0)
        yield Attack(f"zip: end says {count} {size} {start}", plain[:end] + tail)
    for field, value in ((6, b"\x01\x00"), (8, b"\x0e\x00"), (8, b"\x0c\x00"), (8, b"\x63\x00")):
        broken = bytearray(plain)
        for mark, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
            at = -1
            while (at := broken.find(mark, at + 1)) >= 0:
                broken[at + field + shift : at + field + shift + 2] = value
        yield Attack(f"zip: field {field} = {value!r}", bytes(broken))
    local = plain.replace(b"adapter_config.json", b"adapter_c0nfig.json", 1)
    yield Attack("zip: the local name differs", local)
    flipped = bytearray(plain)
    flipped[len(plain) // 2] ^= 0xFF
    yield Attack("zip: a byte of the weights differs from its checksum", bytes(flipped))
    shifted = plain.replace(b"PK\x01\x02", b"PK\x01\x03")
    yield Attack("zip: no directory", shifted)
    yield Attack("zip: something before it", b"#!/bin/sh\n" + plain)
    bomb = b"\0" * (8 * 2**20)
    yield Attack("zip: bomb", _zip([(WEIGHTS, bomb), files[0]], zipfile.ZIP_DEFLATED))
    lying = bytearray(_zip([(WEIGHTS, bomb), files[0]], zipfile.ZIP_DEFLATED))
    lying = lying.replace(struct.pack("<L", len(bomb)), struct.pack("<L", 4096))
    yield Attack("zip: bomb that claims to be small", bytes(lying))


def _stream_attacks() -> Iterator[Attack]:
    sound = good("tar")
    yield Attack("gz: bomb", gzip.compress(b"\0" * (8 * 2**20), 9))
    yield Attack(
        "gz: bomb in a member", gzip.compress(packed("tar", [(WEIGHTS, b"\0" * (8 * 2**20))]), 9)
    )
    yield Attack("gz: cut", gzip.compress(sound)[:-300])
    yield Attack("gz: two streams", gzip.compress(sound) + gzip.compress(sound))
    yield Attack("gz: something behind it", gzip.compress(sound) + b"x")
    yield Attack("gz: a zip", gzip.compress(good("zip")))
    yield Attack("gz: a gz", gzip.compress(gzip.compress(sound)))
    yield Attack("gz: a name of 1 MB", b"\x1f\x8b\x08\x08" + b"\0" * 6 + b"a" * 2**20)
    for magic in (
        b"BZh91AY",
        b"\xfd7zXZ\0",
        b"7z\xbc\xaf'\x1c",
        b"Rar!\x1a\x07",
        b"(\xb5/\xfd",
        b"\x80\x04\x95",
        b"",
        b"{}",
    ):
        yield Attack(f"kind {magic!r}", magic + sound[:600] if magic else b"")


def mutations(count: int, seed: int = 0) -> Iterator[Attack]:
    """Good archives with bytes flipped, cut, doubled and put in, most of them where the structure is."""
    draw = random.Random(seed)
    sources = {kind: good(kind) for kind in KINDS}
    for _ in range(count):
        kind = draw.choice(KINDS)
        data = bytearray(sources[kind])
        for _ in range(draw.randint(1, 5)):
            _mutate(data, draw)
        yield Attack(f"{kind}: mutated", bytes(data))


def _mutate(data: bytearray, draw: random.Random) -> None:
    at = draw.choice(
        (draw.randrange(512), draw.randrange(len(data)), len(data) - 1 - draw.randrange(300))
    ) % len(data)
    kind = draw.randrange(6)
    if kind == 0:
        data[at] = draw.randrange(256)
    elif kind == 1:
        data[at : at + 4] = draw.choice(
            (b"\0" * 4, b"\xff" * 4, b"\x80\0\0\0", b"\xff\xff\xff\x7f")
        )
    elif kind == 2:
        data[at:at] = draw.randbytes(draw.randint(1, 600))
    elif kind == 3 and len(data) > 2000:
        del data[at : at + draw.randint(1, 600)]
    elif kind == 4:
        data[at : at + 8] = draw.choice(PIECES).encode("utf-8", "surrogatepass")[:8].ljust(8, b"/")
    else:
        data[at:at] = data[draw.randrange(len(data)) :][:512]
