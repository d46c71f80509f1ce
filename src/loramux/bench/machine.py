"""Where it was measured: a ratio means little without the CPU, the versions and the kernel that ran."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "mixlora", "llama-cpp-python", "vllm")
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")


def describe_machine(choices: dict[str, str], threads: int) -> dict[str, Any]:
    """`choices`: backend -> why it ran, as the handles recorded it."""
    from loramux import __version__
    from loramux.ops.compiler import cpu_flags
    from loramux.ops.cpu import kernel

    have = cpu_flags()
    return {
        "cpu": _cpu_name(),
        "flags": [flag for flag in FLAGS if flag in have],
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "loramux": __version__,
        **{name: _version(name) for name in PACKAGES},
        "kernel": kernel().variant,
        "backends": choices,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
