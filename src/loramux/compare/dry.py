"""What a suite would do, without doing it: rows, tokens, matched ranks, and an estimate of the time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramux.compare.plan import make_plan
from loramux.compare.progress import Clock
from loramux.compare.rows import RowStore
from loramux.compare.schema import Suite
from loramux.compare.select import select

PROBE_ROWS, PROBE_LENGTH, PROBE_ROUNDS = 8, 64, 3


def dry_run(
    suite: Suite, out: Path | None = None, only: Sequence[str] = (), workers: int = 1
) -> dict[str, Any]:
    """The plan as plain values. Where `out` has rows, they say how long the others take; else a timed forward pass."""
    plan = make_plan(suite)
    items = select(plan.items, only)
    rows = {} if out is None else RowStore(out).read()
    known = [item for item in items if item.id in rows]
    left = [item for item in items if item.id not in rows]
    clock = Clock()
    for item in known:
        clock.learn(item, rows[item.id])
    if clock.seconds([]) is None:
        clock.speed = seconds_per_token(suite)
    seconds = clock.seconds(left) or 0.0
    return {
        "suite": suite.name,
        "budget": next(iter(plan.matched.values())).budget,
        "matched": {
            label: {
                "parameters": found.parameters,
                "deviation": round(found.deviation, 5),
                "how": found.how,
                "fields": found.fields,
            }
            for label, found in plan.matched.items()
        },
        "rows": [
            {
                "id": item.id,
                "part": item.part,
                "method": item.label,
                "task": item.task,
                "seed": item.seed,
                "tokens": item.tokens,
                "search_tokens": item.search_tokens,
                "test_tokens": item.test_tokens,
                "done": item.id in rows,
            }
            for item in items
        ],
        "left": len(left),
        "seconds": round(seconds / workers),
    }


def seconds_per_token(suite: Suite) -> float:
    """Seconds of a forward pass of the base per token, from a short measurement."""
    import torch

    from loramux.eval.loading import load_model

    model = load_model(suite.base, dtype=suite.dtype, threads=suite.threads).model
    vocab = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocab, (PROBE_ROWS, PROBE_LENGTH), generator=generator)
    times = []
    with torch.inference_mode():
        for _ in range(PROBE_ROUNDS):
            start = time.perf_counter()
            model(ids_BT, use_cache=False, logits_to_keep=1)
            times.append(time.perf_counter() - start)
    return min(times) / ids_BT.numel()
