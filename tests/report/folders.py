"""Folders to report on: tiny runs that are really trained, and records written by hand where their size matters."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramux.formats.peft import peft_config, write_peft
from loramux.formats.tensors import AdapterTensors, SiteTensors
from loramux.recipe import parse_recipe
from loramux.train import train_recipe
from pico import build_pico, pico_tokenizer

LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


def make_base(folder: Path) -> Path:
    """A pico Llama with its tokenizer, and rows of two tasks beside it."""
    build_pico("llama").save_pretrained(folder / "base")
    pico_tokenizer().save_pretrained(folder / "base")
    rows = [
        {"prompt": f"What comes after {a}?", "answer": b, "task": task}
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        for task in ("ask", "tell")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "base"


def train(base: Path, out: Path, method: Mapping[str, Any], steps: int = 3, **more: Any) -> Path:
    """A run folder of `loramux train`."""
    rows = str(base.parent / "rows.jsonl")
    raw = {
        "base": str(base),
        "dtype": "float32",
        "method": dict(method),
        "data": {
            "train": [{"path": rows, "rows": 12}],
            "validation": [{"path": rows, "skip": 12}],
        },
        "training": {"steps": steps, "learning_rate": 1e-2, "micro_batch_size": 4},
        **more,
    }
    train_recipe(parse_recipe(raw), out, progress=False)
    return out


def write_run(
    folder: Path,
    *,
    name: str = "default",
    layers: int = 2,
    history: Sequence[Mapping[str, Any]] = (),
    edits: Sequence[Mapping[str, Any]] = (),
    routing: Sequence[Mapping[str, Any]] = (),
    linears: Sequence[str] = LINEARS,
    method: str = "lora",
) -> Path:
    """A run folder as `loramux train` leaves it, with a plain adapter of rank 2."""
    import torch

    folder.mkdir(parents=True)
    job = {"name": name, "base": "some/base", "method": {"name": method}}
    (folder / "run.json").write_text(json.dumps({"jobs": {name: job}}))
    (folder / "history.json").write_text(json.dumps(list(history)))
    if edits:
        (folder / "edits.json").write_text(json.dumps(list(edits)))
    if routing:
        lines = "".join(json.dumps(row) + "\n" for row in routing)
        (folder / "routing.jsonl").write_text(lines)
    sites = {
        f"model.layers.{layer}.{linear}": SiteTensors(torch.ones(2, 4), torch.ones(2, 4))
        for layer in range(layers)
        for linear in linears
    }
    config = peft_config(2, 4.0, target_modules=sorted({path.rpartition(".")[2] for path in sites}))
    write_peft(folder / "adapter", AdapterTensors.build(config, sites))
    return folder


def records(page: Path) -> dict[str, Any]:
    """The JSON block of a page."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="records">(.*?)</script>', text, re.S)
    assert len(found) == 1
    value: dict[str, Any] = json.loads(found[0], parse_constant=lambda name: 1 / 0)
    return value
