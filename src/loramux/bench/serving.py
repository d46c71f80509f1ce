"""Traffic through an engine, and through padded batches of `generate`, on a clock of CPU time.

Why not the wall clock: another process on the machine would be billed to whoever runs at that moment. The clock counts
the CPU time of this process; where nothing is left to do it jumps to the next arrival. Latencies are what they would be
on a machine that does nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from loramux.bench.workload import Arrival


class CpuClock:
    """Seconds of CPU time of this process since it was made, and what was skipped."""

    def __init__(self) -> None:
        self.start = time.process_time()
        self.skipped = 0.0

    def now(self) -> float:
        return time.process_time() - self.start + self.skipped

    def skip_to(self, at: float) -> None:
        self.skipped += max(0.0, at - self.now())


@dataclass(eq=False)
class Answer:
    """A request and when each of its tokens was there."""

    arrival: Arrival
    times: list[float] = field(default_factory=list)

    @property
    def first_token(self) -> float:
        """Seconds from arrival to the first token."""
        return self.times[0] - self.arrival.at

    @property
    def gaps(self) -> list[float]:
        """Seconds between a token and the one before."""
        return [b - a for a, b in pairwise(self.times)]


def serve_engine(
    engine: Any, arrivals: Sequence[Arrival], names: Sequence[str] | None, clock: Any = None
) -> list[Answer]:
    """Run all of it; `names` are the adapters by popularity, None for the bare base."""
    from loramux.engine.request import Request, SamplingParams

    clock = clock or CpuClock()
    answers = [Answer(arrival) for arrival in arrivals]
    running: dict[str, Answer] = {}
    waiting = 0
    while waiting < len(answers) or running:
        while waiting < len(answers) and answers[waiting].arrival.at <= clock.now():
            arrival = answers[waiting].arrival
            params = SamplingParams(max_tokens=arrival.answer, ignore_eos=True)
            adapter = None if names is None else names[arrival.adapter]
            asked = Request(
                prompt=arrival.prompt, adapter=adapter, params=params, tenant=f"{arrival.adapter}"
            )
            running[engine.add_request(asked)] = answers[waiting]
            waiting += 1
        if not running:
            clock.skip_to(answers[waiting].arrival.at)
            continue
        _note(engine, running, clock)
    for answer in answers:
        _check(answer)
    return answers


def _note(engine: Any, running: dict[str, Answer], clock: Any) -> None:
    """One step, and when its tokens were there."""
    deltas = engine.step()
    now = clock.now()
    if not deltas:
        time.sleep(0)  # an adapter may be on its way, in another thread
    for delta in deltas:
        if delta.error is not None:
            raise RuntimeError(f"request {delta.request_id} failed while serving: {delta.error}")
        running[delta.request_id].times += [now] * len(delta.token_ids)
        if delta.finish_reason is not None:
            engine.completion(delta.request_id)
            del running[delta.request_id]


def serve_padded(
    model: Any, arrivals: Sequence[Arrival], streams: int, clock: Any = None
) -> list[Answer]:
    """Batches of what has arrived, at most `streams`, padded on the left, each until its longest answer is done.

    A request takes no part in its batch beyond the tokens it asked for, but the batch goes on.
    """
    clock = clock or CpuClock()
    answers = [Answer(arrival) for arrival in arrivals]
    waiting = 0
    while waiting < len(answers):
        clock.skip_to(answers[waiting].arrival.at)
        now = clock.now()
        ready = [a for a in answers[waiting : waiting + streams] if a.arrival.at <= now]
        _generate(model, ready, clock)
        waiting += len(ready)
    for answer in answers:
        _check(answer)
    return answers


def _generate(model: Any, ready: Sequence[Answer], clock: Any) -> None:
    longest = max(len(answer.arrival.prompt) for answer in ready)
    ids_BT = torch.zeros(len(ready), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, answer in enumerate(ready):
        prompt = torch.tensor(answer.arrival.prompt)
        ids_BT[row, -len(prompt) :], mask_BT[row, -len(prompt) :] = prompt, 1

    def note(input_ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        now = clock.now()
        for answer in ready:
            if len(answer.times) < answer.arrival.answer:
                answer.times.append(now)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    with torch.no_grad():
        model.generate(
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=max(answer.arrival.answer for answer in ready),
            do_sample=False,
            stopping_criteria=[note],
        )


def never_stops(model: Any) -> Any:
    """`model` without an end of text: answers are as long as was asked, as in the engine."""
    for config in (model.generation_config, model.config):
        config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _check(answer: Answer) -> None:
    if len(answer.times) != answer.arrival.answer:
        raise RuntimeError(
            f"a request for {answer.arrival.answer} tokens was answered with {len(answer.times)}"
        )


def makespan(answers: Sequence[Answer]) -> float:
    """Seconds from the first arrival to the last token."""
    return max(a.times[-1] for a in answers) - min(a.arrival.at for a in answers)


def throughput(answers: Sequence[Answer]) -> float:
    """Answer tokens per second, all requests together."""
    return sum(len(a.times) for a in answers) / makespan(answers)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all values does not exceed."""
    ordered = sorted(values)
    needed = math.ceil(len(ordered) * share - 1e-9)  # 100 * 0.07 is a little more than 7
    return ordered[max(0, needed - 1)]


def latencies(answers: Sequence[Answer]) -> Mapping[str, list[float]]:
    """Seconds to the first token, and between tokens."""
    return {
        "ttft": [a.first_token for a in answers],
        "itl": [gap for a in answers for gap in a.gaps],
    }
