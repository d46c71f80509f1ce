"""How large the inputs and outputs of adapters are, linear by linear: what the scores of a RAMoLE router are made of.

    python -m loramux.bench.ramole_scales --adapters DIR --data DIR --base DIR

One training prompt of each task goes through the base under the uniform mixture of all adapters. Per linear: the root
mean square of its input and of what an adapter adds, over tokens and adapters the median and the largest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramux.bench.ramole import Plan, Pool


@dataclass(frozen=True)
class Scale:
    """Root mean squares at one linear."""

    path: str
    input_median: float
    input_most: float
    added_median: float
    added_most: float


def rms(x_ND: Tensor) -> Tensor:
    """Over the last dimension, in fp32."""
    return x_ND.float().square().mean(-1).sqrt()


def added(rows: Any, x_NI: Tensor) -> Tensor:
    """s_i B_i^T A_i x of every adapter i that has rows here: [N, E, O]."""
    scale_R = rows.spans.row_scale_R.to(x_NI.device)
    parts = []
    for slot, rank in enumerate(rows.spans.rank):
        own = rows.slot_rows(slot)
        if rank:
            t_Nr = x_NI.float() @ rows.a[own].float().T
            parts.append((t_Nr * scale_R[own]) @ rows.b[own].float())
    return torch.stack(parts, 1)


def measure(pool: Pool, prompts: Sequence[str]) -> list[Scale]:
    """One line per linear, the largest of what is added first."""
    pool.use(list(pool.names))
    seen: dict[str, list[Tensor]] = {}

    def hook(path: str) -> Any:
        def keep(_: Any, view: tuple[Any, ...]) -> None:
            seen.setdefault(path, []).append(view[0].x_ND.detach())

        return keep

    hooks = [r.register_forward_pre_hook(hook(path)) for path, r in pool.adapter.routers.items()]
    for prompt in prompts:
        ids = torch.tensor([pool.tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            pool.model(input_ids=ids, use_cache=False)
    for one in hooks:
        one.remove()
    found = []
    for path, parts in seen.items():
        x_NI = torch.cat(parts)
        v, x = rms(added(pool.adapter.rows[path], x_NI)), rms(x_NI)
        found.append(
            Scale(path, float(x.median()), float(x.max()), float(v.median()), float(v.max()))
        )
    return sorted(found, key=lambda scale: -scale.added_most)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loramux.bench.ramole_scales")
    for name in ("adapters", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR")
    parser.add_argument("--base", required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    plan = Plan(options.adapters, options.data, options.base, Path())
    from loramux.data.tasks import read_task

    prompts = [read_task(plan.data / task / "train.jsonl", 1)[0].prompt for task in plan.tasks]
    scales = measure(Pool(plan), prompts)
    lines = [f"{'linear':<36} {'input':>8} {'most':>8} {'added':>8} {'most':>8}"]
    lines += [
        f"{s.path:<36} {s.input_median:8.3f} {s.input_most:8.3f} {s.added_median:8.4f} {s.added_most:8.3f}"
        for s in scales
    ]
    middle = sorted(s.added_median for s in scales)[len(scales) // 2]
    sys.stdout.write(
        "\n".join([*lines, f"median over the linears of what is added: {middle:.4f}"]) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
