"""Memory that is kept between steps is not asked of the kernel again, and is given back at the end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loramux.ops import heap

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
# In a process of its own: where much was allocated before, free room in the heap hides what is asked of the kernel.
# 40 MB: glibc never keeps so much by itself.
COUNT = """
import importlib.util, json, resource, sys
import numpy
spec = importlib.util.spec_from_file_location("heap", sys.argv[1])
heap = importlib.util.module_from_spec(spec)
spec.loader.exec_module(heap)

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.empty(10_000_000, numpy.float32).fill(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = [faults_of_a_step() for _ in range(3)]
with heap.keeping():
    faults_of_a_step()
    kept = [faults_of_a_step() for _ in range(3)]
after = [faults_of_a_step() for _ in range(3)]
print(json.dumps([plain, kept, after]))
"""


def test_a_block_that_was_freed_is_used_again_inside_and_given_back_after() -> None:
    command = [sys.executable, "-c", COUNT, str(Path(heap.__file__))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    plain, kept, after = json.loads(done.stdout)
    # Huge pages make one fault of hundreds, so few are few.
    assert max(kept) <= min(plain) / 10
    assert min(after) >= 10 * max(kept)


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with heap.keeping():
        pass
