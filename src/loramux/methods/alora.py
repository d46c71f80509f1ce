"""ALoRA: start with the whole rank budget, then move single ranks from where they help least to other linears.

Liu, Lyn, Zhu, Tian, Graham, ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models, NAACL 2024,
arXiv 2403.16187. Not PEFT's activated LoRA, which shares the name. In our letters, with gates c in {0, 1} per rank:

    y = W0 x + B^T ( c * s (A x) )                       a pruned rank is removed, so c is 1 for what is there
    IS(i) = S(M) - S(M without rank i) + S(base with rank i alone)          S = minus cross-entropy (Eq. 6)

    train K1 epochs; N times: score every rank on B_val, remove the n ranks of lowest IS, give n fresh ranks (A random,
    B zero) to the linears that lost none, as evenly as possible, the remainder to those of highest mean IS; train K2

The scale s is that of the initial rank and never changes, moments follow the rows, and a fresh rank is spared for one
round, since with B = 0 it scores as useless as nothing: these three are ours.

Letters: R rank rows of a site, U units (rank rows of all sites).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from loramux.core.ablation import Scores, Unit, ablation_scores, can_reuse_prefix, rank_units
from loramux.core.controller import Controller, Edit, Moment
from loramux.core.estimates import taylor_scores
from loramux.core.method import Method, MethodConfig
from loramux.core.types import Site
from loramux.core.values import check_positive, check_share, check_whole

log = logging.getLogger(__name__)
SMALL_SHARE = 0.05  # ours: below it, all rounds together barely move the budget, which is worth a line in the log
SCORERS: Mapping[str, Callable[..., Scores]] = {
    "ablation": ablation_scores,
    "taylor": taylor_scores,
}


@dataclass(frozen=True, kw_only=True)
class ALoRAConfig(MethodConfig):
    """r, rounds, ranks_per_round, first_round, round_every and score_rows are the paper's.

    ranks_per_round: how many ranks of the whole model move in a round; an int, a share of the budget in (0, 1), or
    None for the number of linears in a layer. first_round and round_every count in `round_unit`.
    score: "ablation" is the method; "taylor" a first-order estimate of it, for models on which exact scores take hours.
    resample: draw other examples for every round. grace_rounds: rounds that fresh ranks cannot lose. min_rank: what
    every linear keeps. lora_alpha = r (scale 1) is ours, the paper names none.
    """

    method = "alora"

    rounds: int = 8
    ranks_per_round: int | float | None = None
    first_round: float = 1.0
    round_every: float = 0.25
    round_unit: Literal["epochs", "steps"] = "epochs"
    score: Literal["ablation", "taylor"] = "ablation"
    score_rows: int = 32
    resample: bool = True
    grace_rounds: int = 1
    min_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("rounds", self.rounds, least=0)
        check_whole("score_rows", self.score_rows)
        check_whole("grace_rounds", self.grace_rounds, least=0)
        check_whole("min_rank", self.min_rank, least=0)
        check_positive("first_round", self.first_round)
        check_positive("round_every", self.round_every)
        if isinstance(self.ranks_per_round, float):
            check_positive("ranks_per_round", self.ranks_per_round)
            check_share("ranks_per_round", self.ranks_per_round)
        elif self.ranks_per_round is not None:
            check_whole("ranks_per_round", self.ranks_per_round)
        if self.use_dora:
            raise ValueError(
                "ALoRA scores ranks one by one, which DoRA's norm ties together; leave use_dora off"
            )

    def default_alpha(self) -> float:
        return float(self.r)

    def num_moved(self, budget: int, modules: int) -> int:
        """n_A, for a total of `budget` ranks in a model with `modules` targeted linears per layer."""
        given = self.ranks_per_round
        if given is None:
            return min(modules, budget - 1)
        if isinstance(given, float):
            return max(1, round(given * budget))
        return given


class ALoRAMethod(Method):
    name = "alora"
    title = "ALoRA"
    paper = "arXiv 2403.16187"
    granularity = "rank"
    routing_unit = "none"
    servability = "static"
    config_class = ALoRAConfig
    default_learning_rate = 1e-4
    config: ALoRAConfig

    def check_sites(self, sites: Sequence[Site]) -> None:
        budget = sum(self.config.rank_at(site.path) for site in sites)
        moved = self.config.num_moved(budget, modules_of(sites))
        if moved >= budget:
            raise ValueError(
                f"ranks_per_round={self.config.ranks_per_round} would remove all {budget} ranks of the model in one "
                "round; lower it, or raise r"
            )

    def controller(self) -> Controller | None:
        return Allocation(self.config) if self.config.rounds else None


class Allocation(Controller):
    """The rounds of one training run, and the names that ranks keep over them.

    ids: per site, a number for each of its rows that no other row of the site ever had. born: the round in which the
    row came; -1 from the start.
    """

    def __init__(self, config: ALoRAConfig):
        self.config = config
        self.round = 0
        self.budget = 0
        self.moved = 0
        self.seed = 0
        self.ids: dict[str, list[int]] = {}
        self.born: dict[str, list[int]] = {}
        self.given: dict[str, int] = {}
        self.reuse: bool | None = None  # found out anew by a run that goes on

    def before_training(self, moment: Moment) -> Sequence[Edit]:
        if moment.samples is None:
            raise ValueError(
                "ALoRA scores ranks on examples, and this training loop gives none; pass validation data, or rounds=0"
            )
        rows = moment.adapter.rows
        self.ids = {path: list(range(entry.spans.num_rows)) for path, entry in rows.items()}
        self.born = {path: [-1] * len(ids) for path, ids in self.ids.items()}
        self.given = {path: len(ids) for path, ids in self.ids.items()}
        self.budget = sum(self.given.values())
        self.moved = self.config.num_moved(self.budget, modules_of(moment.adapter.sites.values()))
        self.seed = int(torch.randint(2**31, (), generator=moment.generator))
        self._say(moment)
        return ()

    def _say(self, moment: Moment) -> None:
        fitting = sum(self._due(moment, n) < moment.num_steps for n in range(self.config.rounds))
        if fitting < self.config.rounds:
            log.warning(
                "%d of ALoRA's %d rounds fit into %d steps; train longer, or set first_round and round_every",
                fitting, self.config.rounds, moment.num_steps,
            )  # fmt: skip
        share = self.config.rounds * self.moved / self.budget
        if self.config.ranks_per_round is None and share < SMALL_SHARE:
            log.info(
                "ALoRA moves %d of %d ranks per round, %.1f %% in all; ranks_per_round=0.05 to 0.125 explores more",
                self.moved, self.budget, 100 * share,
            )  # fmt: skip

    def after_step(self, moment: Moment) -> Sequence[Edit]:
        # After the last step new ranks would never be trained.
        if self.round >= self.config.rounds or moment.step >= moment.num_steps:
            return ()
        if moment.step < self._due(moment, self.round):
            return ()
        edits = self._reallocate(moment)
        self.round += 1
        return edits

    def _due(self, moment: Moment, number: int) -> int:
        """The step after which a round comes."""
        when = self.config.first_round + number * self.config.round_every
        steps = moment.steps_per_epoch if self.config.round_unit == "epochs" else 1.0
        return max(number + 1, round(when * steps))

    # --- One round --------------------------------------------------------------------------------

    def _reallocate(self, moment: Moment) -> list[Edit]:
        units = rank_units(moment.adapter)
        scores = self._score(moment, units)
        importance = scores.importance.tolist()
        means = mean_by_site(units, importance)
        lost = self._lowest(units, importance)
        unhurt = [path for path in means if not any(units[u].path == path for u in lost)]
        gained = share_out(len(lost), sorted(unhurt, key=lambda path: -means[path]))
        edits = [self._entry(moment, "prune", units[u], scores, u) for u in lost]
        for path, count in gained.items():
            fresh = range(self.given[path], self.given[path] + count)
            edits += [
                {
                    "step": moment.step,
                    "what": "add",
                    "round": self.round,
                    "site": path,
                    "rank": rank,
                }
                for rank in fresh
            ]
        self._edit(moment, [units[u] for u in lost], gained)
        return [self._summary(moment, scores, means), *edits]

    def _score(self, moment: Moment, units: Sequence[Unit]) -> Scores:
        assert moment.samples is not None
        draw = moment.generator
        if not self.config.resample:
            draw = torch.Generator().manual_seed(self.seed)
        score = SCORERS[self.config.score]
        batches = moment.samples(self.config.score_rows, draw)
        if self.config.score == "ablation":
            if self.reuse is None:
                self.reuse = can_reuse_prefix(moment.handle, batches[0], moment.adapter.name)
            score = partial(score, reuse=self.reuse)
        return Scores.mean([score(moment.handle, b, units, moment.adapter.name) for b in batches])

    def _lowest(self, units: Sequence[Unit], importance: Sequence[float]) -> list[int]:
        """The ranks that go: lowest first, none that is spared, none below min_rank, never the model's last one."""
        left = {path: len(ids) for path, ids in self.ids.items()}
        allowed = min(self.moved, sum(left.values()) - 1)
        chosen: list[int] = []
        for u in sorted(range(len(units)), key=lambda u: importance[u]):
            path, row = units[u].path, units[u].rows[0]
            if len(chosen) == allowed:
                break
            spared = (
                self.born[path][row] >= 0
                and self.round - self.born[path][row] <= self.config.grace_rounds
            )
            if not spared and left[path] > self.config.min_rank:
                left[path] -= 1
                chosen.append(u)
        return chosen

    def _edit(self, moment: Moment, lost: Sequence[Unit], gained: Mapping[str, int]) -> None:
        for path in self.ids:
            out = {unit.rows[0] for unit in lost if unit.path == path}
            count = gained.get(path, 0)
            if not out and not count:
                continue
            kept = [row for row in range(len(self.ids[path])) if row not in out]
            moment.edit.gather(path, 0, [*kept, *([-1] * count)])
            fresh = range(self.given[path], self.given[path] + count)
            self.ids[path] = [self.ids[path][row] for row in kept] + list(fresh)
            self.born[path] = [self.born[path][row] for row in kept] + [self.round] * count
            self.given[path] += count

    # --- The ledger -------------------------------------------------------------------------------

    def _entry(self, moment: Moment, what: str, unit: Unit, scores: Scores, u: int) -> Edit:
        return {
            "step": moment.step,
            "what": what,
            "round": self.round,
            "site": unit.path,
            "rank": self.ids[unit.path][unit.rows[0]],
            "importance": float(scores.importance[u]),
            "removal": float(scores.removal[u]),
            "alone": float(scores.alone[u]),
        }

    def _summary(self, moment: Moment, scores: Scores, means: Mapping[str, float]) -> Edit:
        return {
            "step": moment.step,
            "what": "round",
            "round": self.round,
            "site": "",
            "score": self.config.score,
            "full": scores.full,
            "base": scores.base,
            "tokens": scores.num_tokens,
            "importance": dict(means),
            "ranks": {path: len(ids) for path, ids in self.ids.items()},
        }

    def state(self) -> dict[str, Any]:
        return {
            "round": self.round, "budget": self.budget, "moved": self.moved, "seed": self.seed,
            "ids": self.ids, "born": self.born, "given": self.given,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        for name in self.state():
            setattr(self, name, state[name])


def modules_of(sites: Iterable[Site]) -> int:
    """The most targeted linears that a layer has."""
    counts: dict[int, int] = {}
    for site in sites:
        counts[site.layer] = counts.get(site.layer, 0) + 1
    return max(counts.values())


def mean_by_site(units: Sequence[Unit], importance: Sequence[float]) -> dict[str, float]:
    """Mean importance of every site that has ranks."""
    found: dict[str, list[float]] = {}
    for unit, value in zip(units, importance, strict=True):
        found.setdefault(unit.path, []).append(value)
    return {path: sum(values) / len(values) for path, values in found.items()}


def share_out(count: int, paths: Sequence[str]) -> dict[str, int]:
    """`count` ranks over the sites, as evenly as possible; the first ones get the remainder."""
    if not paths:
        return {}
    each, rest = divmod(count, len(paths))
    shares = {path: each + (place < rest) for place, path in enumerate(paths)}
    return {path: share for path, share in shares.items() if share}


METHOD = ALoRAMethod
