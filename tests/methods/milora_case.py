"""A MiLoRA with the oracle's numbers: what the tests of the method share."""

from typing import Any

import torch
from torch import Tensor, nn

import loramux
from loramux.methods.milora import PromptRouter, Rational
from methods.bridge import adapter_of, build_double, by_layer, close, copy_milora
from oracles import milora
from oracles.random_params import layer_modules
from oracles.random_params import milora_params as random_params
from pico import build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29, 44], [90, 33, 12, 7, 70, 52, 9]])
PROMPT = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]).bool()
LABELS = IDS.masked_fill(PROMPT, -100)
RANK = 4


def attached(
    family: str = "llama", *, double: bool = False, dora: bool = False, **settings: Any
) -> tuple[nn.Module, loramux.Handle, milora.Params, tuple[str, ...]]:
    """A MiLoRA with random rows and routers, and the same for the oracle."""
    model = build_double(family) if double else build_pico(family)
    modules = layer_modules(model)
    params = random_params(model, RANK, dora=dora)
    config = loramux.MiLoRAConfig(r=RANK, use_dora=dora, **{"top_k": 3, **settings})
    handle = loramux.attach(model, config, backend="reference")
    if config.activation == "rational":
        copy_milora(handle, params, modules)
    else:
        _copy_without_activation(handle, params, modules)
    return model, handle, params, modules


def _copy_without_activation(
    handle: loramux.Handle, params: milora.Params, modules: tuple[str, ...]
) -> None:
    routers: Any = adapter_of(handle).routers
    for router in routers.values():
        router.activation = Rational()
    copy_milora(handle, params, modules)
    for router in routers.values():
        router.activation = None


def run(model: nn.Module, ids: Tensor = IDS, prompt: Tensor = PROMPT, **inputs: Any) -> Tensor:
    return model(input_ids=ids, prompt_mask=prompt, **inputs).logits


def oracle_of(family: str, params: milora.Params, modules: tuple[str, ...], **config: Any) -> Any:
    double = next(iter(params.experts.values())).A.dtype == torch.float64
    model = build_double(family) if double else build_pico(family)
    settings = milora.Config(modules=modules, **config)
    return milora.oracle_logits(model.requires_grad_(False), IDS, None, PROMPT, params, settings)


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "k1": ({"top_k": 1}, {"top_k": 1}),
    "prob": ({"gate": "prob"}, {"mode": "prob"}),
    "renorm": ({"gate": "renorm"}, {"mode": "renorm"}),
    "mean": ({"pooler": "mean"}, {"pooler": "mean"}),
    "last": ({"pooler": "last"}, {"pooler": "last"}),
    "max": ({"pooler": "max"}, {"pooler": "max"}),
    "gelu": ({"activation": "gelu"}, {"activation": "gelu"}),
    "relu": ({"activation": "relu"}, {"activation": "relu"}),
    "literal": ({"router_norm": "none"}, {"norm": "none"}),
}


def assert_is_oracle(family: str, name: str, *, double: bool, dora: bool) -> None:
    ours, theirs = CONFIGS[name]
    model, handle, params, modules = attached(family, double=double, dora=dora, **ours)
    got = run(model).detach()
    expected, details = oracle_of(family, params, modules, **theirs)
    close(got, expected.detach())
    records = handle.routing()
    close(by_layer(records, modules, "probs").detach(), details["p"].detach())
    close(by_layer(records, modules).detach(), details["gates"].detach())
    coefficient = 0.01
    close(handle.aux_losses()["default/balance"].detach(), coefficient * details["aux"].detach())


def routers_of(handle: loramux.Handle) -> list[PromptRouter]:
    found = list(adapter_of(handle).routers.values())
    assert all(isinstance(router, PromptRouter) for router in found)
    return found  # type: ignore[return-value]
