"""MiLoRA (Findings of EMNLP 2024): whole LoRA modules are experts, chosen per layer and prompt.

Letters: B prompts, T tokens, D width, L layers, N LoRA modules of a layer, K of them active.

Parameters: `Params(experts, routers)`
  experts  {module path: LowRank}, e.g. "model.layers.0.self_attn.q_proj"; see `oracles.lora`
  routers  {layer path: Router(W_sa [D], W_r [D, N], a [7], b [5])}, e.g. "model.layers.0"
Column i of W_r, p and the gates belongs to `Config.modules[i]`, a path relative to the layer.

Layer rule, H [B, T, D] the layer's input before its first norm (Eq. 1, 3, 6, 8):
  A = softmax over prompt positions of H W_sa;  h = A^T H;  p = softmax(Ra(norm(h)) W_r)
  y = x W_m + bias_m + g_m s (x A_m) B_m for every token of the sample, prompt and response
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracles.lora import LowRank, increment
from oracles.surgery import (
    at_least_float32,
    base_weight,
    decoder_layers,
    model_logits,
    replaced_forwards,
)

# A least-squares fit to GELU on [-3, 3]; not from the paper, which gives only degrees 6 and 5.
GELU_A = (2.812e-05, 0.5, 0.39850089, 0.16236861, 0.06410833, 0.01833195, 0.00210176)
GELU_B = (0.0, 0.32473722, 0.0, 0.03666389, 0.0)

Mode = Literal["ste", "prob", "renorm"]
Pooler = Literal["attention", "mean", "last", "max"]


class Router(NamedTuple):
    W_sa: Tensor
    W_r: Tensor
    a: Tensor
    b: Tensor


class Params(NamedTuple):
    experts: Mapping[str, LowRank]
    routers: Mapping[str, Router]


class Config(NamedTuple):
    modules: tuple[str, ...]
    top_k: int = 3
    mode: Mode = "ste"
    pooler: Pooler = "attention"
    activation: Literal["rational", "gelu", "relu"] = "rational"
    norm: Literal["none", "rms"] = "rms"
    norm_at: Literal["pooled", "tokens"] = "pooled"  # the specification leaves the place open
    norm_eps: float = 1e-6
    reduction: Literal["sum", "mean"] = "sum"  # of the balance loss over layers


def rational(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Version B: sum_j a_j x^j / (1 + |sum_i b_i x^i|), j = 0..6, i = 1..5; 1 ends the range."""
    numerator = sum(a[j] * x**j for j in range(7))
    return numerator / rational_denominator(x, b)


def rational_denominator(x: Tensor, b: Tensor) -> Tensor:
    return 1 + sum(b[i - 1] * x**i for i in range(1, 6)).abs()


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def attention_pool_weights(H: Tensor, W_sa: Tensor, prompt_mask: Tensor) -> Tensor:
    """Softmax of H W_sa over the prompt positions: [B, T], zero elsewhere."""
    scores = H @ W_sa
    return scores.masked_fill(~prompt_mask, -torch.inf).softmax(dim=1)


def pool(H: Tensor, prompt_mask: Tensor, pooler: Pooler, W_sa: Tensor | None = None) -> Tensor:
    """One vector per prompt: [B, D]. Positions outside the prompt are never read."""
    prompts = [H[i][prompt_mask[i]] for i in range(H.shape[0])]
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a sample has no prompt position; routing needs at least one per sample")
    if pooler == "attention":
        assert W_sa is not None
        return torch.stack([((h @ W_sa).softmax(0)[:, None] * h).sum(0) for h in prompts])
    reduce: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda h: h.mean(0),
        "last": lambda h: h[-1],
        "max": lambda h: h.amax(0),
    }
    return torch.stack([reduce[pooler](prompt) for prompt in prompts])


def probabilities(H: Tensor, prompt_mask: Tensor, router: Router, config: Config) -> Tensor:
    """p [B, N] of one layer from its input H [B, T, D]."""
    H = at_least_float32(H)
    if config.norm == "rms" and config.norm_at == "tokens":
        H = rms_normalise(H, config.norm_eps)
    h = pool(H, prompt_mask, config.pooler, router.W_sa)
    if config.norm == "rms" and config.norm_at == "pooled":
        h = rms_normalise(h, config.norm_eps)
    activate: dict[str, Callable[[Tensor], Tensor]] = {
        "rational": lambda v: rational(v, router.a, router.b),
        "gelu": F.gelu,
        "relu": F.relu,
    }
    return (activate[config.activation](h) @ router.W_r).softmax(-1)


