"""RAMoLE: a small trained RouterLoRA weighs frozen LoRAs token by token by an attention over what each of them gives.

Zhao, Gan, Wang, Hu, Shen, Yang, Wu, Kuang, Retrieval-Augmented Mixture of LoRA Experts for Uploadable Machine
Learning, arXiv 2406.16989. At every adapted linear, over the LoRAs that were retrieved and have rows there:

    v_i = s_i B_i^T A_i x          what expert i adds
    q   = A_r x ,  k_i = B_r^T v_i
    w   = softmax_i( q . k_i / sqrt(r_r) )
    y   = W0 x + sum_i w_i v_i     B_r A_r x itself is never added

A_r [r_r, I] and B_r [O, r_r] belong to the linear, not to any expert: LoRAs that came after training need none. With
t_i = A_i x the score is q^T G_i t_i with G_i = s_i B_r^T B_i^T, r_r x r numbers per expert, so nothing O wide is built
per expert. B_r starts at 0, which is the uniform mixture.

In training each expert is left out with probability `adapter_dropout`, in one draw for all linears of a forward pass;
or every row sees what a retriever finds for its task (`train_set="retrieved"`), which is what serving sees.

Letters: N tokens, Q rows, I input width, O output width, E experts, R rank rows of all experts, r rank of the router.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from loramux.core.bank import Rows, init_a
from loramux.core.frozen import FrozenConfig, expert_names
from loramux.core.method import Method
from loramux.core.router import Router, RouteView
from loramux.core.types import Route, RouteRecord, Servability, Site
from loramux.core.values import check_positive, check_share, check_whole

LEAST_SURVIVORS = 2  # with one expert left every weight is 1 and nothing is learnt
RMS_EPS = 1e-8  # under the mean square of an expert's output
OWN_MASKED = 0.5  # of the rows of a retrieved set: as often as adapter_dropout would leave it out


@dataclass(frozen=True, kw_only=True)
class RAMoLEConfig(FrozenConfig):
    """router_rank: r_r. adapter_dropout: how likely an expert is left out of a training step; at least two stay.

    logit_scale: a factor on the scores, the paper's 1. null_expert: one more choice that adds nothing, at score 0, so
    that the weights may sum to less than 1. normalise_keys: experts are compared by the direction of what they add,
    not its size, which a stranger's upload could choose. Both are ours and off.

    train_set: "all", the paper's, or "retrieved", ours: each row of a step sees the first `retrieved_k` of a ranking of
    its task, drawn from `retrieved` {task of a row: rankings of experts' names, best first}; the expert that has the
    task's name is left out of every second one. adapter_dropout does nothing then.
    """

    method = "ramole"

    router_rank: int = 6
    adapter_dropout: float = 0.5
    logit_scale: float = 1.0
    null_expert: bool = False
    normalise_keys: bool = False
    train_set: Literal["all", "retrieved"] = "all"
    retrieved: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    retrieved_k: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("router_rank", self.router_rank)
        check_share("adapter_dropout", self.adapter_dropout)
        check_positive("logit_scale", self.logit_scale)
        check_whole("retrieved_k", self.retrieved_k, LEAST_SURVIVORS)
        self._check_retrieved()
        if self.lora_dropout:
            raise ValueError(
                "RAMoLE trains a router over frozen adapters, which run as they were trained: lora_dropout does not "
                "apply; adapter_dropout leaves out whole adapters"
            )

    def _check_retrieved(self) -> None:
        given = self.retrieved
        if (self.train_set == "retrieved") != bool(given):
            raise ValueError(
                'train_set="retrieved" and `retrieved`, the rankings of every task, go together; got '
                f"train_set={self.train_set!r} and rankings of {len(given)} tasks"
            )
        for task, rankings in given.items():
            rows = [list(ranking) for ranking in rankings]
            known = all(name in self.names for row in rows for name in row)
            if not rows or (self.adapters and not known):
                raise ValueError(
                    f"retrieved[{task!r}] must hold rankings of {list(self.names)}, got {rows}"
                )
            own = own_expert(task)
            short = [row for row in rows if len({n for n in row if n != own}) < LEAST_SURVIVORS]
            if short or any(len(set(row)) < len(row) for row in rows):
                raise ValueError(
                    f"every ranking of {task!r} must name each expert once and at least {LEAST_SURVIVORS} beside its "
                    f"own, got {short or rows}"
                )


def own_expert(task: str) -> str:
    """The name that the adapter of a task has among the experts, if it is there."""
    return expert_names([task])[0]


class Survivors:
    """Which experts act in a training step. Shared by all linears of an adapter, drawn once per forward pass."""

    def __init__(self, num_experts: int, dropout: float):
        self.num_experts, self.dropout = num_experts, dropout
        self.kept = (True,) * num_experts
        self._is_used = True

    def of(self, view: RouteView) -> tuple[bool, ...] | None:
        """None: all. What backward runs again sees what its forward pass saw."""
        if not view.training or self.dropout == 0 or self.num_experts <= LEAST_SURVIVORS:
            return None
        if self._is_used and not view.recomputed:
            self.kept, self._is_used = self._draw(), False
        return self.kept

    def over(self) -> None:
        """The forward pass has ended: the next one draws anew."""
        self._is_used = True

    def _draw(self) -> tuple[bool, ...]:
        while True:
            kept = (torch.rand(self.num_experts) >= self.dropout).tolist()
            if sum(kept) >= LEAST_SURVIVORS:
                return tuple(kept)


class RetrievedSets:
    """Which experts every row of a training step sees. Shared by all linears, drawn once per forward pass."""

    def __init__(self, config: RAMoLEConfig):
        self.config = config
        self.kept_QE = torch.zeros(0, 0, dtype=torch.bool)
        self._is_used = True

    def of(self, view: RouteView) -> Tensor | None:
        """True [Q, E] for what a row sees; None outside training: all."""
        if not view.training:
            return None
        if self._is_used and not view.recomputed:
            tasks = view.tasks or (None,) * view.num_requests
            self.kept_QE = torch.tensor([self._draw(task) for task in tasks])
            self._is_used = False
        return self.kept_QE

    def over(self) -> None:
        """The forward pass has ended: the next one draws anew."""
        self._is_used = True

    def _draw(self, task: str | None) -> list[bool]:
        rankings = rankings_of(self.config, task)
        ranking = list(rankings[int(torch.randint(len(rankings), ()))])
        own = own_expert(task or "")
        if own in ranking and float(torch.rand(())) < OWN_MASKED:
            ranking.remove(own)
        chosen = ranking[: self.config.retrieved_k]
        return [name in chosen for name in self.config.names]


def rankings_of(config: RAMoLEConfig, task: str | None) -> Sequence[Sequence[str]]:
    """What was retrieved for a task; ValueError where nothing was."""
    found = None if task is None else config.retrieved.get(task)
    if found is None:
        raise ValueError(
            f"retrieved knows the tasks {sorted(config.retrieved)}, a row has {task!r}; give rankings for it, or train "
            'with train_set="all"'
        )
    return found


class RouterLoRA(Router):
    """A_r and B_r of one linear: reads its input and weighs its experts."""

    scope: ClassVar[Literal["layer", "block", "site"]] = "site"
    when = "token"

    def __init__(self, config: RAMoLEConfig, site: Site, survivors: Survivors | RetrievedSets):
        super().__init__()
        self.config, self.names, self.survivors = config, config.names, survivors
        rank = config.router_rank
        self.scale = config.logit_scale / math.sqrt(rank)
        self.A_r = nn.Parameter(init_a(rank, site.d_in))
        self.B_r = nn.Parameter(torch.zeros(site.d_out, rank))
        self._rows: list[Rows] = []  # in a list, so that they are not registered a second time
        self._kept: tuple[object, Keys] | None = None

    def bind(self, rows: Rows) -> None:
        """Tell the router which rows it weighs; they are frozen."""
        if rows.magnitude is not None:
            raise ValueError(
                "RAMoLE over DoRA adapters is not defined: their change is not a product of two factors"
            )
        self._rows, self._kept = [rows], None

    def forward(self, view: RouteView, incoming: Route) -> Route:
        rows, x_NI = self._rows[0], view.x_ND
        wide = torch.float64 if x_NI.dtype == torch.float64 else torch.float32
        t_NR = nn.functional.linear(x_NI, rows.a.to(x_NI.dtype)).to(wide)
        q_Nr = x_NI.to(wide) @ self.A_r.to(wide).T
        score_NE = self.scores(q_Nr, t_NR)
        if isinstance(self.survivors, RetrievedSets):
            weight_NE = self._weigh_rows(score_NE, self._open_rows(view, self.survivors))
        else:
            weight_NE = self._weigh(score_NE, self._open(view, self.survivors))
        view.record(
            columns=self.names,
            weight=weight_NE,
            probs=weight_NE,
            logits=score_NE,
            valid=view.valid_N,
        )
        return Route(weight=weight_NE)

    def observed(self, record: RouteRecord) -> None:
        self.survivors.over()

    def scores(self, q_Nr: Tensor, t_NR: Tensor) -> Tensor:
        """q . k_i / sqrt(r_r), [N, E]; 0 for an expert without rows here."""
        keys = self._keys(t_NR.dtype, t_NR.device)
        score_NE = self.scale * (((q_Nr @ keys.g_rR) * t_NR) @ keys.slot_RE)
        if keys.gram_RR is None:
            return score_NE
        square_NE = ((t_NR @ keys.gram_RR) * t_NR) @ keys.slot_RE / self.B_r.shape[0]
        return score_NE * torch.rsqrt(square_NE.clamp_min(0) + RMS_EPS)

    def _open_rows(self, view: RouteView, sets: RetrievedSets) -> Tensor:
        """True [N, E]: `_open` of every token, by its row."""
        kept_QE = sets.of(view)
        open_E = torch.tensor(self._open(view, None), device=view.x_ND.device)
        if kept_QE is None:
            return open_E.expand(len(view.x_ND), -1)
        return kept_QE.to(view.x_ND.device)[view.request_N] & open_E

    def _weigh_rows(self, score_NE: Tensor, open_NE: Tensor) -> Tensor:
        """Softmax over what is open for a token; zeros where nothing is."""
        null_NE = score_NE.new_zeros(len(score_NE), int(self.config.null_expert))
        everything = torch.cat([score_NE.masked_fill(~open_NE, float("-inf")), null_NE], 1)
        # A row of -inf has no softmax and would leave NaN in the gradients of all others.
        everything = everything.masked_fill(~open_NE.any(1, keepdim=True), 0.0)
        return everything.softmax(-1)[:, : score_NE.shape[1]] * open_NE

    def _open(self, view: RouteView, survivors: Survivors | None) -> list[bool]:
        """The experts that have rows here, are not masked and were not left out of this step."""
        mask = [True] * len(self.names) if view.mask_E is None else view.mask_E.tolist()
        kept = (survivors.of(view) if survivors is not None else None) or mask
        ranks = self._rows[0].spans.rank
        return [
            rank > 0 and one and other for rank, one, other in zip(ranks, mask, kept, strict=True)
        ]

    def _weigh(self, score_NE: Tensor, is_open: Sequence[bool]) -> Tensor:
        if not any(is_open):
            return score_NE * 0  # the base alone; a product, so that autograd finds its way
        if not all(is_open):
            closed_E = ~torch.tensor(is_open, device=score_NE.device)
            score_NE = score_NE.masked_fill(closed_E, float("-inf"))
        if not self.config.null_expert:
            return score_NE.softmax(-1)
        return nn.functional.pad(score_NE, (0, 1)).softmax(-1)[:, :-1]

    def _keys(self, dtype: torch.dtype, device: torch.device) -> Keys:
        """G and what goes with it; kept where nothing is trained."""
        own = (self._rows[0].b, self.B_r)
        # Fused optimizers write in place without a new version, so what is trained is never kept.
        if self.B_r.requires_grad or any(p.is_inference() for p in own):
            return self._make_keys(dtype, device)
        key = (*((p.data_ptr(), p._version) for p in own), dtype, device)
        if self._kept is None or self._kept[0] != key:
            # What is kept may be wanted in a backward pass later, which tensors of inference mode refuse.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (key, self._make_keys(dtype, device))
        return self._kept[1]

    def _make_keys(self, dtype: torch.dtype, device: torch.device) -> Keys:
        rows = self._rows[0]
        slot_R = rows.spans.row_slot_R.to(device)
        scale_R = rows.spans.row_scale_R.to(device, dtype)
        b_RO = rows.b.detach().to(device, dtype) * scale_R.unsqueeze(1)
        gram_RR = None
        if self.config.normalise_keys:
            gram_RR = (b_RO @ b_RO.T) * (slot_R.unsqueeze(0) == slot_R.unsqueeze(1))
        slot_RE = nn.functional.one_hot(slot_R, len(self.names)).to(dtype)
        return Keys(self.B_r.to(device, dtype).T @ b_RO.T, slot_RE, gram_RR)


@dataclass(frozen=True, eq=False)
class Keys:
    """G of all experts side by side, which expert a row belongs to, and s^2 B B^T of each on the diagonal."""

    g_rR: Tensor
    slot_RE: Tensor
    gram_RR: Tensor | None


class RAMoLEMethod(Method):
    name = "ramole"
    title = "RAMoLE"
    paper = "arXiv 2406.16989"
    granularity = "expert (frozen LoRAs)"
    routing_unit = "token"
    servability: Servability = "per_token"
    config_class = RAMoLEConfig
    default_learning_rate = 1e-4  # an independent re-implementation's: the paper names none
    needs_adapters = True
    trains_rows = False
    config: RAMoLEConfig

    def routers(self, sites: Sequence[Site]) -> dict[str, Router]:
        config = self.config
        survivors: Survivors | RetrievedSets = Survivors(len(config.names), config.adapter_dropout)
        if config.train_set == "retrieved":
            survivors = RetrievedSets(config)
        return {site.path: RouterLoRA(config, site, survivors) for site in sites}

    def check_training_task(self, task: str | None) -> None:
        if self.config.train_set == "retrieved":
            rankings_of(self.config, task)


METHOD = RAMoLEMethod
