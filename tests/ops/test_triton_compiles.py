"""Every Triton kernel compiles to machine code of a GPU, which the interpreter does not show."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from ops.child import run_child


def has_assembler() -> bool:
    found = find_spec("triton")
    if found is None or found.origin is None:
        return False
    return (Path(found.origin).parent / "backends" / "nvidia" / "bin" / "ptxas").exists()


@pytest.mark.skipif(not has_assembler(), reason="Triton with its assembler for GPUs is not here")
def test_every_kernel_compiles_without_a_gpu(tmp_path: Path) -> None:
    code = "from ops.compile_kernels import compile_all; print(compile_all())"
    printed = run_child(code, interprets=False, TRITON_CACHE_DIR=str(tmp_path))
    assert int(printed) == 12
