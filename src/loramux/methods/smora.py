"""SMoRA: every rank of one LoRA is an expert; a router at each linear activates k of its r ranks per token.

Zhao et al., Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning,
arXiv 2501.15103. At a linear with rows A [r, d_in], B [r, d_out], router W [U, d_in] and bias b [U], where a unit is
rho = rank_partition neighbouring ranks, so U = r / rho and k / rho units are chosen:

    z = sigmoid(W x) in fp32 ;  M = top-(k / rho) of z + b
    g = (k / rho) z / sum_M z on M, 0 elsewhere        the mean gate of the chosen is 1
    y = W0 x + (alpha / k) B^T (g * (A x))

b gets no gradient: once per optimizer step b += u sign(mean(count) - count), count[j] = tokens whose M holds j. It
moves between forward passes, never inside one: backward may compute layers again and must choose the same M. It
balances the choice and, unlike the released code's, does not enter g (`gate_from_biased=True` for the released rule).

Letters: N tokens, D width of the linear's input, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from loramux.core.bank import init_a
from loramux.core.controller import Controller, Edit, Moment
from loramux.core.method import Method, MethodConfig
from loramux.core.router import Router, RouteView, top_k_mask
from loramux.core.types import Expert, Route, RouteRecord, Site
from loramux.core.values import check_not_negative, check_whole

LEAST_TOTAL = 1e-6  # of the chosen scores; biased ones may sum to nothing
NORMAL_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class SMoRAConfig(MethodConfig):
    """Defaults are the released code's (r 64, 8 active, alpha 16, sigmoid, u 1e-5), but for the two named below.

    activate_r: ranks active per token (k). rank_partition: ranks per routed unit (rho). bias_step: u. The scale is
    alpha / activate_r (with rsLoRA alpha / sqrt(activate_r)), whatever r is.
    update_every: "step" moves the bias once per optimizer step, from all its micro-batches; "forward", as released, in
    every forward pass, when the next one starts. gate_from_biased: True, as released, lets the bias into the gate.
    """

    method = "smora"

    r: int = 64
    activate_r: int = 8
    rank_partition: int = 1
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    gate_from_biased: bool = False
    bias_step: float = 1e-5
    update_every: Literal["step", "forward"] = "step"
    router_init: Literal["linear", "normal"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("activate_r", "rank_partition"):
            check_whole(name, getattr(self, name))
        check_not_negative("bias_step", self.bias_step)
        for r in (self.r, *self.rank_pattern.values()):
            if self.activate_r > r:
                raise ValueError(
                    f"activate_r must be at most the rank of every linear, got activate_r={self.activate_r} and a rank "
                    f"of {r}; lower activate_r or raise r"
                )
        for name, value in (("activate_r", self.activate_r), ("r", self.r), *_named(self)):
            if value % self.rank_partition:
                raise ValueError(
                    f"{name} must be a multiple of rank_partition ({self.rank_partition}), got {value}: whole units of "
                    "neighbouring ranks are chosen"
                )
        if self.use_dora:
            raise ValueError("SMoRA's experts are single ranks, for which DoRA is not defined")
        if self.init_lora_weights == "gaussian":
            raise ValueError(
                "init_lora_weights='gaussian' divides by an expert's rank, which is 1 here; leave it at True"
            )

    @property
    def num_chosen(self) -> int:
        """Units chosen per token."""
        return self.activate_r // self.rank_partition


def _named(config: SMoRAConfig) -> list[tuple[str, int]]:
    return [(f"rank_pattern[{key!r}]", rank) for key, rank in config.rank_pattern.items()]


class RankRouter(Router):
    """One per linear: scores its units, and carries the balance bias, which is no parameter."""

    scope: ClassVar[Literal["layer", "block", "site"]] = "site"
    when = "token"
    counted = "counts"
    bias: Tensor

    def __init__(self, config: SMoRAConfig, d_in: int, num_units: int):
        super().__init__()
        self.config = config
        # What nn.Linear starts with is uniform in +-1/sqrt(d_in), as A does.
        is_normal = config.router_init == "normal"
        weight = torch.randn(num_units, d_in) * NORMAL_STD if is_normal else init_a(num_units, d_in)
        self.weight = nn.Parameter(weight)
        self.register_buffer("bias", torch.zeros(num_units))
        self.names = tuple(str(unit) for unit in range(num_units))
        self.counts: Tensor | None = None  # tokens per unit since the bias moved last
        self._stepped_from: int | None = None  # version of the weights at the last backward pass

    def forward(self, view: RouteView, incoming: Route) -> Route:
        if view.training and not view.recomputed:
            self._settle()
        wide = torch.float64 if view.x_ND.dtype == torch.float64 else torch.float32
        logits_NU = view.x_ND.to(wide) @ self.weight.to(wide).T
        if logits_NU.requires_grad:
            logits_NU.register_hook(self._note_backward)
        gate_NU, z_NU = self.gates(logits_NU)
        view.record(
            columns=self.names,
            weight=gate_NU,
            probs=z_NU.detach(),
            valid=view.valid_N,
            request=view.request_N,
            tasks=view.tasks,
        )
        # Every unit is weighed, those not chosen with 0: what acts is one product over all ranks.
        return Route(weight=gate_NU)

    def gates(self, logits_NU: Tensor) -> tuple[Tensor, Tensor]:
        """(gates [N, U], exact zeros off the chosen units; scores [N, U])."""
        config = self.config
        z_NU = logits_NU.sigmoid() if config.score == "sigmoid" else logits_NU.softmax(-1)
        biased_NU = z_NU + self.bias.to(z_NU.dtype)
        mask_NU = top_k_mask(biased_NU, config.num_chosen)
        kept_NU = (biased_NU if config.gate_from_biased else z_NU) * mask_NU
        total_N1 = kept_NU.sum(-1, keepdim=True).clamp_min(LEAST_TOTAL)
        return kept_NU * (config.num_chosen / total_N1), z_NU

    # --- Balance ------------------------------------------------------------------------------------

    def _note_backward(self, _: Tensor) -> None:
        self._stepped_from = self.weight._version

    def _settle(self) -> None:
        """Balance what is due. The loops of others tell nobody of a step, but it changes the weights in place."""
        before = self._stepped_from
        # Fused optimizers write past autograd and change no version; what clears the gradients gives them away.
        stepped = before is not None and (
            self.weight.grad is None or self.weight._version != before
        )
        if stepped or self.config.update_every == "forward":
            self.balance()
        if stepped:
            self._stepped_from = None

    def observed(self, record: RouteRecord) -> None:
        """Count one forward pass of training, padding left out."""
        assert record.valid is not None
        own_U = ((record.weight.detach() != 0) & record.valid.unsqueeze(1)).sum(0)
        self.counts = own_U if self.counts is None else self.counts + own_U

    @torch.no_grad()
    def balance(self) -> None:
        """b += u sign(mean(count) - count), and count anew; nothing where no token was counted."""
        if self.counts is None:
            return
        own_U = summed(self.counts) if self.is_summed else self.counts
        self.counts = None
        # mean - count times U: whole numbers, so that a count at the mean leaves its bias alone.
        lack_U = own_U.sum() - len(self.names) * own_U
        self.bias += self.config.bias_step * lack_U.sign().to(self.bias.dtype)


def summed(counts_U: Tensor) -> Tensor:
    """Counts of all data-parallel processes together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        counts_U = counts_U.clone()
        torch.distributed.all_reduce(counts_U)
    return counts_U


