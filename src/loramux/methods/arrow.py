"""Arrow: each linear sends a token to the frozen LoRAs whose strongest input direction it points along; no training.

Ostapenko et al., Towards Modular LLMs by Building and Reusing a Library of LoRAs, ICML 2024, arXiv 2405.11157. Per
expert and linear the prototype p_i is the top right singular vector of its change s_i B_i^T A_i. For an input x:

    g_i = |x . p_i|                       a singular vector has no sign; nothing is normalised
    w   = softmax of g / T over the k largest
    y   = W0 x + sum_{i in top k} w_i s_i B_i^T A_i x

p is exact and cheap: with thin A^T = Q_A R_A and B^T = Q_B R_B it is Q_A v, v the top right singular vector of the
r x r matrix R_B R_A^T. (PEFT iterates 15 times from a random vector, which leaves an error where the first two singular
values are close.) Nothing is saved: prototypes are computed from the adapters whenever these are read.

Letters: N tokens, I input width, E experts, K chosen, r rank of an expert, O output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from loramux.core.bank import Rows
from loramux.core.frozen import FrozenConfig
from loramux.core.method import Method
from loramux.core.router import Router, RouteView, top_k_stable
from loramux.core.types import Route, Servability, Site
from loramux.core.values import check_positive, check_whole

USUAL_TOP_K = 3  # PEFT's; the authors' examples use 2 and 4


@dataclass(frozen=True, kw_only=True)
class ArrowConfig(FrozenConfig):
    """top_k: experts per token and linear; None is 3, or all where there are fewer."""

    method = "arrow"

    top_k: int | None = None
    router_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("router_temperature", self.router_temperature)
        if self.lora_dropout:
            raise ValueError("nothing is trained in Arrow: lora_dropout does not apply")
        if self.top_k is None:
            return
        check_whole("top_k", self.top_k)
        if self.adapters and self.top_k > len(self.adapters):
            raise ValueError(
                f"top_k must be in 1..{len(self.adapters)} (the adapters), got {self.top_k}"
            )


class Prototypes(Router):
    """Routes the tokens of one linear by their product with each expert's prototype."""

    scope: ClassVar[Literal["layer", "block", "site"]] = "site"
    when = "token"
    prototypes: Tensor

    def __init__(self, config: ArrowConfig):
        super().__init__()
        self.names = config.names
        self.top_k = min(USUAL_TOP_K, len(self.names)) if config.top_k is None else config.top_k
        self.temperature = config.router_temperature
        self.present: tuple[bool, ...] = ()

    def bind(self, rows: Rows) -> None:
        """Compute the prototypes of these rows, which are frozen. An adapter without rows here is never chosen."""
        if rows.magnitude is not None:
            raise ValueError(
                "Arrow over DoRA adapters is not defined: their change is not a product of two factors"
            )
        self.present = tuple(rank > 0 for rank in rows.spans.rank)
        found = [
            top_direction(rows.a[rows.slot_rows(slot)], rows.b[rows.slot_rows(slot)])
            for slot in range(rows.spans.num_slots)
        ]
        self.register_buffer("prototypes", torch.stack(found), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Prototypes:
        """Prototypes move with the model but keep their precision: `model.to(torch.bfloat16)` must not round them."""
        exact = getattr(self, "prototypes", None)
        super()._apply(fn, recurse)
        if exact is not None:
            self.prototypes = exact.to(self.prototypes.device)
        return self

    def forward(self, view: RouteView, incoming: Route) -> Route:
        wide = torch.float64 if view.x_ND.dtype == torch.float64 else torch.float32
        score_NE = (view.x_ND.to(wide) @ self.prototypes.to(wide).T).abs()
        logits_NE = score_NE / self.temperature
        k = self.top_k
        if view.mask_E is not None or not all(self.present):
            open_E = torch.tensor(self.present, device=logits_NE.device)
            open_E = open_E if view.mask_E is None else open_E & view.mask_E
            logits_NE = logits_NE.masked_fill(~open_E, float("-inf"))
            k = min(k, int(open_E.sum()))
        slot_NK = top_k_stable(logits_NE, k)
        weight_NK = logits_NE.gather(1, slot_NK).softmax(-1)
        view.record(
            columns=self.names, weight=weight_NK, slot=slot_NK, logits=logits_NE, valid=view.valid_N
        )
        return Route(slot=slot_NK, weight=weight_NK)


@torch.no_grad()
def top_direction(a_rI: Tensor, b_rO: Tensor) -> Tensor:
    """Top right singular vector of B^T A, unit length, fp32 [I]; zeros for an expert of rank 0."""
    if a_rI.shape[0] == 0:
        return torch.zeros(a_rI.shape[1], device=a_rI.device)
    q_Ir, upper_a = torch.linalg.qr(a_rI.double().T)
    upper_b = torch.linalg.qr(b_rO.double().T).R
    _, _, right = torch.linalg.svd(upper_b @ upper_a.T)
    direction_I: Tensor = q_Ir @ right[0]
    return direction_I.float()


class ArrowMethod(Method):
    name = "arrow"
    title = "Arrow"
    paper = "arXiv 2405.11157"
    granularity = "expert (frozen LoRAs)"
    routing_unit = "token"
    servability: Servability = "per_token"
    config_class = ArrowConfig
    needs_adapters = True
    trains_rows = False
    learns = False
    config: ArrowConfig

    def routers(self, sites: Sequence[Site]) -> dict[str, Router]:
        return {site.path: Prototypes(self.config) for site in sites}


METHOD = ArrowMethod
