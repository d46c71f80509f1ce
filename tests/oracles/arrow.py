"""Arrow (ICML 2024): every linear routes every token to the LoRAs whose top input direction it points along.

Letters: B samples, L tokens, N adapters, I / O input / output width.

Prototype  p_i = top right singular vector of the whole matrix B_i A_i, unit length, sign free
Gate       g_i = |x . p_i|; softmax(g / T) over the k largest, 0 elsewhere; an adapter without the site is never chosen
Linear     y = W0 x + bias + sum_i w_i s_i B_i A_i x, every adapter computed (dense)
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from oracles.lora import LowRank, low_rank_product
from oracles.surgery import base_weight, model_logits, replaced_forwards


def prototype(expert: LowRank) -> Tensor:
    """[I], from the dense product."""
    return torch.linalg.svd(expert.B.double() @ expert.A.double()).Vh[0].to(expert.A.dtype)


def coefficients(
    x: Tensor, experts: Sequence[LowRank | None], k: int, temperature: float = 1.0
) -> Tensor:
    """w [..., N]."""
    columns = [
        torch.full_like(x[..., 0], -torch.inf) if e is None else (x @ prototype(e)).abs()
        for e in experts
    ]
    score = torch.stack(columns, dim=-1)
    kept = torch.full_like(score, -torch.inf)
    best = score.topk(min(k, sum(e is not None for e in experts)), dim=-1)
    return (kept.scatter(-1, best.indices, best.values) / temperature).softmax(-1)


def oracle_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    experts: Mapping[str, Sequence[LowRank | None]],
    k: int,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and w [B, L, N] at every site."""
    weights: dict[str, Tensor] = {}

    def site_forward(site: str) -> Callable[[Tensor], Tensor]:
        W, bias = base_weight(model.get_submodule(site))

        def forward(x: Tensor) -> Tensor:
            weights[site] = coefficients(x, experts[site], k, temperature)
            y = x @ W.T
            for number, expert in enumerate(experts[site]):
                if expert is not None:
                    y = y + weights[site][..., number, None] * low_rank_product(x, expert)
            return y if bias is None else y + bias

        return forward

    with replaced_forwards(model, {site: site_forward(site) for site in experts}):
        return model_logits(model, input_ids, attention_mask), weights
