"""RAMoLE (arXiv 2406.16989): a RouterLoRA weighs the retrieved LoRAs by an attention over their outputs.

Letters: B samples, L tokens, K retrieved LoRAs, P LoRAs of the whole batch, I / O input / output width, r LoRA rank,
Q router rank.

Linear  v_i = s_i B_i A_i x;  q = A_r x;  k_i = B_r^T v_i;  e_i = q . k_i / sqrt(Q) * logit_scale
        a = softmax over the LoRAs that have the linear;  y = W0 x + bias + sum_i a_i v_i   (none has it: W0 x + bias)

Every v_i is built O wide here, as the paper writes it. `gathered` is its batch form (Eq. 14, 15), `masked` the union
of the batch's LoRAs with -inf at those that a sample did not retrieve.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from oracles.lora import LowRank, low_rank_product
from oracles.surgery import base_weight, model_logits, replaced_forwards


class Router(NamedTuple):
    A: Tensor  # [Q, I]
    B: Tensor  # [O, Q]


class Config(NamedTuple):
    logit_scale: float = 1.0
    null_expert: bool = False
    normalise_keys: bool = False


PLAIN = Config()


def attention(
    x: Tensor, V: Tensor, router: Router, is_open: Tensor | None = None, config: Config = PLAIN
) -> Tensor:
    """Weights [K, ...] from values V [K, ..., O]; `is_open` broadcasts over them."""
    keys = V / (V.square().mean(-1, keepdim=True) + 1e-8).sqrt() if config.normalise_keys else V
    e = ((x @ router.A.T) * (keys @ router.B)).sum(-1) / router.A.shape[0] ** 0.5
    e = e * config.logit_scale
    if is_open is not None:
        e = e.masked_fill(~is_open, -torch.inf)
    if config.null_expert:
        return torch.cat([e, torch.zeros_like(e[:1])]).softmax(0)[:-1]
    return e.softmax(0)


def mixed(
    x: Tensor, experts: Sequence[LowRank | None], router: Router, config: Config = PLAIN
) -> tuple[Tensor, Tensor]:
    """(sum_i a_i v_i [B, L, O], a [B, L, K]) of one set for all samples; None: the LoRA leaves the linear out."""
    nothing = x.new_zeros(*x.shape[:-1], router.B.shape[0])
    if not any(expert is not None for expert in experts):
        return nothing, x.new_zeros(*x.shape[:-1], len(experts))
    V = torch.stack([nothing if e is None else low_rank_product(x, e) for e in experts])
    has = torch.tensor([e is not None for e in experts]).view(-1, 1, 1)
    a = attention(x, V, router, has, config)
    return (a[..., None] * V).sum(0), a.movedim(0, -1)


def gathered(
    x: Tensor, pool: Sequence[LowRank], chosen: Sequence[Sequence[int]], router: Router
) -> Tensor:
    """x [B, L, I]; chosen[b]: the K LoRAs of sample b. Ranks are padded with zeros, scales folded into B."""
    rank = max(expert.A.shape[0] for expert in pool)
    padded = [
        (
            nn.functional.pad(e.A, (0, 0, 0, rank - e.A.shape[0])),
            nn.functional.pad(e.scale * e.B, (0, rank - e.B.shape[1])),
        )
        for e in pool
    ]
    A = torch.stack([torch.stack([padded[i][0] for i in row]) for row in chosen])  # B K r I
    B = torch.stack([torch.stack([padded[i][1] for i in row]) for row in chosen])  # B K O r
    V = torch.einsum("bkor,bkri,bli->kblo", B, A, x)
    a = attention(x, V, router)
    return (a[..., None] * V).sum(0)


def masked(
    x: Tensor, pool: Sequence[LowRank], chosen: Sequence[Sequence[int]], router: Router
) -> Tensor:
    V = torch.stack([low_rank_product(x, expert) for expert in pool])  # P B L O
    is_open = torch.tensor([[i in row for row in chosen] for i in range(len(pool))])
    a = attention(x, V, router, is_open[..., None])
    return (a[..., None] * V).sum(0)


def oracle_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    experts: Mapping[str, Sequence[LowRank | None]],
    routers: Mapping[str, Router],
    config: Config = PLAIN,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the weights [B, L, K] at every linear."""
    weights: dict[str, Tensor] = {}

    def site_forward(site: str) -> Callable[[Tensor], Tensor]:
        W, bias = base_weight(model.get_submodule(site))

        def forward(x: Tensor) -> Tensor:
            change, weights[site] = mixed(x, experts[site], routers[site], config)
            y = x @ W.T + change
            return y if bias is None else y + bias

        return forward

    with replaced_forwards(model, {site: site_forward(site) for site in experts}):
        return model_logits(model, input_ids, attention_mask), weights
