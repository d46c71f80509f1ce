"""Task scores of what retrieval leads to: the bare base, the right adapter, Selection, Mixture and Fusion.

Why one row of results per (test row, set of adapters): seeds mostly retrieve the same sets, so each is measured once,
and a run that was stopped goes on where it was. Test rows come in rounds over all tasks: a stopped run is balanced.

Fusion needs an adapter of its own for every set, so it is measured for the first seed only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

from loramux.bench.retrieval_pool import Pool, spread
from loramux.retrieval.where import EVERYTHING

ROUND = 4  # test rows of each task measured together
K = 3
WAYS = ("selection", "mixture", "fusion")


class Log(Protocol):
    """Where results go."""

    def add(self, row: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Case:
    """One thing to measure: a test row answered by a set of adapters, put together in one way."""

    task: str
    number: int
    way: str
    ids: tuple[str, ...]

    @property
    def key(self) -> tuple[str, int, str, tuple[str, ...]]:
        # Of one adapter all ways make the same thing.
        way = "selection" if len(self.ids) == 1 else self.way
        return self.task, self.number, way, self.ids


@dataclass(frozen=True)
class Wanted:
    """Which cases make up one line of the table: {(seed): cases}."""

    name: str
    cases: Mapping[int, Sequence[Case]]


def wanted(pool: Pool, seeds: Sequence[int], start: int, stop: int) -> list[Wanted]:
    """Everything to measure on the test rows `start` to `stop` of each task."""
    numbers = {t: range(start, min(stop, len(rows))) for t, rows in pool.tests.items()}
    places = [(task, number) for task, own in numbers.items() for number in own]
    found = [
        Wanted("base", {0: [Case(t, n, "base", ()) for t, n in places]}),
        Wanted("own adapter", {0: [Case(t, n, "selection", (t,)) for t, n in places]}),
    ]
    retrievers = {seed: pool.retriever(seed) for seed in seeds}
    for masked in (False, True):
        for way in WAYS:
            own = {seed: r for seed, r in retrievers.items() if way != "fusion" or seed == seeds[0]}
            cases = {
                seed: [_case(pool, retriever, t, n, way, masked) for t, n in places]
                for seed, retriever in own.items()
            }
            found.append(Wanted(f"{way} {'OOD' if masked else 'IID'}", cases))
    return found


def _case(pool: Pool, retriever: Any, task: str, number: int, way: str, masked: bool) -> Case:
    query = pool.tests[task][number][1]
    k = 1 if way == "selection" else K
    hidden = frozenset({task}) if masked else frozenset()
    found = retriever.retrieve(query, k, allowed=EVERYTHING, masked=hidden)
    return Case(task, number, way, tuple(sorted(found.ids)))


def measure(
    pool: Pool, base: str, cases: Sequence[Case], known: Mapping[Any, float], log: Log
) -> None:
    """Measure what is not known yet: fusions set by set, all other sets as rows of common batches."""
    from loramux.bench.retrieval_runner import Runner

    missing = {case.key: case for case in cases if case.key not in known}
    if not missing:
        return
    runner = Runner(pool, base)
    fused: dict[tuple[str, ...], list[Case]] = defaultdict(list)
    weighted: list[Case] = []
    for key, case in sorted(missing.items()):
        if key[2] == "fusion":
            fused[case.ids].append(case)
        else:
            weighted.append(case)
    for way, results in (("mixture", runner.weighted(weighted)), ("fusion", runner.fused(fused))):
        for case, metric, value in results:
            # Base and single adapters are weights like any others; the key of a case tells them apart by the ids.
            name = way if len(case.ids) > 1 else case.way
            row = {"way": name, "ids": case.ids, "task": case.task, "number": case.number}
            log.add({"stage": "score", **row, "metric": metric, "value": value})


def summary(
    parts: Sequence[Sequence[Wanted]], known: Mapping[Any, float], tasks: Sequence[str]
) -> list[str]:
    """Markdown: per way the mean over tasks in percent, mean and deviation over the seeds."""
    lines = ["| weights | mean over tasks | " + " | ".join(tasks) + " |"]
    lines.append("| --- " * (len(tasks) + 2) + "|")
    for column in zip(*parts, strict=True):
        by_seed: dict[int, dict[str, list[float]]] = {}
        for each in column:
            for seed, cases in each.cases.items():
                own = by_seed.setdefault(seed, defaultdict(list))
                for case in cases:
                    own[case.task].append(100 * known[case.key])
        means = {
            seed: {task: fmean(values) for task, values in own.items()}
            for seed, own in by_seed.items()
        }
        overall = spread([fmean(own.values()) for own in means.values()])
        cells = [f"{fmean([own[task] for own in means.values()]):.0f}" for task in tasks]
        lines.append(f"| {' | '.join([column[0].name, overall, *cells])} |")
    return lines