def top_k_mask(p: Tensor, k: int) -> Tensor:
    """1.0 at the k largest of the last axis, else 0.0; a tie goes to the lower index."""
    order = p.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(p).scatter(-1, order[..., :k], 1.0)


def gates(p: Tensor, k: int, mode: Mode = "ste") -> Tensor:
    """ste: ones with the gradient of p;  prob: p itself;  renorm: k p / (sum of selected p)."""
    hard = top_k_mask(p, k)
    if mode == "ste":
        # The brackets matter: (1 + p) - p is not exactly one in floating point.
        return hard * (1 + (p - p.detach()))
    if mode == "prob":
        return hard * p
    if mode == "renorm":
        return hard * p * k / (hard * p).sum(-1, keepdim=True)
    raise ValueError(f"gate mode {mode!r}; choose 'ste', 'prob' or 'renorm'")


def balance_loss(p: Tensor) -> Tensor:
    """Eq. 4-5 of one layer, p [B, N]: N sum_i f_i phat_i, f the share of argmax, no gradient."""
    num_prompts, num_experts = p.shape
    top = p.argmax(-1)
    f = torch.stack([(top == i).sum() / num_prompts for i in range(num_experts)]).to(p.dtype)
    return num_experts * (f.detach() * p.mean(0)).sum()


def gated_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, expert: LowRank, gate: Tensor
) -> Tensor:
    """x [B, T, I], gate [B]. A DoRA expert contributes its whole increment, so gate 0 is base."""
    y = x @ W.T
    y = y + (gate[:, None, None] * increment(x, W, expert)).to(y.dtype)
    return y if bias is None else y + bias


def oracle_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prompt_mask: Tensor,
    params: Params,
    config: Config,
    forced_gates: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and `{"p": [B, L, N], "gates": [B, L, N], "balance": [L], "aux": scalar}`.

    `forced_gates` [B, L, N] replaces the routers' choice (p is still computed and reported).
    The weight lambda_lb is not applied to "aux".
    """
    layers = decoder_layers(model)
    seen_p: dict[str, Tensor] = {}
    used: dict[str, Tensor] = {}
    forwards: dict[str, Callable[..., Any]] = {}
    for index, (path, layer) in enumerate(layers.items()):
        forced = None if forced_gates is None else forced_gates[:, index]
        forwards[path] = _routed_layer(
            path, layer, prompt_mask, params, config, forced, seen_p, used
        )
        for column, name in enumerate(config.modules):
            site = f"{path}.{name}"
            if site in params.experts:
                module, expert = model.get_submodule(site), params.experts[site]
                forwards[site] = _gated_forward(module, expert, used, path, column)
    with replaced_forwards(model, forwards):
        logits = model_logits(model, input_ids, attention_mask)
    balance = torch.stack([balance_loss(seen_p[path]) for path in layers])
    details = {
        "p": torch.stack([seen_p[path] for path in layers], dim=1),
        "gates": torch.stack([used[path] for path in layers], dim=1),
        "balance": balance,
        "aux": balance.sum() if config.reduction == "sum" else balance.mean(),
    }
    return logits, details


def _routed_layer(
    path: str,
    layer: nn.Module,
    prompt_mask: Tensor,
    params: Params,
    config: Config,
    forced: Tensor | None,
    seen_p: dict[str, Tensor],
    used: dict[str, Tensor],
) -> Callable[..., Any]:
    run_layer = layer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen_p[path] = probabilities(hidden_states, prompt_mask, params.routers[path], config)
        used[path] = gates(seen_p[path], config.top_k, config.mode) if forced is None else forced
        return run_layer(hidden_states, *args, **kwargs)

    return forward


def _gated_forward(
    module: nn.Module, expert: LowRank, used: Mapping[str, Tensor], layer: str, column: int
) -> Callable[[Tensor], Tensor]:
    W, bias = base_weight(module)
    return lambda x: gated_linear(x, W, bias, expert, used[layer][:, column])


def parameter_count(
    shapes: list[tuple[int, int]], width: int, layers: int, rank: int
) -> dict[str, int]:
    """Trainable parameters by part; `shapes` are the (in, out) of one layer's modules."""
    return {
        "lora": layers * sum(rank * (i + o) for i, o in shapes),
        "routers": layers * width * len(shapes),
        "poolers": layers * width,
        "rational": layers * (len(GELU_A) + len(GELU_B)),
    }
