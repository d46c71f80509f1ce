"""A task whose signal sits in one known adapter, and what a short training of gates makes of it."""

from pathlib import Path
from typing import Any

import torch

import loramux
from conformance.cases import nudge
from loramux.core.method import MethodConfig
from pico import VOCAB, build_pico

NAMES = ("noise", "knows", "other")
LENGTH = 12


def task(shift: int, count: int = 16) -> dict[str, torch.Tensor]:
    """Sequences in which every token is the one before plus `shift`: unknown to a random base."""
    draw = torch.Generator().manual_seed(shift)
    start = torch.randint(4, VOCAB, (count, 1), generator=draw)
    ids = 4 + (start - 4 + shift * torch.arange(LENGTH)) % (VOCAB - 4)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def descend(
    model: Any, parameters: Any, batch: dict[str, torch.Tensor], steps: int, lr: float
) -> float:
    optimizer = torch.optim.AdamW(list(parameters), lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    model.eval()
    return float(loss.detach())


def planted(root: Path) -> tuple[tuple[str, ...], dict[str, torch.Tensor]]:
    """Folders of three adapters, and the data that the second one was trained for."""
    folders = []
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        handle = loramux.attach(build_pico("llama"), loramux.LoraConfig(r=4))
        if name == "noise":
            nudge(handle.adapters["default"], 3)
        else:
            data = task(5 if name == "knows" else 11)
            descend(handle.model, handle.trainable_parameters().values(), data, 60, 2e-2)
        folders.append(str(handle.save(root / name)))
    return tuple(folders), task(5, 24)


def shares_after_training(
    config: MethodConfig, batch: dict[str, torch.Tensor], steps: int = 40, lr: float = 2e-2
) -> dict[str, float]:
    """Mean weight of every adapter over gates and tokens after a short training of the gates alone."""
    torch.manual_seed(0)
    handle = loramux.attach(build_pico("llama"), config)
    model: Any = handle.model
    with torch.no_grad():
        before = float(model(**batch).loss)
    descend(model, handle.trainable_parameters().values(), batch, steps, lr)
    with torch.no_grad():
        after = float(model(**batch).loss)
    assert after < before
    gates = torch.cat([record.gates for record in handle.routing()])
    return dict(zip(NAMES, gates.mean(0).tolist(), strict=True))
