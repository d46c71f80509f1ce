"""X-LoRA: a classifier on the last hidden state of the bare base weighs frozen trained LoRAs, token by token.

Buehler and Buehler, X-LoRA: Mixture of Low-Rank Adapter Experts, APL Machine Learning 2(2) 026119, 2024, arXiv
2402.07148; names and defaults are PEFT's. With h the last hidden state of the base run without adapters:

    lambda = softmax( f(h) / T )                     f linear, or linear(2048), ReLU, dropout, ..., linear
    y      = W0 x + g sum_i lambda_i s_i B_i^T A_i x     at every linear; g = global_scaling_weight

So every forward costs two of the base. PEFT runs both over the whole sequence at every token; here each has its KV
cache (core/prepass.py). Only f trains; no gradient enters the first pass.

Letters: N tokens, D width of the model, E experts, C linears that hold experts (1 where all share one decision).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from loramux.core.frozen import FrozenConfig
from loramux.core.method import Method
from loramux.core.prepass import HiddenRouter
from loramux.core.router import Router, RouteView, top_k_stable
from loramux.core.types import Route, Servability, Site
from loramux.core.values import check_positive, check_share, check_whole


@dataclass(frozen=True, kw_only=True)
class XLoraConfig(FrozenConfig):
    """Names and defaults are PEFT's. layerwise_scalings: a decision per linear instead of one for all.

    top_k_lora keeps the k largest and zeroes the rest without rescaling; enable_softmax_topk takes the softmax over
    those k instead (enable_softmax must then be off).
    """

    method = "xlora"

    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    softmax_temperature: float = 1.0
    layerwise_scalings: bool = False
    top_k_lora: int | None = None
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    global_scaling_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("softmax_temperature", self.softmax_temperature)
        check_positive("global_scaling_weight", self.global_scaling_weight)
        check_share("xlora_dropout_p", self.xlora_dropout_p)
        for name in ("xlora_depth", "xlora_size"):
            check_whole(name, getattr(self, name))
        if self.enable_softmax and self.enable_softmax_topk:
            raise ValueError(
                "enable_softmax and enable_softmax_topk would take a softmax of a softmax; set enable_softmax=False"
            )
        if self.enable_softmax_topk and self.top_k_lora is None:
            raise ValueError(
                "enable_softmax_topk needs top_k_lora, the number of experts it is over"
            )
        if self.top_k_lora is not None:
            check_whole("top_k_lora", self.top_k_lora)
            if self.adapters and self.top_k_lora > len(self.adapters):
                raise ValueError(
                    f"top_k_lora must be in 1..{len(self.adapters)} (the adapters), got {self.top_k_lora}"
                )


class Classifier(HiddenRouter):
    """f and what follows it. `paths`: the linears that have a decision of their own, in the order of f's outputs."""

    def __init__(self, config: XLoraConfig, width: int, paths: Sequence[str]):
        super().__init__()
        self.config, self.names, self.paths = config, config.names, tuple(paths)
        sizes = [width, *[config.xlora_size] * (config.xlora_depth - 1)]
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(sizes):
            layers += [nn.Linear(d_in, d_out), nn.ReLU()]
            if config.xlora_dropout_p > 0:
                layers.append(nn.Dropout(config.xlora_dropout_p))
        layers.append(nn.Linear(sizes[-1], max(1, len(self.paths)) * len(self.names)))
        self.layers = nn.Sequential(*layers)

    def forward(self, view: RouteView, incoming: Route) -> Route:
        h_ND = view.x_ND.to(next(self.layers.parameters()).dtype)
        logits_NCE = self.layers(h_ND).unflatten(-1, (-1, len(self.names)))
        logits_NCE = logits_NCE.to(torch.promote_types(logits_NCE.dtype, torch.float32))
        weight_NCE = self._weigh(logits_NCE, view.mask_E)
        shown = weight_NCE.mean(1)  # of all linears, where they differ
        view.record(
            columns=self.names,
            weight=shown,
            probs=shown,
            logits=logits_NCE.mean(1),
            valid=view.valid_N,
        )
        weight_NCE = weight_NCE * self.config.global_scaling_weight
        return Route(weight=weight_NCE if self.paths else weight_NCE[:, 0])

    def spread(self, route: Route) -> Mapping[str, Route]:
        assert route.weight is not None
        return {path: Route(weight=route.weight[:, at]) for at, path in enumerate(self.paths)}

    def _weigh(self, logits_NCE: Tensor, mask_E: Tensor | None) -> Tensor:
        config = self.config
        low = float("-inf")
        if mask_E is not None:
            logits_NCE = logits_NCE.masked_fill(~mask_E, low)
        score_NCE = logits_NCE
        if config.enable_softmax:
            score_NCE = (logits_NCE / config.softmax_temperature).softmax(-1)
        if config.top_k_lora is not None:
            best_MK = top_k_stable(score_NCE.flatten(0, 1), config.top_k_lora)
            kept_NCE = torch.zeros_like(score_NCE, dtype=torch.bool)
            kept_NCE.flatten(0, 1).scatter_(1, best_MK, True)
            if config.enable_softmax_topk:
                score_NCE = score_NCE.masked_fill(~kept_NCE, low).softmax(-1)
            score_NCE = score_NCE.masked_fill(~kept_NCE, 0.0)
        return score_NCE if mask_E is None else score_NCE.masked_fill(~mask_E, 0.0)


class XLoraMethod(Method):
    name = "xlora"
    title = "X-LoRA"
    paper = "arXiv 2402.07148"
    granularity = "expert (frozen LoRAs)"
    routing_unit = "token"
    servability: Servability = "per_token"
    config_class = XLoraConfig
    default_learning_rate = 1e-3  # ours: no value found
    needs_adapters = True
    trains_rows = False
    config: XLoraConfig

    def __init__(self, config: XLoraConfig):
        super().__init__(config)
        self._first = ""

    def routers(self, sites: Sequence[Site]) -> dict[str, Router]:
        """One classifier, kept under the first layer that holds experts."""
        self._first = sites[0].layer_path
        own = [site.path for site in sites] if self.config.layerwise_scalings else []
        return {self._first: Classifier(self.config, sites[0].d_model, own)}

    def governor_of(self, site: Site) -> str | None:
        return site.path if self.config.layerwise_scalings else self._first


METHOD = XLoraMethod
