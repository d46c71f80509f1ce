"""Serving: as much as it can take at once, and at a rate that leaves it some air.

All at once: every request is there from the beginning, `streams` are answered at a time; tokens per second count. At a
rate: Poisson arrivals at a share of what the engine was found to answer; the times to the first token and between
tokens count. Adapters are drawn by Zipf's law, and there are more of them than slots. The references are transformers'
own `generate` without adapters, in padded batches, and the engine without adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from loramux.bench.adapters import by_name
from loramux.bench.progress import Begin
from loramux.bench.rounds import Measure, interleave
from loramux.bench.serving import (
    Answer,
    latencies,
    makespan,
    never_stops,
    quantile,
    serve_engine,
    serve_padded,
    throughput,
)
from loramux.bench.shape import Effort, twin_of
from loramux.bench.streams import build_engine
from loramux.bench.table import Compared, Measured, Row, compare
from loramux.bench.workload import Traffic, make_traffic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TENANTS, TENANTS_COPY, BASE, GENERATE = "tenants", "tenants copy", "base", "generate"
LOAD = 0.7  # of what the engine answers at most: the rate of the second part
ROWS = (
    Compared("serve", TENANTS, GENERATE, "serve/generate"),
    Compared("serve", TENANTS, BASE, None, TENANTS_COPY),
    Compared("serve", BASE, GENERATE, adapters=0),
    Compared("control", TENANTS_COPY, TENANTS, None, TENANTS_COPY),
)
LATENCIES = (("ttft", 0.5), ("ttft", 0.95), ("itl", 0.5), ("itl", 0.99))
NAMES = {"ttft": "first token", "itl": "between tokens"}


class Serving:
    """A system under traffic; every call brings other requests, the same to every system. Gives the makespan."""

    def __init__(self, run: Callable[[Sequence[Any]], list[Answer]], traffic: Traffic):
        self.run, self.traffic = run, traffic
        self.calls = 0
        self.answers: list[list[Answer]] = []

    def __call__(self) -> float:
        self.calls += 1
        self.answers.append(self.run(make_traffic(self.traffic, self.calls)))
        return makespan(self.answers[-1])

    def at_rate(self, rate: float) -> Serving:
        """The same system under slower traffic."""
        return Serving(self.run, replace(self.traffic, rate=rate))


def serve_rows(
    model: PreTrainedModel, folders: Sequence[Path], effort: Effort, begin: Begin
) -> Measured:
    traffic = Traffic(
        requests=effort.serve_requests,
        adapters=len(folders),
        vocab=int(model.config.vocab_size),
        prompt=effort.serve_prompt,
        answer=effort.serve_answer,
    )
    titles = _titles(len(folders))
    engines = {name: _engine(model, folders, effort) for name in (TENANTS, TENANTS_COPY)}
    engines[BASE] = _engine(model, (), effort)
    generate = never_stops(twin_of(model))
    names = [folder.name for folder in folders]

    def on(engine: Any, adapters: Sequence[str] | None) -> Serving:
        return Serving(lambda arrivals: serve_engine(engine, arrivals, adapters), traffic)

    systems = {
        name: on(engine, None if name == BASE else names) for name, engine in engines.items()
    }
    systems[GENERATE] = Serving(lambda a: serve_padded(generate, a, effort.streams), traffic)
    try:
        measured, rate = _at_once(systems, titles, effort, begin)
        del systems[TENANTS_COPY]
        slower = {name: system.at_rate(rate) for name, system in systems.items()}
        measured.add(_at_rate(slower, titles, effort, begin, rate))
    finally:
        for engine in engines.values():
            engine.close()
    return measured


def _engine(model: PreTrainedModel, folders: Sequence[Path], effort: Effort) -> Any:
    context = effort.serve_prompt[1] + effort.serve_answer[1]
    return build_engine(
        model,
        by_name(folders),
        batch=effort.streams,
        context=context,
        max_slots=effort.serve_slots,
    )


def _titles(adapters: int) -> dict[str, str]:
    ours = f"engine, {adapters} adapters"
    return {
        TENANTS: ours,
        TENANTS_COPY: f"a second {ours}",
        BASE: "engine, no adapter",
        GENERATE: "transformers generate, no adapter",
    }


def _at_once(
    systems: Mapping[str, Serving], titles: Mapping[str, str], effort: Effort, begin: Begin
) -> tuple[Measured, float]:
    """Rows, and the requests per second that belong to LOAD."""
    for (
        system
    ) in systems.values():  # a short warm-up; a whole round would take as long as a measured one
        system.run(make_traffic(replace(system.traffic, requests=2), 0))
    measures: dict[str, Measure] = dict(systems)
    advance = begin("serve, all at once", effort.serve_rounds * len(systems))
    seconds = interleave(measures, effort.serve_rounds, warmup=0, done=advance)
    rows = compare(seconds, titles, ROWS, batch=effort.streams, per_call=1)
    speed = {titles[n]: median(throughput(a) for a in s.answers) for n, s in systems.items()}
    found = [_with_speed(row, speed, effort) for row in rows]
    rate = LOAD * effort.serve_requests / median(seconds[TENANTS])
    return Measured(found), rate


def _with_speed(row: Row, speed: Mapping[str, float], effort: Effort) -> Row:
    extra = {
        **row.extra,
        "tokens_per_s": round(speed[row.variant], 1),
        "reference_tokens_per_s": round(speed[row.reference], 1),
    }
    adapters = effort.serve_adapters if row.adapters else 0
    return replace(row, extra=extra, adapters=adapters)


def _at_rate(
    systems: Mapping[str, Serving],
    titles: Mapping[str, str],
    effort: Effort,
    begin: Begin,
    rate: float,
) -> Measured:
    """Rows of quantiles of latencies, one value per round, and all of the latencies for the picture."""
    measures: dict[str, Measure] = dict(systems)
    advance = begin(f"serve, {rate:.2g} requests a second", effort.open_rounds * len(systems))
    interleave(measures, effort.open_rounds, warmup=0, done=advance)
    rows = []
    for kind, share in LATENCIES:
        values = {
            name: [quantile(latencies(answers)[kind], share) for answers in system.answers]
            for name, system in systems.items()
        }
        what = f"{NAMES[kind]}, {share:.0%} within"
        wanted = [
            Compared(what, TENANTS, other, adapters=effort.serve_adapters)
            for other in (BASE, GENERATE)
        ]
        if all(min(times) > 0 for times in values.values()):
            rows += compare(values, titles, wanted, batch=effort.streams, per_call=1)
    spread = {
        titles[name]: {
            kind: [
                round(quantile([v for a in system.answers for v in latencies(a)[kind]], p / 100), 6)
                for p in range(101)
            ]
            for kind in NAMES
        }
        for name, system in systems.items()
    }
    return Measured(rows, details={"rate": round(rate, 4), "quantiles": spread})
