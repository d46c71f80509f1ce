"""X-LoRA with a classifier that has an opinion, beside its oracle: what the tests of the method share."""

from pathlib import Path
from typing import Any

import torch

from loramux.methods.xlora import XLoraConfig
from methods.bridge import close
from methods.frozen_case import IDS, MASK, REAL, Frozen
from oracles import xlora

# ours -> the oracle's
OPTIONS: dict[str, tuple[dict[str, Any], xlora.Config]] = {
    "plain": ({}, xlora.Config()),
    "warm": (
        {"softmax_temperature": 2.5, "global_scaling_weight": 1.5},
        xlora.Config(temperature=2.5, global_weight=1.5),
    ),
    "top-k": ({"top_k_lora": 2}, xlora.Config(top_k=2)),
    "softmax-of-top-k": (
        {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
        xlora.Config(top_k=2, enable_softmax=False, enable_softmax_topk=True),
    ),
    "raw": ({"enable_softmax": False}, xlora.Config(enable_softmax=False)),
    "layerwise": (
        {"layerwise_scalings": True, "top_k_lora": 1},
        xlora.Config(layerwise=True, top_k=1),
    ),
    "deep": ({"xlora_depth": 3, "xlora_size": 10}, xlora.Config()),
}


def classified(root: Path, std: float = 0.3, **options: Any) -> Frozen:
    made = Frozen(root, XLoraConfig, **{"xlora_dropout_p": 0.0, **options})
    draw = torch.Generator().manual_seed(5)
    for parameter in made.handle.trainable_parameters().values():
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parameter.data = (std * noise).to(parameter.dtype)
    return made


def params_of(made: Frozen) -> xlora.Params:
    (router,) = made.routers.values()
    linears = [m for m in router.layers if isinstance(m, torch.nn.Linear)]
    return xlora.Params(made.experts, [(m.weight, m.bias) for m in linears])


def scalings_of(made: Frozen, batch: int = 2) -> torch.Tensor:
    """[B, L, N] of the last forward, means over the linears."""
    (record,) = made.records().values()
    return record.gates.detach().unflatten(0, (batch, -1))


def assert_is_oracle(made: Frozen, config: xlora.Config) -> None:
    expected, scale = xlora.oracle_logits(made.base(), IDS, MASK, params_of(made), config)
    close(made.run().detach()[REAL], expected.detach()[REAL])
    close(scalings_of(made)[REAL], scale.mean(2).detach()[REAL])
