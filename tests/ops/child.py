"""Python in a process of its own: whether Triton interprets its kernels is settled when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_child(code: str, *, interprets: bool = True, **environment: str) -> str:
    """What the code prints, with the tests and the project importable; its error if it fails."""
    tests = Path(__file__).parent.parent
    path = os.pathsep.join([str(tests), str(tests.parent / "src")])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    env.pop("TRITON_INTERPRET", None)
    if interprets:
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
