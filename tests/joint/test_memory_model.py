"""Memory is counted exactly, predicted before a job starts, kept under a limit, and made when it runs out."""

import random
from typing import Any

import pytest
import torch

from joint.jobs import attached, job, solo_of, tiny, weights
from loramux.errors import RecipeError
from loramux.recipe.sizes import parse_bytes
from loramux.train import Listener, StepEvent, Trainer
from loramux.train.joint import JointTrainer
from loramux.train.joint.forward import JointForward
from loramux.train.joint.guard import resident_bytes
from loramux.train.joint.leastsq import nonnegative_fit
from loramux.train.joint.memory import CallShape, HighWater, MemoryModel
from loramux.train.joint.table import rows

DOUBLE = torch.float64
NAMES = ["lora", "milora", "mixlora"]


def run(names: list[str] = NAMES, *listeners: Listener, **options: Any) -> tuple[JointTrainer, Any]:
    jobs = options.pop("jobs", None) or [job(name, steps=6) for name in names]
    base = tiny(dtype=DOUBLE)
    handle = attached(base, [each.name for each in jobs], DOUBLE)
    trainer = JointTrainer(base, handle, jobs, listeners=listeners, **options)
    return trainer, {result.name: result for result in trainer.run()}


def same_as_solo(trainer: JointTrainer, names: list[str]) -> None:
    for name in names:
        want, _ = solo_of(name, 6)
        for key, value in weights(trainer.handle, name).items():
            torch.testing.assert_close(value, want[key], rtol=0, atol=1e-9, msg=f"{name} {key}")


def test_the_high_water_counts_what_lives_at_once_and_views_cost_nothing() -> None:
    there = torch.ones(100, 100)
    with HighWater() as counted:
        a = torch.ones(1000)
        b = a.double()
        assert counted.now == 4000 + 8000
        del a
        assert counted.now == 8000
        c, d = there[:50], b.view(10, 100)
        assert counted.now == 8000
        del b
        assert counted.now == 8000, "a view keeps its storage"
        del d
    assert (counted.now, counted.peak) == (0, 12000)
    assert c.shape == (50, 100)


def test_coefficients_of_exact_data_are_found_and_never_negative() -> None:
    draw = random.Random(0)
    for _ in range(20):
        want = [draw.choice([0.0, draw.uniform(1, 1e6)]) for _ in range(4)]
        model = MemoryModel()
        shapes = [
            CallShape(draw.randint(1, 16), draw.randint(8, 512), draw.randint(1, 99))
            for _ in range(12)
        ]
        for shape in shapes:
            size = sum(c * value for c, value in zip(want, shape.features(), strict=True))
            model.learn("a", shape, size)
        new = CallShape(3, 700, 50)
        size = sum(c * value for c, value in zip(want, new.features(), strict=True))
        assert model.predict("a", new) == pytest.approx(size, rel=1e-6)
    found = nonnegative_fit([[1, 1], [1, 2], [1, 3]], [3.0, 2.0, 1.0])
    assert found[1] == 0
    assert found[0] == pytest.approx(2.0)


def test_the_margin_follows_the_error_of_predictions_made_beforehand() -> None:
    model = MemoryModel()
    for length in (10, 20, 40):
        model.learn("a", CallShape(2, length), 1000.0 * length)
    assert model.margin == 0.05
    for length in range(11, 19):
        assert model.check({"a": CallShape(2, length)}, 1000.0 * length) == pytest.approx(0)
    assert model.margin == 0.01
    model.errors[:] = [0.1, -0.1] * 4
    assert model.margin == pytest.approx(0.2)
    again = MemoryModel.restored(model.state())
    assert again.predict("a", CallShape(2, 30)) == model.predict("a", CallShape(2, 30))


@pytest.fixture(scope="module")
def free() -> JointTrainer:
    """A run that was measured and had no limit."""
    return run(memory="measured")[0]


def test_measuring_changes_nothing_and_predicts_calls_within_a_fifth(free: JointTrainer) -> None:
    plain, _ = run()
    trainer = free
    for name in NAMES:
        want, have = weights(plain.handle, name), weights(trainer.handle, name)
        assert all(torch.equal(have[key], want[key]) for key in want)
    report = trainer.figures()["memory"]
    assert report["measured_calls"] >= 6
    assert report["mean_error"] < 0.2
    assert report["limit"] is None