def max_violation(counts_U: Tensor) -> float:
    """max(count) / mean(count) - 1: 0 when every unit is chosen equally often."""
    counts_U = counts_U.double()
    return float(counts_U.max() / counts_U.mean().clamp_min(torch.finfo(torch.float64).tiny)) - 1


class BalanceController(Controller):
    """Moves the biases once per optimizer step; between steps there is nothing to save."""

    needs_loop = False  # routers notice a step by themselves

    def after_step(self, moment: Moment) -> Sequence[Edit]:
        for router in moment.adapter.routers.values():
            assert isinstance(router, RankRouter)
            router.balance()
        return ()


class SMoRAMethod(Method):
    name = "smora"
    title = "SMoRA"
    paper = "arXiv 2501.15103"
    granularity = "rank"
    routing_unit = "token"
    servability = "per_token"
    config_class = SMoRAConfig
    folder_layout = "one"
    config: SMoRAConfig

    def experts(self, site: Site) -> list[Expert]:
        config = self.config
        scale = config.scale_at(site.path, config.activate_r)
        num_units = config.rank_at(site.path) // config.rank_partition
        return [Expert(config.rank_partition, scale)] * num_units

    def routers(self, sites: Sequence[Site]) -> dict[str, Router]:
        config = self.config
        return {
            site.path: RankRouter(
                config, site.d_in, config.rank_at(site.path) // config.rank_partition
            )
            for site in sites
        }

    def controller(self) -> Controller:
        return BalanceController()


METHOD = SMoRAMethod
