"""MixLoRA over a whole model, and its auxiliary losses in the paper's and the code's form.

Letters: B samples, T tokens, N experts, K experts per token, D width.

Parameters: `Params(linears, routers, experts)`
  linears  {module path: LowRank}: ordinary LoRA (attention), e.g. "model.layers.0.self_attn.q_proj"
  routers  {FFN path: G [N, D]}, e.g. "model.layers.0.mlp"
  experts  {FFN path: list over experts of {linear name inside the FFN: LowRank}}
An FFN without a router stays the base FFN (sparse_step: every n-th layer only).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from oracles.lora import LowRank, adapted_forward
from oracles.mixlora import (
    Expert,
    Ffn,
    Route,
    ffn_naive,
    read_ffn,
    route_switch,
    route_top_k,
    route_top_p,
    router_logits,
)
from oracles.surgery import model_logits, replaced_forwards


class Params(NamedTuple):
    linears: Mapping[str, LowRank]
    routers: Mapping[str, Tensor]
    experts: Mapping[str, Sequence[Expert]]


class Config(NamedTuple):
    strategy: Literal["mixlora", "mixlora-dynamic", "mixlora-switch"] = "mixlora"
    top_k: int = 2
    top_p: float = 0.8
    renormalise: bool = False  # of the top-p weights
    temperature: float = 0.0
    divide: Literal["logits", "probabilities"] = "logits"
    capacity: int | None = None  # of the switch; None outside training
    multiply: bool = False  # switch: weight p instead of one
    act: Callable[[Tensor], Tensor] | None = None  # None: the model's own


# -- auxiliary losses: coefficients are not applied ------------------------------------------------


def kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of [T, ...] where mask [T] is true; all without a mask."""
    return values if mask is None else values[mask]


def balance_paper(p: Tensor, mask: Tensor | None = None) -> Tensor:
    """N sum_i F_i P_i, F the share of tokens whose argmax is i. Balanced value 1."""
    p = kept(p, mask)
    top = torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype)
    return p.shape[-1] * (top.mean(0) * p.mean(0)).sum()


def balance_code(p: Tensor, selected: Tensor, mask: Tensor | None = None) -> Tensor:
    """N sum_k sum_i f_ki P_i over the selected sets. Balanced value K (divide by K for one).

    The K slots need no separate sum: sum_k f_ki is the share of tokens that selected i.
    """
    p, selected = kept(p, mask), kept(selected, mask)
    return p.shape[-1] * (selected.to(p.dtype).mean(0) * p.mean(0)).sum()


def z_loss(z: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(z)^2."""
    return kept(z, mask).logsumexp(-1).pow(2).mean()


def aux_losses(routes: Sequence[Route], mask: Tensor | None, k: int = 1) -> dict[str, Tensor]:
    """All forms over the layers' routes; `mask` [B*T] true on real tokens, None to count all.

    paper               mean over layers of the argmax form
    code_per_layer      mean over layers of the selected-set form, divided by k
    code_pooled         the released form: all layers' tokens concatenated, not divided
    z                   mean over layers
    """
    pooled_mask = None if mask is None else mask.repeat(len(routes))
    return {
        "paper": torch.stack([balance_paper(r.p, mask) for r in routes]).mean(),
        "code_per_layer": torch.stack([balance_code(r.p, r.selected, mask) for r in routes]).mean()
        / k,
        "code_pooled": balance_code(
            torch.cat([r.p for r in routes]), torch.cat([r.selected for r in routes]), pooled_mask
        ),
        "z": torch.stack([z_loss(r.z, mask) for r in routes]).mean(),
    }


# -- the model -------------------------------------------------------------------------------------


def route_rows(z: Tensor, config: Config, sequence: Tensor, token_mask: Tensor | None) -> Route:
    """Router logits [rows, N] -> Route by the configured strategy."""
    if config.strategy == "mixlora":
        return route_top_k(z, config.top_k)
    if config.strategy == "mixlora-dynamic":
        return route_top_p(
            z,
            config.top_p,
            renormalise=config.renormalise,
            temperature=config.temperature,
            divide=config.divide,
        )
    return route_switch(
        z,
        capacity=config.capacity,
        sequence=sequence,
        token_mask=token_mask,
        multiply=config.multiply,
    )


def oracle_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    params: Params,
    config: Config,
) -> tuple[Tensor, dict[str, Any]]:
    """Logits [B, T, vocabulary] and details.

    `{"routes": {FFN path: Route over B*T rows}, "aux": aux_losses with padding masked,
    "aux_unmasked": the same over all rows}`. Rows are (sample, token), token fastest.
    """
    num_samples, num_tokens = input_ids.shape
    token_mask = None if attention_mask is None else attention_mask.bool().reshape(-1)
    sequence = torch.arange(num_samples).repeat_interleave(num_tokens)
    routes: dict[str, Route] = {}

    def block(path: str, ffn: Ffn) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            z = router_logits(rows, params.routers[path])
            routes[path] = route_rows(z, config, sequence, token_mask)
            y = ffn_naive(rows, ffn, params.experts[path], routes[path])
            return y.reshape(x.shape)

        return forward

    forwards: dict[str, Callable[..., Any]] = {}
    for path in params.routers:
        ffn = read_ffn(model.get_submodule(path))
        forwards[path] = block(path, ffn if config.act is None else ffn._replace(act=config.act))
    for path, expert in params.linears.items():
        forwards[path] = adapted_forward(model.get_submodule(path), expert)
    with replaced_forwards(model, forwards):
        logits = model_logits(model, input_ids, attention_mask)
    ordered = [routes[path] for path in params.routers]
    k = config.top_k if config.strategy == "mixlora" else 1
    details = {
        "routes": routes,
        "aux": aux_losses(ordered, token_mask, k),
        "aux_unmasked": aux_losses(ordered, None, k),
    }
    return logits, details


def parameter_count(
    width: int, inner: int, layers: int, rank: int, num_experts: int
) -> dict[str, int]:
    """Trainable parameters of a Llama-shaped model with all seven projections adapted."""
    return {
        "attention": layers * rank * 8 * width,
        "experts": layers * num_experts * 3 * rank * (width + inner),
        "routers": layers * num_experts * width,
    }
