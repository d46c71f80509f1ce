"""BeamLoRA: a LoRA whose ranks compete; weak ones are replaced by copies of strong ones while it trains.

Gu, Zhang, Liu, Fu, Lin, Wang, Sun, Wu, Wang, Wang: BeamLoRA: Beam-Constraint Low-Rank Adaptation, ACL 2025,
arXiv 2502.13604.

    y = W0 x + s B^T ( g * (A x) ),   g = r softmax(c / T),   c = 0 at the start, so g = 1 and it is a LoRA
    p_t = 1 - (1 - p_0) (1 + cos(pi t / t_end)) / 2,  1 from t_end on

Every `interval` steps, while p_t < 1 and another interval remains:

    assess   g of all ranks of all sites, sorted; summed from the best down
    prune    the rank at which the sum first exceeds p_t (sum of all), and all behind it
    expand   a site that lost n ranks refills them with its n best: A, B and their Adam moments as they were half an
             interval ago. The two of a pair share their score: each gets the mean of the two.

g is folded into A, so a trained BeamLoRA is saved as a plain LoRA and costs what one costs. T is the temperature.
Ours: Adam moments are really copied (the published code writes them into a temporary), a site keeps at least half of
its ranks, no event once p_t = 1 or while all scores are equal.

Letters: R rank rows of a site, S rows after an edit, M sites.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loramux.core.controller import Controller, Edit, Moment
from loramux.core.edits import Snapshot
from loramux.core.method import Method, MethodConfig
from loramux.core.rowgate import RowGate
from loramux.core.types import Site
from loramux.core.values import check_positive, check_share, check_whole

log = logging.getLogger(__name__)
SHARE_OF_STEPS_UNTIL_ALL_STAY = 2 / 3  # paper's run: 24,688 of 37,031 steps
NUM_INTERVALS = 12  # paper's run: 3,000 of 37,031 steps
WARM, COOL, COOL_BELOW = (
    0.05,
    0.03,
    1e-4,
)  # paper's temperatures, and the learning rate between them
EQUAL = 1e-6  # ours: scores nearer than this say nothing


@dataclass(frozen=True, kw_only=True)
class BeamLoRAConfig(MethodConfig):
    """Defaults are the paper's published run; what depends on its length is derived from the number of steps.

    temperature: None for 0.05, or 0.03 where the peak learning rate is below 1e-4. interval: steps between two events,
    even; None for a twelfth of all. end_step: the step at which top_p reaches 1; None for two thirds of all.
    prune_scope: "global" sums over the scores of all sites (the published code), "site" over each site's own.
    score_merge: "prob" gives a pair the mean of its scores, "logit" the mean of what the softmax reads.
    moments: of a copied rank: "copy" (what the paper means), "keep" those of the pruned one (its code), "zero".
    """

    method = "beamlora"

    r: int = 64
    lora_dropout: float = 0.05
    top_p: float = 0.95
    interval: int | None = None
    end_step: int | None = None
    temperature: float | None = None
    prune_scope: Literal["global", "site"] = "global"
    score_merge: Literal["prob", "logit"] = "prob"
    moments: Literal["copy", "keep", "zero"] = "copy"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("top_p", self.top_p)
        if self.interval is not None:
            check_whole("interval", self.interval, least=2)
            if self.interval % 2:
                raise ValueError(
                    f"interval must be even, since ranks are copied as they were half of it ago; got {self.interval}"
                )
        if self.end_step is not None:
            check_whole("end_step", self.end_step)
        if self.temperature is not None:
            check_positive("temperature", self.temperature)
        if self.use_dora:
            raise ValueError("BeamLoRA scores the ranks of a plain LoRA; leave use_dora off")

    def default_alpha(self) -> float:
        return 2.0 * self.r

    def interval_of(self, num_steps: int) -> int:
        return self.interval or max(2, 2 * round(num_steps / NUM_INTERVALS / 2))

    def end_of(self, num_steps: int) -> int:
        return self.end_step or max(1, round(num_steps * SHARE_OF_STEPS_UNTIL_ALL_STAY))

    def temperature_at(self, peak_lr: float) -> float:
        return self.temperature or (WARM if peak_lr >= COOL_BELOW else COOL)


class RankScores(RowGate):
    """g [R] = total * softmax(c / T). `total` is R, unless ranks were added or removed one by one."""

    temperature: Tensor
    total: Tensor

    def __init__(self, num_rows: int, temperature: float):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_rows))
        self.register_buffer("temperature", torch.tensor(temperature))
        self.register_buffer("total", torch.tensor(float(num_rows)))

    def forward(self) -> Tensor:
        return self.total * (self.logits / self.temperature).softmax(0)

    def gather(self, take_S: Tensor) -> Mapping[str, Tensor]:
        """Rows that stay keep their scores, whoever joins or leaves; fresh ones start with the mean score."""
        kept_S = take_S >= 0
        logits_S, scores_S = self.logits.new_zeros(len(take_S)), self.logits.new_ones(len(take_S))
        if bool(kept_S.any()):
            logits_S[kept_S] = own = self.logits.detach()[take_S[kept_S]]
            scores_S[kept_S] = score = self().detach()[take_S[kept_S]]
            logits_S[~kept_S] = mean_logit(own, self.temperature)
            scores_S[~kept_S] = score.mean()
        return {"logits": logits_S, "temperature": self.temperature, "total": scores_S.sum()}


class BeamLoRAMethod(Method):
    name = "beamlora"
    title = "BeamLoRA"
    paper = "arXiv 2502.13604"
    granularity = "rank"
    routing_unit = "none"
    servability = "static"
    config_class = BeamLoRAConfig
    default_learning_rate = 3e-4
    config: BeamLoRAConfig

    def row_gate(self, site: Site, num_rows: int) -> RankScores:
        return RankScores(num_rows, self.config.temperature_at(self.default_learning_rate))

    def controller(self) -> BeamController:
        return BeamController(self.config)


class BeamController(Controller):
    """Takes a snapshot in the middle of every interval and edits ranks at its end."""

    def __init__(self, config: BeamLoRAConfig):
        self.config = config
        self.snapshot: Snapshot | None = None

    def before_training(self, moment: Moment) -> Sequence[Edit]:
        temperature = self.config.temperature_at(moment.peak_lr)
        for gate in gates_of(moment).values():
            gate.temperature.fill_(temperature)
        interval, end = self._plan(moment)
        num = sum(
            self._is_event(moment, step) for step in range(interval, moment.num_steps, interval)
        )
        if num == 0:
            log.warning(
                "%d steps are too few for an event (interval %d, none after step %d): no rank will be pruned",
                *(moment.num_steps, interval, end),
            )
        plan = {
            "interval": interval,
            "end_step": end,
            "temperature": temperature,
            "num_events": num,
        }
        return [{"step": 0, "what": "plan", "site": "", **plan}]

    def after_step(self, moment: Moment) -> Sequence[Edit]:
        interval, _ = self._plan(moment)
        phase = moment.step % interval
        if phase == interval // 2 and self._is_event(moment, moment.step + interval - phase):
            self.snapshot = moment.edit.snapshot()
        if phase or not self._is_event(moment, moment.step) or self.snapshot is None:
            return ()
        edits = self._event(moment, self.snapshot)
        self.snapshot = None
        return edits

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.snapshot is None else dict(self.snapshot.tensors)

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.snapshot = Snapshot(tensors) if tensors else None

    # --- One event ----------------------------------------------------------------------------------

    def _plan(self, moment: Moment) -> tuple[int, int]:
        return self.config.interval_of(moment.num_steps), self.config.end_of(moment.num_steps)

    def _is_event(self, moment: Moment, step: int) -> bool:
        interval, end = self._plan(moment)
        return moment.num_steps - step >= interval and top_p_at(step, self.config.top_p, end) < 1

    @torch.no_grad()
    def _event(self, moment: Moment, snapshot: Snapshot) -> list[Edit]:
        _, end = self._plan(moment)
        top_p = top_p_at(moment.step, self.config.top_p, end)
        gates = gates_of(moment)
        scores = {path: gate().double() for path, gate in gates.items()}
        pruned = weakest(scores, top_p, self.config.prune_scope)
        edits = []
        for path, targets in pruned.items():
            sources = scores[path].argsort(descending=True, stable=True)[: len(targets)].tolist()
            targets = shuffled(targets, moment.step, path)
            pairs = list(zip(sources, targets, strict=True))
            self._expand(moment, path, pairs, snapshot)
            rounded = [round(score, 6) for score in scores[path].tolist()]
            what = {"pruned": targets, "copied": sources, "top_p": top_p, "scores": rounded}
            edits.append({"step": moment.step, "what": "expand", "site": path, **what})
        if pruned:
            for gate in gates.values():
                moment.edit.reset_moments(gate.logits)
        return edits

    def _expand(
        self, moment: Moment, path: str, pairs: Sequence[tuple[int, int]], snapshot: Snapshot
    ) -> None:
        gate = gates_of(moment)[path]
        logits_R, total = gate.logits.detach().clone(), gate.total.clone()
        index = list(range(len(logits_R)))
        for source, target in pairs:
            index[target] = source
            both = logits_R[[source, target]]
            logits_R[[source, target]] = merged(both, gate.temperature, self.config.score_merge)
        moment.edit.gather(path, 0, index, snapshot, self.config.moments)
        gate.logits.copy_(logits_R)
        gate.total.copy_(total)


def gates_of(moment: Moment) -> dict[str, RankScores]:
    found = {path: rows.gate for path, rows in moment.adapter.rows.items()}
    return {path: gate for path, gate in found.items() if isinstance(gate, RankScores)}


def top_p_at(step: int, start: float, end_step: int) -> float:
    """p_t: rises from `start` along half a cosine and stays 1."""
    if step >= end_step:
        return 1.0
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / end_step)) / 2


def weakest(
    scores: Mapping[str, Tensor], top_p: float, scope: Literal["global", "site"]
) -> dict[str, list[int]]:
    """The ranks to prune, by site, in row order; at most half of a site's."""
    if scope == "site":
        found = {path: _behind(own_R, top_p) for path, own_R in scores.items()}
    else:
        places = [(path, i) for path, own_R in scores.items() for i in range(len(own_R))]
        found = {path: [] for path in scores}
        for place in _behind(torch.cat(list(scores.values())), top_p):
            path, i = places[place]
            found[path].append(i)
    # Sorted best first: where too many would go, the best of them stay.
    return {
        path: sorted(own[-(len(scores[path]) // 2) :])
        for path, own in found.items()
        if own and len(scores[path]) > 1
    }


def _behind(score_N: Tensor, top_p: float) -> list[int]:
    """Places from where the sum of the sorted scores first exceeds top_p of the total, best first."""
    if float(score_N.max() - score_N.min()) < EQUAL:
        return []
    order_N = score_N.argsort(descending=True, stable=True)
    above_N = score_N[order_N].cumsum(0) > top_p * score_N.sum()
    first = int(above_N.to(torch.uint8).argmax()) if bool(above_N.any()) else len(order_N)
    return order_N[first:].tolist()  # type: ignore[no-any-return]


def merged(both: Tensor, temperature: Tensor, how: Literal["prob", "logit"]) -> Tensor:
    """The logit that both ranks of a pair get; "prob" keeps their sum of scores, and so every other score."""
    if how == "logit":
        return both.mean()
    return mean_logit(both, temperature)


def mean_logit(logit_K: Tensor, temperature: Tensor) -> Tensor:
    """The logit whose score is the mean of these ones' scores."""
    return temperature * ((logit_K / temperature).logsumexp(0) - math.log(len(logit_K)))


def shuffled(targets: Sequence[int], step: int, path: str) -> list[int]:
    """A permutation that every process of a distributed run draws alike."""
    seed = int.from_bytes(hashlib.sha256(f"{step}|{path}".encode()).digest()[:7], "big")
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    return [targets[i] for i in order.tolist()]


METHOD = BeamLoRAMethod
