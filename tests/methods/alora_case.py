"""An ALoRA with the oracle's numbers and a batch to score it on: what the tests of scores and rounds share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loramux
from loramux.core.adapter import Adapter
from loramux.data import Example, collate
from loramux.methods.alora import ALoRAConfig
from loramux.train import Job, Listener, Trainer, TrainingConfig
from methods.bridge import adapter_of, copy_lora
from oracles import alora
from oracles.lora import LowRank
from oracles.random_params import lora_params
from pico import PAD, build_pico
from train.toys import examples

RANK = 3


def batch_of(rows: list[Example]) -> dict[str, Tensor]:
    return collate(rows, PAD)


def oracle_batch(batch: dict[str, Tensor]) -> alora.Batch:
    return alora.Batch(batch["input_ids"], batch["attention_mask"], batch["labels"])


def attached(
    family: str = "llama", *, seed: int = 0, **overrides: Any
) -> tuple[nn.Module, loramux.Handle, dict[str, LowRank]]:
    """Random rows of rank 3 in both layouts."""
    model = build_pico(family, **overrides)
    params = lora_params(model, RANK, seed)
    handle = loramux.attach(model, ALoRAConfig(r=RANK), backend="reference")
    copy_lora(handle, params)
    return model, handle, params


def base_of(family: str = "llama", **overrides: Any) -> nn.Module:
    return build_pico(family, **overrides)


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits


def planted(
    signal: Mapping[alora.Key, float], harm: Mapping[alora.Key, float] | None = None, seed: int = 6
) -> tuple[loramux.Handle, dict[str, Tensor]]:
    """Labels that the ranks of `signal` make likely; those of `harm` disturb, all others do next to nothing."""
    model, handle, params = attached()
    batch = batch_of(examples(12, seed=seed))
    strength = {path: torch.full((RANK,), 0.02) for path in params}
    for (path, rank), size in signal.items():
        strength[path][rank] = size
    for path, rank in harm or {}:
        strength[path][rank] = 0.0
    copy_lora(handle, alora.with_gates(params, strength))
    said = logits_of(model, batch).argmax(-1).roll(1, 1)
    batch["labels"] = torch.where(batch["labels"] == -100, -100, said)
    for (path, rank), size in (harm or {}).items():
        strength[path][rank] = size
    copy_lora(handle, alora.with_gates(params, strength))
    return handle, batch


def ranks(adapter: Adapter) -> dict[str, int]:
    return {path: rows.spans.num_rows for path, rows in adapter.rows.items()}


# -- training --------------------------------------------------------------------------------------

SHORT: dict[str, Any] = {
    "r": RANK,
    "rounds": 2,
    "ranks_per_round": 5,
    "first_round": 3,
    "round_every": 2,
    "round_unit": "steps",
    "score_rows": 6,
}


def job(**changes: Any) -> Job:
    validation = changes.pop("validation", examples(8, seed=5))
    train = changes.pop("train", examples(24))
    training = {"steps": 8, "learning_rate": 1e-2, "micro_batch_size": 4, **changes}
    return Job(
        "default",
        train=train,
        validation=validation,
        training=TrainingConfig(**training),
        pad_token_id=PAD,
    )


def trainer(
    config: Any, *listeners: Listener, out: Path | None = None, resume: bool = False, **changes: Any
) -> Trainer:
    torch.manual_seed(0)
    model = build_pico("llama")
    handle = loramux.attach(model, config)
    return Trainer(model, handle, [job(**changes)], out=out, resume=resume, listeners=listeners)


def adapter_under(trainer: Trainer) -> Adapter:
    return adapter_of(trainer.handle)


def edits_of(trainer: Trainer) -> list[dict[str, Any]]:
    return trainer.runners[0].state.edits
