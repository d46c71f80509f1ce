"""X-LoRA (2402.07148): a classifier on the bare base's last hidden state scales N frozen LoRAs per token.

Letters: B samples, L tokens, N adapters, D width of the model, C linears with adapters.

Parameters: `Params(experts, layers)`
  experts  {module path: list over the N adapters of LowRank or None}, in the order of the classifier's linears
  layers   list of (weight [out, in], bias [out]) of the classifier, first to last

Pass 1  h = last hidden state of the model without adapters
        logits = linear(... relu(linear(h)) ...)    [B, L, N], or [B, L, C, N] with layerwise
        scalings = softmax(logits / T)
Pass 2  y = W0 x + bias + g sum_i s_i B_i A_i (scaling_i x)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oracles.lora import LowRank, low_rank_product
from oracles.surgery import base_weight, model_logits, replaced_forwards


class Params(NamedTuple):
    experts: Mapping[str, Sequence[LowRank | None]]
    layers: Sequence[tuple[Tensor, Tensor]]


class Config(NamedTuple):
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    temperature: float = 1.0
    layerwise: bool = False
    top_k: int | None = None
    global_weight: float = 1.0


def hidden_state(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """h [B, L, D] of the model as it is: call it without adapters."""
    output: Any = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=False,
        output_hidden_states=True,
    )
    return output.hidden_states[-1]


def classify(h: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    for number, (weight, bias) in enumerate(layers):
        h = h @ weight.T + bias
        if number + 1 < len(layers):
            h = h.clamp_min(0)
    return h


def scalings(h: Tensor, params: Params, config: Config) -> Tensor:
    """[B, L, C, N], C = 1 where all linears share one decision."""
    num = len(next(iter(params.experts.values())))
    count = len(params.experts) if config.layerwise else 1
    value = classify(h, params.layers).view(*h.shape[:-1], count, num)
    if config.enable_softmax:
        value = (value / config.temperature).softmax(-1)
    if config.top_k is None:
        return value
    kept = torch.zeros_like(value, dtype=torch.bool)
    kept.scatter_(-1, value.topk(config.top_k, dim=-1).indices, True)
    if config.enable_softmax_topk:
        value = value.masked_fill(~kept, -torch.inf).softmax(-1)
    return value * kept


def oracle_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    params: Params,
    config: Config,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits and the scalings; `given` [B, L, C, N] are used instead of the classifier's."""
    with torch.no_grad():
        h = hidden_state(model, input_ids, attention_mask)
    scale = scalings(h, params, config) if given is None else given

    def site_forward(number: int, site: str) -> Callable[[Tensor], Tensor]:
        W, bias = base_weight(model.get_submodule(site))

        def forward(x: Tensor) -> Tensor:
            own = scale[:, :, number if config.layerwise else 0]
            y = x @ W.T
            for i, expert in enumerate(params.experts[site]):
                if expert is not None:
                    mixed = low_rank_product(own[..., i, None] * x, expert)
                    y = y + config.global_weight * mixed
            return y if bias is None else y + bias

        return forward

    forwards = {site: site_forward(number, site) for number, site in enumerate(params.experts)}
    with replaced_forwards(model, forwards):
        return model_logits(model, input_ids, attention_mask), scale
