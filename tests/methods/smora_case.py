"""A SMoRA with the oracle's numbers: what the tests of the method share."""

from typing import Any

import torch
from torch import Tensor, nn

import loramux
from loramux.methods.smora import RankRouter, SMoRAConfig
from methods.bridge import adapter_of, build_double
from oracles import smora
from oracles.random_params import generator, layer_linears
from oracles.surgery import base_weight
from pico import build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29], [90, 33, 12, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LABELS = torch.where(MASK.bool(), IDS, -100)
REAL = MASK.bool()
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
RANKS, ALPHA = 8, 6.0

# name -> (fields of our config, the oracle's config)
CONFIGS: dict[str, tuple[dict[str, Any], smora.Config]] = {
    "default": ({"activate_r": 3}, smora.Config(3, ALPHA)),
    "one": ({"activate_r": 1}, smora.Config(1, ALPHA)),
    "all": ({"activate_r": 8}, smora.Config(8, ALPHA)),
    "units": ({"activate_r": 4, "rank_partition": 2}, smora.Config(4, ALPHA, rho=2)),
    "biased": (
        {"activate_r": 3, "gate_from_biased": True},
        smora.Config(3, ALPHA, from_biased=True),
    ),
    "softmax": ({"activate_r": 3, "score": "softmax"}, smora.Config(3, ALPHA, score="softmax")),
}


def attached(
    name: str = "default", family: str = "llama", *, double: bool = False, **settings: Any
) -> tuple[nn.Module, loramux.Handle, smora.Params, smora.Config]:
    """A SMoRA with random rows, routers and biases, and the same for the oracle."""
    ours, theirs = CONFIGS[name]
    model = build_double(family) if double else build_pico(family)
    draw, dtype = generator(0), next(model.parameters()).dtype
    params = {}
    for path in layer_linears(model):
        d_out, d_in = base_weight(model.get_submodule(path))[0].shape
        params[path] = smora.random_layer(d_in, d_out, RANKS, theirs.rho, draw, dtype)
    config = SMoRAConfig(r=RANKS, lora_alpha=ALPHA, **{**ours, **settings})
    handle = loramux.attach(model, config, backend="reference")
    copy(handle, params, theirs)
    return model, handle, params, theirs


def copy(handle: loramux.Handle, params: smora.Params, config: smora.Config) -> None:
    adapter = adapter_of(handle)
    assert adapter.rows.keys() == params.keys() == adapter.routers.keys()
    for path, layer in params.items():
        rows, router = adapter.rows[path], router_at(handle, path)
        rows.a.data, rows.b.data = layer.A.clone(), layer.B.T.contiguous().clone()
        router.weight.data = layer.router.clone()
        router.bias = layer.bias[:: config.rho].clone()


def shared(handle: loramux.Handle) -> smora.Params:
    """Leaves shared with the attached adapter, for comparing gradients."""
    found = {}
    for path, rows in adapter_of(handle).rows.items():
        router = router_at(handle, path)
        bias = router.bias.repeat_interleave(router.config.rank_partition)
        found[path] = smora.Layer(rows.a, rows.b.T, router.weight, bias)
    return found


def router_at(handle: loramux.Handle, path: str) -> RankRouter:
    router = adapter_of(handle).routers[path]
    assert isinstance(router, RankRouter)
    return router


def routers(handle: loramux.Handle) -> dict[str, RankRouter]:
    return {path: router_at(handle, path) for path in adapter_of(handle).routers}


def biases(handle: loramux.Handle) -> dict[str, Tensor]:
    return {path: router.bias.clone() for path, router in routers(handle).items()}


def run(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, attention_mask=MASK).logits
