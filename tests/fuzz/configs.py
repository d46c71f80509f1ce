"""Server configurations as nobody should write them: values of every kind in every place, and broken YAML.

`mutated(count, seed)` yields bytes of a file and overrides; `python -m fuzz.configs --count 20000` (with `tests` on
PYTHONPATH) reads them all and prints what became of them. Each must be read or refused with ServerConfigError, soon.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from loramux.server.config import ServerConfig, ServerConfigError, load_config

DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 65536, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, 1e308),
    *(float("inf"), float("-inf"), float("nan"), "", " ", "x", "\x00", "a\nb", "../..", "/", "~"),
    *("~nobody/x", "~who-is-that/x", "a" * 5000, "\u202e", "é", "0", "1e3", "null", "true", "5 GiB", "-1MiB", "9" * 99),
    *("postgresql+psycopg://u:secret@nowhere/db", "sqlite://", "file:///etc", "${HOME}", "!!python"),
    *([], [[]], [None], ["a", 1], {}, {"": {}}, {"a": {"b": {"c": []}}}, {1: 2}, [["x"] * 50] * 50),
)  # fmt: skip
PIECES = (
    *("!!python/object/apply:os.system ['true']", "!!int ''", "!!int x", "!!float x", "!!timestamp x"),
    *("!!binary ====", "2001-99-99", "99:99:99", "0x", "0b2", "0o9", "9" * 5000, ".inf", ".nan", "~"),
    *("&a [*a]", "*nobody", "<<: 1", "<<: [1]", "? [a]\n: b", "? {a: b}\n: c", "- -\n -", "%YAML 9.9"),
    *("---\n---", "...", "\t", "\x00", "\ufeff", "\ud800", "{" * 30, "[" * 800, "'", '"', "|", ">", "@", "`"),
    *("!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "!<tag:x> y", "a: 1\na: 2", "1e-4", "- " * 500),
)  # fmt: skip
BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
OVERRIDES = (
    *("port=", "=1", "port", "a.b.c=1", "limits.max_n=[", "limits..x=1", "port=9 9", "limits=3"),
    *("uploads.lora_path_roots.0=x", "uploads.lora_path_roots.9999999=x", "base.x.y=1", "port=2001-99-99"),
    *("limits.max_n=" + "[" * 800, "registry.root=\x00", "port=!!int x", ".=1", "tenants.enabled=yes"),
)  # fmt: skip


ALL = ServerConfig(base="pico").model_dump(mode="json")


def part(draw: random.Random) -> dict[str, Any]:
    """A configuration that says every key of a few sections."""
    names = ["base", *draw.sample(sorted(set(ALL) - {"base"}), 4)]
    return {name: deepcopy(ALL[name]) for name in names}


def mutated(count: int, seed: int = 0) -> Iterator[tuple[bytes, list[str]]]:
    draw = random.Random(seed)
    for i in range(count):
        overrides = draw.sample(OVERRIDES, draw.randrange(3)) if i % 5 == 0 else []
        if i % 2:
            yield _structure(draw), overrides
        else:
            yield _text(draw), overrides


def _structure(draw: random.Random) -> bytes:
    """Right YAML that says something else."""
    config = part(draw)
    for _ in range(draw.randrange(1, 4)):
        inner: Any = config
        if draw.random() < 0.7:
            inner = draw.choice(
                [value for value in config.values() if isinstance(value, dict)] or [config]
            )
        key = draw.choice(list(inner) or ["base"])
        act = draw.randrange(4)
        if act == 0:
            inner.pop(key, None)
        elif act == 1:
            inner[_misspelt(draw, str(key))] = inner.get(key)
        else:
            inner[key] = deepcopy(draw.choice(VALUES))
    return yaml.dump(config, Dumper=DUMPER, allow_unicode=True).encode("utf-8", "surrogatepass")


def _text(draw: random.Random) -> bytes:
    """Text that was YAML once."""
    text = yaml.dump(part(draw), Dumper=DUMPER, sort_keys=draw.random() < 0.5)
    kind = draw.randrange(5)
    if kind == 0:
        data = bytearray(text.encode())
        for _ in range(draw.randrange(1, 20)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data)
    lines = text.splitlines()
    if kind == 1:
        place = draw.randrange(len(lines))
        lines[place] = lines[place].partition(":")[0] + ": " + draw.choice(PIECES)
    elif kind == 2:
        lines.insert(draw.randrange(len(lines)), draw.choice(PIECES))
    elif kind == 3:
        draw.shuffle(lines)
    else:
        key = draw.choice(["base", "limits", "uploads", "registry", "data"])
        return (BOMB + f"{key}: *{draw.choice('adgl')}\nbase: pico\n").encode()
    return "\n".join(lines).encode("utf-8", "surrogatepass")[: draw.choice([None, 40, 400])]


def _misspelt(draw: random.Random, key: str) -> str:
    place = draw.randrange(len(key) + 1)
    return key[:place] + draw.choice(["", "_", "x", "\x00", "é"]) + key[place + 1 :]


def run(count: int, seed: int = 0, most_s: float = 2.0) -> dict[str, Any]:
    """What became of them. `faults`: errors of other kinds, and files that took longer than `most_s` of this core."""
    found: Counter[str] = Counter()
    faults: list[str] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "serve.yaml"
        for data, overrides in mutated(count, seed):
            path.write_bytes(data)
            began = time.process_time()
            try:
                load_config(path, overrides)
                kind = "read"
            except ServerConfigError as error:
                kind = "refused"
                if len(str(error)) > 20_000:
                    faults.append(f"{len(str(error))} characters of message: {data[:200]!r}")
            except BaseException as error:
                kind = "fault"
                faults.append(f"{type(error).__name__}: {error!s:.100}: {data[:300]!r} {overrides}")
            spent = time.process_time() - began
            slowest = max(slowest, spent)
            if spent > most_s:
                faults.append(f"{spent:.1f} s: {data[:200]!r}")
            found[kind] += 1
    return {"files": count, **found, "slowest_s": round(slowest, 3), "faults": faults}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = run(args.count, args.seed)
    sys.stdout.write(json.dumps({**result, "faults": result["faults"][:20]}, indent=1) + "\n")
    sys.exit(bool(result["faults"]))
