"""MoLE over a whole model: additive execution, and the exact (parallel) one as the reference.

Letters: B samples, L tokens, N experts. Layouts and units: see `oracles.mole`.

Additive runs every linear once and adds sum_i G_i E_i there. Parallel runs each unit's module
once bare and once per adapter, and mixes the differences of the module's outputs; its gate reads
these differences, so its e is [N*D, N] with D the width of the residual stream.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from oracles.lora import LowRank, adapted_linear
from oracles.mole import (
    Config,
    Granularity,
    Params,
    balance_floor,
    balance_loss,
    gate_weights,
    increments,
    mix,
)
from oracles.surgery import base_weight, decoder_layers, model_logits, replaced_forwards


def unit_of(site: str, granularity: Granularity, model: nn.Module) -> str:
    """The unit whose gate governs a linear."""
    if granularity == "matrix":
        return site
    if granularity == "network":
        return ""
    layer = next(path for path in decoder_layers(model) if site.startswith(path + "."))
    if granularity == "block":
        return layer
    return layer + "." + site.removeprefix(layer + ".").split(".")[0]


def oracle_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prompt_mask: Tensor | None,
    params: Params,
    config: Config,
    forced_gates: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Additive execution. Details: `{"gates": {unit: G}, "balance", "balance_excess"}`.

    G is [B, N], or [B, L, N] for pool="token". "balance" carries no alpha; "balance_excess" is
    balance - N log N. `prompt_mask` matters for pool="prompt_mean" only. `forced_gates`
    {unit: G} are used instead of the computed ones (frozen prompt gates, for instance).
    """
    valid, prompt = _masks(input_ids, attention_mask, prompt_mask)
    expert_mask = None if config.expert_mask is None else torch.tensor(config.expert_mask)
    gates: dict[str, Tensor] = dict(forced_gates or {})

    def site_forward(site: str) -> Callable[[Tensor], Tensor]:
        W, bias = base_weight(model.get_submodule(site))
        unit = unit_of(site, config.granularity, model)

        def forward(x: Tensor) -> Tensor:
            E = increments(x, W, params.experts[site])
            if unit not in gates:
                gates[unit] = gate_weights(
                    E,
                    params.gates[unit],
                    config.pool,
                    valid,
                    prompt,
                    expert_mask,
                    config.gate_input,
                )
            factor = len(E) if config.weight_sum == "N" else 1
            y = x @ W.T + (factor * mix(E, gates[unit])).to(x.dtype)
            return y if bias is None else y + bias

        return forward

    with replaced_forwards(model, {site: site_forward(site) for site in params.experts}):
        logits = model_logits(model, input_ids, attention_mask)
    return logits, _details(gates, valid)


def parallel_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prompt_mask: Tensor | None,
    params: Params,
    config: Config,
) -> tuple[Tensor, dict[str, Any]]:
    """Exact unit differences for granularity "layer" (sub-layer modules) or "block" (layers)."""
    if config.granularity not in ("layer", "block"):
        raise ValueError("parallel execution is for granularity 'layer' or 'block'")
    valid, prompt = _masks(input_ids, attention_mask, prompt_mask)
    expert_mask = None if config.expert_mask is None else torch.tensor(config.expert_mask)
    gates: dict[str, Tensor] = {}
    running: list[int | None] = [None]

    def site_forward(site: str) -> Callable[[Tensor], Tensor]:
        W, bias = base_weight(model.get_submodule(site))

        def forward(x: Tensor) -> Tensor:
            number = running[0]
            expert = None if number is None else params.experts[site][number]
            return adapted_linear(x, W, bias, expert)

        return forward

    def unit_forward(unit: str) -> Callable[..., Any]:
        run = model.get_submodule(unit).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            def output(number: int | None) -> Any:
                running[0] = number
                result = run(*args, **kwargs)
                running[0] = None
                return result

            base = output(None)
            E = [_hidden(output(i)) - _hidden(base) for i in range(num_experts)]
            G = gate_weights(
                E, params.gates[unit], config.pool, valid, prompt, expert_mask, config.gate_input
            )
            gates[unit] = G
            factor = num_experts if config.weight_sum == "N" else 1
            mixed = _hidden(base) + factor * mix(E, G)
            return (mixed, *base[1:]) if isinstance(base, tuple) else mixed

        return forward

    num_experts = len(next(iter(params.experts.values())))
    units = {unit_of(site, config.granularity, model): None for site in params.experts}
    forwards: dict[str, Callable[..., Any]] = {site: site_forward(site) for site in params.experts}
    forwards |= {unit: unit_forward(unit) for unit in units}
    with replaced_forwards(model, forwards):
        logits = model_logits(model, input_ids, attention_mask)
    return logits, _details(gates, valid)


def single_expert(params: Params, number: int) -> dict[str, LowRank]:
    """One adapter's experts in the layout of `oracles.lora.oracle_logits`."""
    chosen = {site: experts[number] for site, experts in params.experts.items()}
    return {site: expert for site, expert in chosen.items() if expert is not None}


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _masks(
    input_ids: Tensor, attention_mask: Tensor | None, prompt_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    everything = torch.ones_like(input_ids, dtype=torch.bool)
    valid = everything if attention_mask is None else attention_mask.bool()
    return valid, everything if prompt_mask is None else prompt_mask.bool()


def _details(gates: Mapping[str, Tensor], valid: Tensor) -> dict[str, Any]:
    balance = balance_loss(list(gates.values()), valid)
    num_experts = next(iter(gates.values())).shape[-1]
    return {
        "gates": dict(gates),
        "balance": balance,
        "balance_excess": balance - balance_floor(num_experts),
    }
