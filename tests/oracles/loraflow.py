"""LoRA-Flow (ACL 2024): a gate per decoder layer weighs N frozen LoRAs at every token.

Letters: B samples, L tokens, N adapters, D width of what a gate reads, I / O input / output width of a linear.

Parameters: `Params(experts, gates)`
  experts  {module path: list over the N adapters of LowRank or None (adapter lacks the site)}
  gates    {unit: Gate(W [N, D], b [N])}
A unit is named by granularity: "layer" the path of the decoder layer, "module" that of the linear, "step" the path of
the first decoder layer.

Gate    w = softmax(W x / T) + b          the bias is outside: sum w = 1 + sum b
Linear  y = W0 u + bias + sum_i w_i s_i B_i A_i u
x is the residual stream as it enters the layer, before any norm ("module": the linear's own input).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from oracles.lora import LowRank, low_rank_product
from oracles.surgery import (
    at_least_float32,
    base_weight,
    decoder_layers,
    model_logits,
    replaced_forwards,
)

Granularity = Literal["layer", "module", "step"]


class Gate(NamedTuple):
    W: Tensor
    b: Tensor


class Params(NamedTuple):
    experts: Mapping[str, Sequence[LowRank | None]]
    gates: Mapping[str, Gate]


class Config(NamedTuple):
    granularity: Granularity = "layer"
    temperature: float = 1.0
    bias_inside: bool = False


def initial_gate(start: Sequence[float], width: int) -> Gate:
    """W = 0 and b = c - 1/N: the weights are c whatever is read."""
    num = len(start)
    return Gate(torch.zeros(num, width), torch.tensor(start) - 1 / num)


def gate_weights(x: Tensor, gate: Gate, config: Config) -> Tensor:
    """w [..., N] of x [..., D]."""
    score = at_least_float32(x) @ gate.W.T / config.temperature
    if config.bias_inside:
        return (score + gate.b).softmax(-1)
    return score.softmax(-1) + gate.b


def fused_linear(
    u: Tensor, W: Tensor, bias: Tensor | None, experts: Sequence[LowRank | None], w: Tensor
) -> Tensor:
    """One linear, adapter by adapter."""
    y = u @ W.T
    for number, expert in enumerate(experts):
        if expert is not None:
            y = y + (w[..., number, None] * low_rank_product(u, expert)).to(y.dtype)
    return y if bias is None else y + bias


def oracle_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    params: Params,
    config: Config,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and w [B, L, N] of every unit."""
    layers = decoder_layers(model)
    first = next(iter(layers))
    weights: dict[str, Tensor] = {}

    def layer_of(site: str) -> str:
        return next(path for path in layers if site.startswith(path + "."))

    def site_forward(site: str) -> Callable[[Tensor], Tensor]:
        W, bias = base_weight(model.get_submodule(site))

        def forward(u: Tensor) -> Tensor:
            if config.granularity == "module":
                weights[site] = gate_weights(u, params.gates[site], config)
            unit = {"module": site, "layer": layer_of(site), "step": first}[config.granularity]
            return fused_linear(u, W, bias, params.experts[site], weights[unit])

        return forward

    def layer_forward(path: str) -> Callable[..., Any]:
        run = model.get_submodule(path).forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if path in params.gates:
                weights[path] = gate_weights(x, params.gates[path], config)
            return run(x, *args, **kwargs)

        return forward

    forwards: dict[str, Callable[..., Any]] = {s: site_forward(s) for s in params.experts}
    forwards |= {path: layer_forward(path) for path in layers}
    with replaced_forwards(model, forwards):
        return model_logits(model, input_ids, attention_mask), weights


def parameter_count(num_gates: int, num_adapters: int, width: int) -> int:
    """L k (d + 1)."""
    return num_gates * num_adapters * (width + 1)
