"""`python -m loramux.bench.exact`: on a real base in fp32, logits alone against logits in one mixed batch.

The same requests run one by one and all at once, in steps of different sizes. What may differ is rounding: the bare
model's own logits change as much with the number of rows in a call.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from loramux.bench.adapters import save_tenants
from loramux.engine.engine import Engine
from loramux.engine.request import Request, SamplingParams
from loramux.eval.loading import load_model

LIMIT = 1e-5  # times the largest logit of the row
TOKENS = 4


def compare(base: str, copies: int = 2, seed: int = 0) -> dict[str, Any]:
    """The worst difference by kind, as a share of the row's largest logit."""
    model = load_model(base, dtype="float32").model
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="loramux-exact-") as scratch:
        made = save_tenants(model, Path(scratch), plain=4, milora=1, mixlora=1, gated=1)
        kinds: dict[str, Any] = {
            "base": None,
            "plain": "plain0",
            "mix": {"plain1": 0.7, "plain2": 0.3},
        }
        folders = {f"plain{i}": folder for i, folder in enumerate(made.plain)}
        for kind in ("milora", "mixlora", "gated"):
            kinds[kind] = kind
            folders[kind] = getattr(made, kind)[0]
        requests = [
            Request(
                prompt=[draw.randrange(5, 40_000) for _ in range(draw.randint(5, 60))],
                adapter=adapter,
                params=SamplingParams(max_tokens=TOKENS, ignore_eos=True),
                id=f"{kind} {i}",
            )
            for i in range(copies)
            for kind, adapter in kinds.items()
        ]
        alone = _logits(model, folders, requests, max_batch=1)
        together = _logits(model, folders, requests, max_batch=len(requests))
    worst: dict[str, float] = {}
    for key, row in alone.items():
        kind = key[0].split()[0]
        off = float((row - together[key]).abs().max() / row.abs().max())
        worst[kind] = max(worst.get(kind, 0.0), off)
    return {
        "base": base,
        "requests": len(requests),
        "rows": len(alone),
        "worst": worst,
        "limit": LIMIT,
    }


def _logits(
    model: Any, folders: dict[str, Path], requests: Sequence[Request], max_batch: int
) -> dict[tuple[str, int], Tensor]:
    """Every row that was sampled from, by request and number of tokens before it."""
    seen: dict[tuple[str, int], Tensor] = {}
    with Engine(model, max_batch=max_batch, prefix_cache=False) as engine:
        for name, folder in folders.items():
            engine.add_adapter(name, folder)
        engine.watch = lambda sequence, row: seen.update(
            {(sequence.request_id, sequence.num_tokens): row.clone()}
        )
        engine.generate(requests)
    return seen


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loramux.bench.exact", description=__doc__)
    parser.add_argument("--base", default="smollm2-135m", help="folder, fetch name or hub id")
    parser.add_argument("--copies", type=int, default=2, help="requests of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome to a file")
    given = parser.parse_args(arguments)
    result = compare(given.base, given.copies)
    text = json.dumps(result, indent=2)
    sys.stdout.write(text + "\n")
    if given.json is not None:
        given.json.write_text(text)
    return int(max(result["worst"].values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
