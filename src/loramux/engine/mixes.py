"""Which adapters can answer one request together, and under its task."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many
from typing import Any

from loramux.engine.request import Mix

LEAST, MOST = 1e-30, 1e30  # well within fp32, in which weights reach the kernels


def check_mix(mix: Mix) -> None:
    """Refuse weights that cannot be computed with, or that would be no part at all."""
    bad = {name: weight for name, weight in mix if not LEAST <= abs(weight) <= MOST}
    if bad:
        raise ValueError(
            f"weights of a mix must be between {LEAST:g} and {MOST:g} in size, got {bad}; leave out what has weight 0"
        )


def why_no_mix(parts: Many[tuple[Any, float]]) -> str | None:
    """Why these contents cannot answer together; None if they can."""
    alone = len(parts) == 1 and parts[0][1] == 1
    dynamic = [content for content, _ in parts if content.facts.routes_tokens]
    if alone or not dynamic:
        return None
    return (
        f"{dynamic[0].method.title} decides for every token how its experts are weighed, so it answers alone and with "
        "weight 1; mix plain or prompt-routed adapters"
    )


def why_no_task(contents: Iterable[Any], task: str | None) -> str | None:
    """Why these contents cannot answer a request of this task; None if they can."""
    try:
        for content in contents:
            content.method.check_task(task)
    except ValueError as error:
        return str(error)
    return None
