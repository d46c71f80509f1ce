"""Optimizer and schedule. The schedule is a function of the step alone, so there is nothing to save or to restore."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loramux.recipe import TrainingConfig

Scheduler = Literal["linear", "cosine", "constant"]


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], training: TrainingConfig
) -> torch.optim.AdamW:
    """AdamW over all parameters of one adapter. Row gates do not decay."""
    if not parameters:
        raise ValueError(
            "the adapter has no trainable parameters: load it with trainable=True, or, if its method learns nothing, "
            "make it with `loramux compose`"
        )
    gates = [p for name, p in parameters.items() if _is_row_gate(name)]
    others = [p for name, p in parameters.items() if not _is_row_gate(name)]
    groups: list[dict[str, Any]] = [{"params": others}]
    if gates:
        groups.append({"params": gates, "weight_decay": 0.0})
    # Fused: hundreds of small matrices in one call. Elementwise, so the numbers are those of the plain loop.
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=training.betas,
        eps=training.eps,
        weight_decay=training.weight_decay,
        fused=True,
    )


def _is_row_gate(name: str) -> bool:
    return name.startswith("rows_by_key.") and ".gate." in name


def lr_factor(step: int, num_steps: int, kind: Scheduler, warmup_ratio: float) -> float:
    """Share of the peak learning rate in step 0..num_steps-1: a linear rise, then the schedule. Never 0."""
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    if kind == "linear":
        return 1.0 - done
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(parameters: Mapping[str, nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to `max_norm`; returns their norm before."""
    with_grad = [p for p in parameters.values() if p.grad is not None]
    grads = [p.grad for p in with_grad if p.grad is not None]
    if not grads:
        return torch.zeros(())
    # As torch.nn.utils.get_total_norm, which moves each of hundreds of norms to the device that it is on.
    total: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    # Hundreds of small products by exactly one are spared; NaN is not at least one.
    if total.device.type != "cpu" or not float(max_norm / (total + 1e-6)) >= 1.0:
        torch.nn.utils.clip_grads_with_norm_(with_grad, max_norm, total)
    return total


# --- Optimizer state as flat tensors, for safetensors ---------------------------------------------


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """`parameter|entry` -> tensor, in declared order; a parameter without steps so far has no entries."""
    return {
        f"{name}|{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `optimizer_tensors` gave. Raises ValueError for names that are not there."""
    states: dict[str, dict[str, Any]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition("|")
        if name not in parameters:
            raise ValueError(
                f"the saved optimizer has a state for {name!r}, which this adapter does not have"
            )
        states.setdefault(name, {})[key] = value.to(parameters[name].device)
    for name, state in states.items():
        optimizer.state[parameters[name]] = state
