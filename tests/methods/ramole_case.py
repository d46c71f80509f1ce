"""RAMoLE with a router that has an opinion, beside its oracle: what the tests of the method share."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramux.methods.ramole import RAMoLEConfig
from methods.bridge import close
from methods.frozen_case import IDS, MASK, REAL, Frozen
from oracles import ramole

SITE = "model.layers.0.mlp.down_proj"


def routed(root: Path, std: float = 0.5, **options: Any) -> Frozen:
    """An attached router, moved off its start by `std`; no adapter is left out of a step."""
    made = Frozen(root, RAMoLEConfig, **{"adapter_dropout": 0.0, **options})
    set_router(made, std)
    return made


def set_router(made: Frozen, std: float, seed: int = 5) -> None:
    draw = torch.Generator().manual_seed(seed)
    for router in made.routers.values():
        for parameter in (router.A_r, router.B_r):
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.data = (std * noise).to(parameter.dtype)


def oracle_routers(made: Frozen) -> dict[str, ramole.Router]:
    """Leaves shared with the attached routers."""
    return {path: ramole.Router(r.A_r, r.B_r) for path, r in made.routers.items()}


def oracle(made: Frozen, config: ramole.Config = ramole.PLAIN) -> tuple[Tensor, dict[str, Tensor]]:
    return ramole.oracle_logits(
        made.base().requires_grad_(False), IDS, MASK, made.experts, oracle_routers(made), config
    )


def assert_is_oracle(
    made: Frozen, config: ramole.Config = ramole.PLAIN, tolerance: float | None = None
) -> None:
    expected, weights = oracle(made, config)
    close(made.run().detach()[REAL], expected.detach()[REAL], tolerance)
    records = made.records()
    assert records.keys() == weights.keys()
    for path, record in records.items():
        close(record.gates.detach()[REAL.reshape(-1)], weights[path].detach()[REAL], tolerance)


def weights_of(made: Frozen) -> dict[str, Tensor]:
    """The weights of the last pass at the real tokens, by linear."""
    return {path: r.gates.detach()[REAL.reshape(-1)] for path, r in made.records().items()}
