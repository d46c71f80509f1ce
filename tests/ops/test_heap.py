"""Memory that is kept between steps is not asked of the kernel again, and is given back at the end."""

import resource
import sys

import pytest
import torch

from loramux.ops import heap

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
NUMEL = 10_000_000  # 40 MB: glibc never keeps so much by itself


def faults_of_a_step() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(NUMEL).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_block_that_was_freed_is_used_again_inside_and_given_back_after() -> None:
    plain = [faults_of_a_step() for _ in range(3)]
    with heap.keeping():
        faults_of_a_step()
        kept = [faults_of_a_step() for _ in range(3)]
    after = [faults_of_a_step() for _ in range(3)]
    assert max(kept) < min(plain) / 10
    assert min(after) > 10 * max(kept)


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with heap.keeping():
        assert faults_of_a_step() > 0
