"""Rounds of a token budget: as many jobs as fill a call to where it is fast, chosen by what the run is for.

Why a budget and not a number of jobs: a call costs about `fixed + tokens * rate`. Below some thousand tokens the fixed
part (launches, and reading every weight of the base) is most of it; above, another job only makes everybody wait.
Short batches are therefore many to a round and long ones few.

| objective | who goes first | why |
| --- | --- | --- |
| throughput | most steps left | a long job that starts late ends alone, in calls that are mostly fixed cost |
| turnaround | fewest tokens left | what is nearly done ends soon; the mean wait is shortest |
| fair | fewest tokens served, by weight | every job gets its share of the tokens |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from loramux.train.joint.schedule import Candidate, filled

Objective = Literal["throughput", "turnaround", "fair"]
Priorities = Literal["strict", "weighted"]
# Ours: where the fixed cost is a tenth of a call, or a third of it where others wait for the call, in the CPU runs
# whose traces the project ships; `loramux bench schedule --trace` says it for another machine.
ROUND_TOKENS: Mapping[Objective, int] = {"throughput": 1024, "turnaround": 256, "fair": 256}
PATIENCE = 16  # ours, rounds
MAX_POWER = 16  # of the weight 2 ** priority


@dataclass(frozen=True)
class TokenBudget:
    """Fills rounds up to `round_tokens`; None takes the objective's own.

    priorities: strict never lets a job wait for one of lower priority; weighted counts a job of priority p as 2 ** p
    times as urgent. patience: who has waited so many rounds takes a step beside those that were picked, whatever its
    priority, one job a round: nobody starves, and nobody waits for it.
    """

    objective: Objective = "fair"
    round_tokens: int | None = None
    priorities: Priorities = "strict"
    patience: int = PATIENCE

    def pick(self, number: int, ready: Sequence[Candidate]) -> list[str]:
        order = sorted(ready, key=self._key)
        picked = filled(order, self.round_tokens or ROUND_TOKENS[self.objective])
        late = [job for job in order if job not in picked and self._waited(number, job)]
        if late:
            picked.append(min(late, key=lambda job: (_since(job), job.arrival)))
        return [job.name for job in picked]

    def _waited(self, number: int, job: Candidate) -> bool:
        return number - _since(job) >= self.patience

    def _key(self, job: Candidate) -> tuple[float, float, int]:
        """Smaller goes first."""
        strict = -job.priority if self.priorities == "strict" else 0
        return strict, self._need(job), job.arrival

    def _need(self, job: Candidate) -> float:
        weight = 1.0
        if self.priorities == "weighted":
            weight = 2.0 ** max(-MAX_POWER, min(MAX_POWER, job.priority))
        if self.objective == "throughput":
            return -job.steps_left * weight
        return (job.tokens_left if self.objective == "turnaround" else job.served) / weight


def _since(job: Candidate) -> int:
    return max(job.last_round, job.joined)
