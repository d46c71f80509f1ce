"""Recipes of joint runs over one pico base on disk."""

import json
from pathlib import Path
from typing import Any

from loramux.recipe import Recipe, parse_recipe
from pico import build_pico, pico_tokenizer

JOBS: list[dict[str, Any]] = [
    {"name": "one", "seed": 1},
    {"name": "two", "seed": 2, "method": {"name": "milora", "r": 4}, "training": {"steps": 3}},
]


def write_base(folder: Path) -> Path:
    """The base's folder; its rows lie beside it."""
    base = folder / "base"
    build_pico("llama").save_pretrained(base)
    pico_tokenizer().save_pretrained(base)
    rows = [
        {"prompt": f"What letter comes after {a}?", "completion": b, "task": "letters"}
        for a, b in zip("abcdefghijklmno", "bcdefghijklmnop", strict=True)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base


def raw(base: Path, **changes: Any) -> dict[str, Any]:
    return {
        "base": str(base),
        "dtype": "float32",
        "joint": True,
        "method": {"name": "lora", "r": 2},
        "data": {"train": [{"path": str(base.parent / "rows.jsonl"), "rows": 10}]},
        "training": {"steps": 5, "learning_rate": 1e-2, "micro_batch_size": 4},
        "jobs": JOBS,
        **changes,
    }


def recipe(base: Path, **changes: Any) -> Recipe:
    return parse_recipe(raw(base, **changes))
