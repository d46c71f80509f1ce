"""Every Triton kernel compiles to machine code of a GPU, which the interpreter does not show."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


def has_assembler() -> bool:
    found = find_spec("triton")
    if found is None or found.origin is None:
        return False
    return (Path(found.origin).parent / "backends" / "nvidia" / "bin" / "ptxas").exists()


@pytest.mark.skipif(not has_assembler(), reason="Triton with its assembler for GPUs is not here")
def test_every_kernel_compiles_without_a_gpu(tmp_path: Path) -> None:
    tests = Path(__file__).parent.parent
    path = os.pathsep.join([str(tests), str(tests.parent / "src")])
    env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", "from ops.compile_kernels import compile_all; print(compile_all())"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 12
