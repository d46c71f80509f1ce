"""Traffic on a clock: requests are seen when they arrive, tokens when they are there, and quantiles are values seen."""

import pytest
import torch

from bench.fake_engine import FakeClock, FakeEngine
from loramux.bench.serving import (
    Answer,
    CpuClock,
    latencies,
    makespan,
    never_stops,
    quantile,
    serve_engine,
    serve_padded,
    throughput,
)
from loramux.bench.workload import Arrival
from pico import build_pico

ARRIVALS = [
    Arrival(at=0.0, adapter=1, prompt=(1, 2, 3), answer=3),
    Arrival(at=0.5, adapter=0, prompt=(4,), answer=2),
    Arrival(at=9.0, adapter=1, prompt=(5, 6), answer=1),
]


def test_requests_join_a_running_batch_when_they_arrive_and_idle_time_is_skipped():
    clock = FakeClock()
    engine = FakeEngine(clock=clock)
    answers = serve_engine(engine, ARRIVALS, ["popular", "rare"], clock)
    # Steps take a second: the second request arrives during the first step and takes part from the next one on.
    assert [answer.times for answer in answers] == [[1.0, 2.0, 3.0], [2.0, 3.0], [10.0]]
    assert [r.adapter for r in engine.requests.values()] == ["rare", "popular", "rare"]
    assert not engine.done and not engine.has_work()
    assert makespan(answers) == 10.0
    assert throughput(answers) == pytest.approx(0.6)
    assert latencies(answers) == {"ttft": [1.0, 1.5, 1.0], "itl": [1.0, 1.0, 1.0]}


def test_a_full_engine_makes_requests_wait():
    clock = FakeClock()
    answers = serve_engine(FakeEngine(max_batch=1, clock=clock), ARRIVALS, None, clock)
    assert [answer.times for answer in answers] == [[1.0, 2.0, 3.0], [4.0, 5.0], [10.0]]


def test_a_failed_request_is_an_error_and_not_a_short_answer():
    clock = FakeClock()
    with pytest.raises(RuntimeError, match="r1 failed while serving"):
        serve_engine(FakeEngine(clock=clock, fails={"r1"}), ARRIVALS, None, clock)


@pytest.fixture(scope="module")
def model():
    return never_stops(build_pico("llama"))


def test_a_padded_batch_takes_what_has_arrived_and_goes_on_to_its_longest_answer(model):
    class Ticking(FakeClock):
        def now(self):
            self.time += 1.0  # every look takes a second
            return self.time

    arrivals = [
        Arrival(0.0, 0, (4, 5, 6, 7), 2),
        Arrival(0.0, 0, (8, 9), 5),
        Arrival(0.0, 0, (10,), 3),
    ]
    answers = serve_padded(model, arrivals, 2, Ticking())
    assert [answer.times for answer in answers] == [
        [2.0, 3.0],
        [2.0, 3.0, 4.0, 5.0, 6.0],
        [8.0, 9.0, 10.0],  # the second batch starts after the first, of which every step counted
    ]


def test_padding_does_not_change_what_is_answered(model, monkeypatch):
    seen = []
    original = model.generate

    def spy(*args, **options):
        out = original(*args, **options)
        seen.append(out)
        return out

    monkeypatch.setattr(model, "generate", spy)
    prompt = (8, 9)
    serve_padded(model, [Arrival(0.0, 0, (4, 5, 6, 7), 6), Arrival(0.0, 0, prompt, 6)], 2)
    monkeypatch.undo()
    alone = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
    assert seen[0][1, -6:].tolist() == alone[0, -6:].tolist()


def test_the_clock_counts_work_and_skips_to_arrivals_only_forwards():
    clock = CpuClock()
    clock.skip_to(5.0)
    assert 5.0 <= clock.now() < 6.0
    clock.skip_to(2.0)
    assert clock.now() >= 5.0
    before = clock.now()
    sum(range(2_000_000))
    assert clock.now() > before


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1), (0.1, 1), (0.5, 5), (0.51, 6), (0.95, 10), (1.0, 10)]
)
def test_a_quantile_is_the_least_value_that_enough_do_not_exceed(share, expected):
    assert quantile(list(range(10, 0, -1)), share) == expected


def test_a_quantile_is_not_moved_by_the_rounding_of_its_share():
    values = list(range(1, 101))
    assert [quantile(values, percent / 100) for percent in values] == values


def test_an_answer_knows_its_latencies():
    answer = Answer(Arrival(2.0, 0, (1,), 3), [2.5, 3.0, 4.0])
    assert answer.first_token == 0.5
    assert answer.gaps == [0.5, 1.0]
