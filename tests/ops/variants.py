"""Tests of the kernels in every instruction set of this CPU, and without a compiler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from loramux.ops.compiler import runnable_variants
from loramux.ops.pool import group_linear
from loramux.ops.pool_kernel import kernel
from ops.cases import assert_close
from ops.pool_cases import Group, loop

VARIANTS = [variant.name for variant in runnable_variants()]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[*VARIANTS, "torch"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from forced(request.param, monkeypatch, kernel)


@pytest.fixture(params=VARIANTS)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from forced(request.param, monkeypatch, kernel)


def forced(name: str, monkeypatch: pytest.MonkeyPatch, load: Any) -> Iterator[str]:
    """`load` (the cached loader of a kernel) gives that variant, or none for "torch"."""
    if name == "torch":
        monkeypatch.setenv("LORAMUX_NO_CC", "1")
    else:
        monkeypatch.setenv("LORAMUX_CPU_VARIANT", name)
    load.cache_clear()
    found = load()
    if name != "torch" and found.why_not:
        pytest.skip(found.why_not)
    assert found.variant == name
    yield name
    load.cache_clear()


def run(group: Group) -> list[Tensor]:
    return group_linear(
        group.x, group.members, group.table, group.pairs, enter=group.enter, exit=group.exit
    )


def check(group: Group) -> None:
    """The group call equals the loop."""
    for got, want in zip(run(group), loop(group), strict=True):
        assert got.dtype is group.x.dtype
        assert_close(got, want)
