"""A MixLoRA with the oracle's numbers: what the tests of the method share."""

from typing import Any

import torch
from torch import Tensor, nn

import loramux
from methods.bridge import build_double, close, copy_mixlora
from oracles import mixlora_model
from oracles.random_params import mixlora_params as random_params
from pico import build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29], [90, 33, 12, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
REAL = MASK.bool()
EXPERTS, RANK = 4, 4

# name -> (fields of our config, fields of the oracle's)
STRATEGIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "top2": ({}, {}),
    "top1": ({"top_k": 1}, {"top_k": 1}),
    "all": ({"top_k": 4}, {"top_k": 4}),
    "dynamic": (
        {"routing_strategy": "mixlora-dynamic"},
        {"strategy": "mixlora-dynamic"},
    ),
    "dynamic-renormalised": (
        {"routing_strategy": "mixlora-dynamic", "top_p": 0.5, "renormalise_top_p": True},
        {"strategy": "mixlora-dynamic", "top_p": 0.5, "renormalise": True},
    ),
    "dynamic-warm": (
        {"routing_strategy": "mixlora-dynamic", "temperature": 0.7},
        {"strategy": "mixlora-dynamic", "temperature": 0.7},
    ),
    "dynamic-warm-published": (
        {
            "routing_strategy": "mixlora-dynamic",
            "temperature": 1.3,
            "top_p": 0.6,
            "published_parity": True,
        },
        {
            "strategy": "mixlora-dynamic",
            "temperature": 1.3,
            "top_p": 0.6,
            "divide": "probabilities",
        },
    ),
    "switch": ({"routing_strategy": "mixlora-switch"}, {"strategy": "mixlora-switch"}),
    "switch-published": (
        {"routing_strategy": "mixlora-switch", "published_parity": True},
        {"strategy": "mixlora-switch", "multiply": True},
    ),
}


def attached(
    family: str = "llama", *, double: bool = False, dora: bool = False, **settings: Any
) -> tuple[nn.Module, loramux.Handle, mixlora_model.Params]:
    """A MixLoRA with random rows and routers, and the same for the oracle."""
    model = build_double(family) if double else build_pico(family)
    params = random_params(model, EXPERTS, RANK, scale=1.5, dora=dora)
    options = {"num_experts": EXPERTS, "lora_dropout": 0.0, "jitter_noise": 0.0, **settings}
    config = loramux.MixLoRAConfig(r=RANK, lora_alpha=1.5 * RANK, use_dora=dora, **options)
    handle = loramux.attach(model, config, backend="reference")
    copy_mixlora(handle, params)
    return model, handle, params


def run(model: nn.Module, mask: Tensor = MASK) -> Tensor:
    return model(input_ids=IDS, attention_mask=mask).logits


def oracle_of(
    family: str, params: mixlora_model.Params, double: bool, mask: Tensor = MASK, **config: Any
) -> Any:
    model = build_double(family) if double else build_pico(family)
    settings = mixlora_model.Config(**config)
    return mixlora_model.oracle_logits(model.requires_grad_(False), IDS, mask, params, settings)


def assert_is_oracle(family: str, name: str, *, double: bool, dora: bool) -> None:
    ours, theirs = STRATEGIES[name]
    model, handle, params = attached(family, double=double, dora=dora, **ours)
    got = run(model).detach()
    expected, details = oracle_of(family, params, double, **theirs)
    close(got[REAL], expected.detach()[REAL])
    records = {record.path: record for record in handle.routing()}
    assert list(records) == list(details["routes"])
    for path, route in details["routes"].items():
        real = REAL.reshape(-1)
        close(records[path].gates.detach()[real], route.weight.to(expected.dtype)[real])
        close(records[path].probs.detach()[real], route.p.to(expected.dtype)[real])
