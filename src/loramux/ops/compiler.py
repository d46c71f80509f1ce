"""Builds one C file with the system compiler, once, into the user's cache.

Why: a plain C kernel compiles in about a second and needs nothing but `cc`; an extension built through a framework
takes minutes. Nothing here knows what the file computes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BASE_FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC")


class BuildError(ValueError):
    """There is no compiler, or it refused the file."""


@dataclass(frozen=True)
class Variant:
    """One way to compile the kernel, and the CPU flags that it needs to run."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
_AVX512_NEEDS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"})
VARIANTS = (  # best first
    Variant(
        "amx",
        _AVX512_NEEDS | {"avx512_bf16", "amx_tile", "amx_bf16"},
        (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    ),
    Variant("avx512_bf16", _AVX512_NEEDS | {"avx512_bf16"}, (*_AVX512, "-mavx512bf16")),
    Variant("avx512", _AVX512_NEEDS, _AVX512),
    Variant("avx2", frozenset({"avx2", "fma"}), ("-mavx2", "-mfma")),
    Variant("portable", frozenset(), ()),
)


def cpu_flags() -> frozenset[str]:
    """Instruction sets that this CPU names; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((ln for ln in lines if ln.startswith("flags")), "").split()[2:])


def runnable_variants(wanted: str | None = None) -> list[Variant]:
    """What this CPU runs, best first, or only the one named."""
    have = cpu_flags()
    runnable = [variant for variant in VARIANTS if variant.needs <= have]
    chosen = [variant for variant in runnable if wanted in (None, variant.name)]
    if not chosen:
        raise BuildError(
            f"this CPU cannot run variant {wanted!r}; it runs {[v.name for v in runnable]}"
        )
    return chosen


def find_compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise BuildError("no C compiler found (looked for $CC, cc, gcc, clang); install gcc or clang")


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "loramux" / "kernels"


def build(source: Path, flags: Sequence[str], folder: Path | None = None) -> Path:
    """The shared library of `source` (and the headers beside it), compiled unless an intact one lies in the cache."""
    compiler = find_compiler()
    folder = folder or cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="loramux-"))
    target = folder / f"{source.stem}-{_digest(source, flags, compiler)}.so"
    seal = target.with_suffix(".sha256")
    if not _is_intact(target, seal):
        _compile(compiler, source, flags, target, seal)
    return target


def _digest(source: Path, flags: Sequence[str], compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    files = [source, *sorted(source.parent.glob("*.h"))]
    parts = [
        *(file.read_bytes() for file in files),
        version,
        platform.machine().encode(),
        " ".join(flags).encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _is_intact(target: Path, seal: Path) -> bool:
    # Loading a truncated library kills the process with SIGBUS, so its bytes are checked before the loader sees them.
    if not target.is_file() or not seal.is_file():
        return False
    return seal.read_text().strip() == hashlib.sha256(target.read_bytes()).hexdigest()


def _compile(compiler: str, source: Path, flags: Sequence[str], target: Path, seal: Path) -> None:
    # Other processes may build the same file now: each writes its own and renames it, the last one wins.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        for openmp in (["-fopenmp"], []):
            command = [compiler, *BASE_FLAGS, *flags, *openmp, str(source), "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
        else:
            raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        sealed = Path(scratch) / seal.name
        sealed.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        os.replace(made, target)
        os.replace(sealed, seal)
