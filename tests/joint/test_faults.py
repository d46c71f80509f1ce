"""A job that fails stops alone: with a reason, with the weights of its last whole step, no trace elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from joint.jobs import METHODS, Seen, attached, job, solo, solo_of, tiny, weights
from loramux.core.linear import LoraLinear
from loramux.data import Example
from loramux.train import Listener, StepEvent, Trainer
from loramux.train.joint import JointTrainer
from loramux.train.runner import JobRunner

DOUBLE = torch.float64
OTHERS = ("milora", "mixlora")


class After(Listener):
    """Does something to the run after a step of a job."""

    def __init__(self, name: str, step: int, act: Any):
        self.name, self.step, self.act = name, step, act

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        if (event.job, event.step) == (self.name, self.step):
            self.act(trainer)


def run(jobs: list[Any], *listeners: Listener, **options: Any) -> tuple[Any, Any, Seen]:
    base = tiny(dtype=DOUBLE)
    handle = attached(base, [each.name for each in jobs], DOUBLE)
    seen = Seen()
    trainer = JointTrainer(base, handle, jobs, listeners=(seen, *listeners), **options)
    results = {result.name: result for result in trainer.run()}
    return handle, results, seen


def others_are_untouched(handle: Any, results: Any, steps: int = 6) -> None:
    for name in OTHERS:
        assert results[name].status == "finished"
        want, _ = solo_of(name, steps)
        for key, value in weights(handle, name).items():
            torch.testing.assert_close(value, want[key], rtol=0, atol=1e-9, msg=f"{name} {key}")


def with_others(bad: Any, steps: int = 6) -> list[Any]:
    return [bad, *(job(name, steps=steps) for name in OTHERS)]


def test_weights_that_turn_into_nan_reach_nobody_else() -> None:
    def poison(trainer: Trainer) -> None:
        next(iter(trainer.handle.trainable_parameters("lora").values())).data.fill_(float("nan"))

    handle, results, _ = run(with_others(job("lora", steps=6)), After("lora", 2, poison))
    assert results["lora"].status == "failed"
    assert results["lora"].steps == 2
    assert "step 3 is not finite" in results["lora"].reason
    others_are_untouched(handle, results)


def test_a_rate_that_is_too_high_stops_the_job_with_its_last_finite_weights(tmp_path: Path) -> None:
    bad = job("lora", steps=6, learning_rate=1e200, max_grad_norm=1e9)
    _, results, _ = run(with_others(bad), out=tmp_path)
    assert results["lora"].status == "failed"
    assert "learning_rate" in results["lora"].reason
    assert [results[name].status for name in OTHERS] == ["finished"] * 2
    assert (tmp_path / "milora" / "adapter").is_dir()


def test_the_adapter_of_a_failed_job_is_that_of_its_last_whole_step(tmp_path: Path) -> None:
    kept: dict[str, torch.Tensor] = {}

    def look(trainer: Trainer) -> None:
        kept.update(weights(trainer.handle, "lora"))

    rows = list(job("lora").train)
    broken = Example.build("toy", [7, 8, 10_000], [False, False, True])
    bad = job("lora", steps=6, train=[*rows[:5], broken], micro_batch_size=1, group_by_length=False)
    _, results, seen = run([bad, *(job(n, steps=6) for n in OTHERS)], out=tmp_path)
    result = results["lora"]
    assert result.status == "failed"
    assert "token id 10000 is outside the base's vocabulary of 96" in result.reason
    assert result.steps == len(seen.losses.get("lora", []))
    # The same steps again, watched, without the row that breaks them.
    again = job(
        "lora", steps=6, train=[*rows[:5], broken], micro_batch_size=1, group_by_length=False
    )
    run([again, *(job(n, steps=6) for n in OTHERS)], After("lora", result.steps, look))
    loaded = loramux.load(tiny(dtype=DOUBLE), tmp_path / "lora" / "adapter")
    have = weights(loaded, "default")
    assert kept and have.keys() == kept.keys()
    for key, value in kept.items():
        torch.testing.assert_close(have[key], value, rtol=1e-6, atol=1e-6)


def exhausting(monkeypatch: pytest.MonkeyPatch, limit: Any, when: Any = lambda: True) -> list[int]:
    """The base runs out of memory where a linear is given more than `limit` rows."""
    sizes: list[int] = []
    original = LoraLinear._planned

    def planned(self: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        sizes.append(rows)
        if rows > limit and when():
            raise torch.OutOfMemoryError(f"no memory for {rows} rows")
        return original(self, x)

    monkeypatch.setattr(LoraLinear, "_planned", planned)
    return sizes


def test_a_job_that_needs_too_much_memory_alone_stops_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exhausting(monkeypatch, 250)
    large = job("lora", steps=6, micro_batch_size=24, train=list(job("lora").train) * 2)
    handle, results, _ = run(with_others(large))
    assert results["lora"].status == "failed"
    assert results["lora"].steps == 0
    assert "out of memory" in results["lora"].reason
    assert "micro_batch_size" in results["lora"].reason
    assert "each is run alone" in caplog.text
    others_are_untouched(handle, results)


def test_jobs_that_only_fit_one_by_one_are_run_one_by_one_and_lose_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = exhausting(monkeypatch, 60)
    handle, results, _ = run([job(name, steps=6) for name in OTHERS])
    assert max(sizes) > 60
    others_are_untouched(handle, results)


def test_an_error_in_one_methods_code_stops_its_job_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(trainer: Trainer) -> None:
        def forward(*_: Any) -> None:
            raise KeyError("a bug of this router")

        router = next(iter(trainer.handle.adapters["mixlora-bad"].routers.values()))
        monkeypatch.setattr(router, "forward", forward)

    bad = job("mixlora-bad", "mixlora", steps=6)
    handle, results, _ = run(with_others(bad), After("mixlora-bad", 3, breaks))
    assert results["mixlora-bad"].status == "failed"
    assert results["mixlora-bad"].steps == 3
    assert "KeyError" in results["mixlora-bad"].reason
    others_are_untouched(handle, results)


def test_a_validation_that_fails_stops_its_job_only(monkeypatch: pytest.MonkeyPatch) -> None:
    original = JobRunner._validation_means

    def validate(self: JobRunner) -> list[float]:
        if self.job.name == "lora" and self.state.step == 4:
            raise torch.OutOfMemoryError("no memory for the logits")
        return original(self)

    monkeypatch.setattr(JobRunner, "_validation_means", validate)
    rows = job("lora").train[:4]
    bad = job("lora", steps=6, validation=rows, eval_every=2)
    handle, results, _ = run(with_others(bad))
    assert results["lora"].status == "failed"
    assert "the validation after" in results["lora"].reason
    others_are_untouched(handle, results)


def test_a_base_that_cannot_be_shared_trains_by_turns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from loramux.train.joint import trainer as module

    monkeypatch.setattr(module, "why_not_joint", lambda *_: "its rows would see each other")
    base = tiny()
    handle = attached(base, ["lora", "mixlora"])
    JointTrainer(base, handle, [job("lora"), job("mixlora")]).run()
    assert "by turns: its rows would see each other" in caplog.text
    for name in ("lora", "mixlora"):
        want, _ = solo(job(name))
        have = weights(handle, name)
        assert all(torch.equal(have[key], want[key]) for key in want)


def test_the_trial_finds_attention_that_does_not_go_by_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loramux.train.joint import attention
    from loramux.train.joint.trial import why_not_joint

    base = tiny()
    handle = attached(base, ["lora"])
    assert why_not_joint(base, handle) == ""
    original = attention.attend_by_rows

    def leaky(*args: Any, **given: Any) -> Any:
        y, rest = original(*args, **given)
        return y + y.mean(1, keepdim=True), rest

    monkeypatch.setattr(attention, "attend_by_rows", leaky)
    assert "see each other" in why_not_joint(base, handle)
    assert not base.training
    assert METHODS.keys() >= {"lora"}
