"""A suite that takes seconds: a pico base and two tasks of letters, written to a folder."""

import json
from pathlib import Path
from typing import Any

from loramux.compare import Suite, parse_suite
from pico import build_pico, pico_tokenizer

LETTERS = "abcdefghijklmnopqrst"
TRAIN_ROWS = 16


def make_base(folder: Path) -> Path:
    build_pico("llama").save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


def make_task(folder: Path, shift: int) -> Path:
    """Which letter comes `shift` places later: four choices per row."""
    folder.mkdir(parents=True)
    rows = []
    for at, letter in enumerate(LETTERS):
        answers = [LETTERS[(at + shift + step) % len(LETTERS)] for step in range(4)]
        rows.append(
            {"prompt": f"{letter} and {shift}?", "choices": sorted(answers), "answer": answers[0]}
        )
    parts = {"train": rows[:TRAIN_ROWS], "validation": rows[:4], "test": rows[12:]}
    for split, own in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in own)
        (folder / f"{split}.jsonl").write_text(text)
    return folder


def raw_suite(folder: Path, **changes: Any) -> dict[str, Any]:
    """A suite over `folder`, which is filled if it is not yet."""
    if not (folder / "base").exists():
        make_base(folder / "base")
        make_task(folder / "one", 1)
        make_task(folder / "two", 2)
    return {
        "name": "small",
        "base": str(folder / "base"),
        "dtype": "float32",
        "budget": {"of": "lora", "tolerance": 0.1},
        "decode_rounds": 0,
        "training": {"learning_rate": 1e-2, "micro_batch_size": 4},
        "tasks": {"one": str(folder / "one"), "two": str(folder / "two")},
        "methods": {
            "lora": {"method": {"name": "lora", "r": 8}},
            "milora": {"method": {"name": "milora", "top_k": 3}},
        },
        "multi": {"steps": 2},
    } | changes


def suite(folder: Path, **changes: Any) -> Suite:
    return parse_suite(raw_suite(folder, **changes))
