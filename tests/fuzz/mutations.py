"""Adapters whose two files were changed at random: bytes of the weights, entries of their header, the config."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from typing import Any

from fuzz.parcels import CONFIG, WEIGHTS, config, pack, parcel, split, tensors, with_header

NUMBERS = (
    *(
        0,
        1,
        -1,
        2,
        7,
        8,
        255,
        256,
        2**15,
        2**16,
        2**24,
        2**31 - 1,
        2**31,
        2**32,
        2**53,
        2**63 - 1,
        2**63,
        2**64,
    ),
    *(10**30, 10**400, 0.5, -0.0, 1e308, 5e-324, 1e-300),
)
TEXTS = (
    "",
    "a",
    "q_proj",
    ".*",
    "(a+)+$",
    "(.*)*",
    "[",
    "\\",
    "\x00",
    "\ud800",
    "a" * 5000,
    "../x",
    "LORA",
    "all-linear",
    "a|layers",
    "(?P<idx>x)",
    ".?" * 30 + "Z",
    "(?x)#[",
)
DTYPES = ("F32", "F16", "BF16", "F64", "I8", "F8_E4M3", "F4", "BOOL", "C64", "", "f32", "PICKLE")
RAW_JSON = (
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"{}", b"[" * 100_000, b'{"a":' * 50_000, b"[" * 900 + b"]" * 900,
    b'{"r":1,"r":2}', b'{"r":NaN}', b'{"r":Infinity}', b'{"r":1e999}', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"{}x",
    b'{"r":' + b"9" * 5000 + b"}", b'{"a":"\\ud800"}', b"[" + b"{}," * 300_000 + b"{}]", b'{"' + b"k" * 10**6 + b'":1}',
)  # fmt: skip


def mutated_adapters(count: int, seed: int = 0) -> Iterator[dict[str, bytes]]:
    """Members of an upload; a few are still sound."""
    draw = random.Random(seed)
    bases = [
        parcel(),
        parcel(tensors(1, 2, "BF16"), config(2)),
        parcel(tensors(2, 3, "F16", dora=True), config(3, use_dora=True)),
    ]
    kinds = (_bytes, _header, _header, _layout, _config, _config, _raw)
    for _ in range(count):
        files = dict(draw.choice(bases))
        draw.choice(kinds)(files, draw)
        yield files


def _bytes(files: dict[str, bytes], draw: random.Random) -> None:
    data = bytearray(files[WEIGHTS])
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(draw.randint(1, 6)):
        at = draw.choice(
            (draw.randrange(8), draw.randrange(header_end), draw.randrange(len(data)))
        ) % len(data)
        kind = draw.randrange(5)
        if kind == 0:
            data[at] = draw.randrange(256)
        elif kind == 1:
            data[at:at] = draw.randbytes(draw.randint(1, 40))
        elif kind == 2 and len(data) > 100:
            del data[at : at + draw.randint(1, 40)]
        elif kind == 3:
            data[:8] = struct.pack(
                "<Q", draw.choice((0, 1, 7, header_end, 10**8, 2**31, 2**63, 2**64 - 1))
            )
        else:
            data[at : at + 4] = draw.choice(
                (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4, b"\x01\0\0\0", b"\xff\xff\x7f\x7f")
            )
    files[WEIGHTS] = bytes(data) if draw.randrange(8) else bytes(data[: draw.randrange(len(data))])


def _header(files: dict[str, bytes], draw: random.Random) -> None:
    header, body = split(files[WEIGHTS])
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(sorted(header))
        entry = header[name]
        field = draw.choice(("dtype", "shape", "data_offsets", "name", "entry", "number"))
        if field == "name":
            header[
                draw.choice(
                    (
                        name.upper(),
                        name + "x",
                        name[17:],
                        "é" + name,
                        name.replace("0", "9"),
                        *TEXTS,
                    )
                )
            ] = entry
        elif field == "entry" or not isinstance(entry, dict) or "shape" not in entry:
            header[name] = _value(draw, 2)
        elif field == "dtype":
            header[name] = entry | {"dtype": draw.choice(DTYPES)}
        elif field == "number":
            which = draw.choice(("shape", "data_offsets"))
            given = entry.get(which)
            numbers = list(given) if isinstance(given, list) and given else [0]
            numbers[draw.randrange(len(numbers))] = draw.choice(NUMBERS)
            header[name] = entry | {which: numbers}
        else:
            header[name] = entry | {field: _value(draw, 2)}
    files[WEIGHTS] = with_header(header, body)


def _layout(files: dict[str, bytes], draw: random.Random) -> None:
    """Sound on the surface: whole entries exchanged, shapes refolded, tensors left out or added."""
    made = tensors(
        draw.randrange(5), draw.choice((1, 2, 4, 64)), draw.choice(("F32", "BF16", "F16"))
    )
    one, other = draw.sample(sorted(made), 2)
    kind = draw.randrange(6)
    if kind == 0:
        made[one], made[other] = made[other], made[one]
    elif kind == 1:
        dtype, shape, data = made[one]
        made[one] = (dtype, tuple(reversed(shape)), data)
    elif kind == 2:
        del made[one]
    elif kind == 3:
        made[draw.choice((one.upper(), other + ".x", "x", one.replace("layers.0", "layers.7")))] = (
            made[one]
        )
    elif kind == 4:
        dtype, shape, data = made[one]
        made[one] = (dtype, (*shape, 1), data)
    else:
        dtype, shape, data = made[one]
        made[one] = (dtype, (2**40, 2**40), data)
    files[WEIGHTS] = pack(made, draw.choice((None, {"format": "pt"}, {"a": {"b": 1}}, [1], "x")))


def _config(files: dict[str, bytes], draw: random.Random) -> None:
    settings = json.loads(files[CONFIG])
    for _ in range(draw.randint(1, 3)):
        key = draw.choice(
            (
                *sorted(settings),
                "auto_mapping",
                "layers_to_transform",
                "layers_pattern",
                "exclude_modules",
                "megatron_config",
                "x",
            )
        )
        settings[key] = _value(draw, 3)
    if draw.randrange(6) == 0:
        del settings[draw.choice(sorted(settings))]
    files[CONFIG] = json.dumps(settings).encode("utf-8", "surrogatepass")


def _raw(files: dict[str, bytes], draw: random.Random) -> None:
    data = draw.choice(RAW_JSON)
    if draw.randrange(2):
        files[CONFIG] = data
    else:
        files[WEIGHTS] = struct.pack("<Q", len(data)) + data + b"\0" * draw.choice((0, 8, 64))


def _value(draw: random.Random, depth: int) -> Any:
    kind = draw.randrange(7 if depth else 5)
    if kind == 0:
        return draw.choice((None, True, False))
    if kind in (1, 2):
        return draw.choice(NUMBERS)
    if kind in (3, 4):
        return draw.choice(TEXTS)
    if kind == 5:
        return [_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {
        draw.choice((*TEXTS, "q_proj", "k_proj")): _value(draw, depth - 1)
        for _ in range(draw.randrange(4))
    }