def test_calls_and_admission_stay_under_the_limit_and_nobody_loses_by_it(
    free: JointTrainer,
) -> None:
    assert free.guard is not None
    largest = max(free.guard.largest.values())
    resident = {r.job.name: resident_bytes(r) for r in free.runners}
    # Room for two of the three jobs, and for calls of little more than one of them.
    limit = sum(sorted(resident.values())[-2:]) + int(largest * 1.1)
    seen: list[tuple[int, float]] = []
    shared: list[Any] = []
    lacking: set[str] = set()

    class Watched(JointForward):
        def __call__(self, parts: Any) -> Any:
            guard = made.guard
            assert guard is not None
            if all(guard.model.knows(part.name) for part in parts):  # it is being measured before
                seen.append((guard.resident, guard.predicted(parts)))
                shared[:] = parts if len(parts) > 1 else shared
                lacking.update(row["job"] for row in rows(made) if row["status"] == "held")
            return super().__call__(parts)

    base = tiny(dtype=DOUBLE)
    handle = attached(base, NAMES, DOUBLE)
    made = JointTrainer(base, handle, [job(n, steps=6) for n in NAMES], memory=limit)
    made.calls.joint = Watched(base, handle, made.forward)
    assert [result.status for result in made.run()] == ["finished"] * 3
    assert all(held + call <= limit for held, call in seen)
    assert len({held for held, _ in seen}) > 1, "the third job came in when another had ended"
    assert lacking == {"mixlora"}, "the table says who waits for memory"
    same_as_solo(made, NAMES)
    # Room for one of these parts: they are no longer laid into one call.
    assert made.guard is not None
    assert len(list(made.calls.groups([(None, part) for part in shared]))) == 1  # type: ignore[misc]
    made.guard.resident = 0
    made.guard.limit = int(1.3 * max(made.guard.predicted([part]) for part in shared))
    groups = list(made.calls.groups([(None, part) for part in shared]))  # type: ignore[misc]
    assert len(groups) == len(shared) > 1


def test_a_job_that_can_never_fit_is_refused_before_its_first_step(free: JointTrainer) -> None:
    assert free.guard is not None
    limit = int(1.2 * max(resident_bytes(r) + free.guard.largest[r.job.name] for r in free.runners))
    wide = job("lora-wide", "lora", steps=6, micro_batch_size=24, train=job("lora").train * 2)
    trainer, results = run(memory=limit, jobs=[wide, job("milora", steps=6)])
    assert (results["lora-wide"].status, results["lora-wide"].steps) == ("failed", 0)
    assert "joint.memory allows" in results["lora-wide"].reason
    assert "micro_batch_size" in results["lora-wide"].reason
    same_as_solo(trainer, ["milora"])


def test_sizes_are_read_with_their_units_and_anything_else_is_refused() -> None:
    assert parse_bytes("6GiB") == 6 * 2**30
    assert parse_bytes("1.5 mb") == 1_500_000
    assert parse_bytes(4096) == 4096
    assert parse_bytes("measured") is None
    for wrong in ("lots", "0GiB", "-3GB", "5 parsecs"):
        with pytest.raises(RecipeError, match="is no size of memory"):
            parse_bytes(wrong)


class Priorities(Listener):
    """Runs out of memory once, in the fourth step of a job, until somebody has moved away."""

    def __init__(self, name: str):
        self.name = name
        self.is_full = False
        self.away: list[str] = []

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        self.is_full |= (event.job, event.step) == (self.name, 3) and not self.away


@pytest.mark.parametrize("name", ["lora", "mixlora"])
def test_out_of_memory_moves_the_least_important_job_away_and_all_end_as_if_it_had_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Priorities(name)
    original = JointForward.alone

    def alone(self: JointForward, part: Any) -> Any:
        away = [e.name for e in trainers[0].entries.values() if e.is_away]
        if watch.is_full and not away:
            raise torch.OutOfMemoryError("no memory")
        watch.away += away
        watch.is_full = False
        return original(self, part)

    monkeypatch.setattr(JointForward, "alone", alone)
    jobs = [
        job("lora", steps=6, priority=2),
        job("milora", steps=6, priority=1),
        job("mixlora", steps=6),
    ]
    base = tiny(dtype=DOUBLE)
    handle = attached(base, NAMES, DOUBLE)
    made = JointTrainer(base, handle, jobs, listeners=(watch,), max_tokens=1)
    trainers = [made]
    assert [result.status for result in made.run()] == ["finished"] * 3
    # The job itself waits if it is the least important one.
    assert set(watch.away) == {"mixlora"}
    assert made.entries["mixlora"].last_round > made.entries["milora"].last_round
    same_as_solo(made, NAMES)
