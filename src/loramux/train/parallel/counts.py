"""Routers whose forward passes leave something behind: tokens counted, which decide what the next pass does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from loramux.train.runner import JobRunner


def counters(runner: JobRunner) -> list[tuple[nn.Module, str]]:
    """Routers that count tokens from call to call, each with the attribute that holds its counts."""
    return [
        (router, router.counted)
        for router in runner.adapter.routers.values()
        if router.counted is not None
    ]


def counts_tokens(runner: JobRunner) -> bool:
    """Whether the forward passes of a step change what the next one does."""
    return bool(counters(runner))
