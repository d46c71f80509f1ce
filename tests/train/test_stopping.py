"""Hopeless jobs are stopped by their own losses, only where that was asked for, and the same again when resumed."""

import math
from pathlib import Path
from typing import Any

import pytest

from joint.jobs import attached, job, tiny
from loramux.recipe import StopConfig
from loramux.train import Listener, StepEvent, Trainer
from loramux.train.joint import JointTrainer
from loramux.train.stopping import Stopping, fit_power_law


def stopped_at(losses: list[float], num_steps: int = 1000, **config: Any) -> tuple[int, str]:
    rule = Stopping(StopConfig(**config), num_steps)
    for step, loss in enumerate(losses, start=1):
        # As a resumed run would: from what is written down.
        rule = Stopping(rule.config, num_steps, rule.state)
        why = rule.after_step(step, loss)
        if why:
            return step, why
    return 0, ""


def test_a_loss_that_grows_to_twice_its_lowest_is_stopped_after_twenty_steps() -> None:
    falling = [3.0 * 0.99**step for step in range(200)]
    step, why = stopped_at([*falling, *[9.0] * 100], converged=False)
    assert 220 <= step < 240
    assert why.startswith("diverged: ")
    assert stopped_at([*falling, *[9.0] * 100], converged=False, diverged=False) == (0, "")
    assert stopped_at([*falling, 4.0, *falling[-1:] * 100], converged=False) == (0, ""), (
        "one bad batch is not enough"
    )


def test_a_loss_that_stands_still_is_stopped_and_one_that_falls_is_not() -> None:
    step, why = stopped_at([1.0] * 500)
    assert (step, why.split(":")[0]) == (150, "converged")
    assert stopped_at([1.0] * 99, 1000) == (0, ""), "a tenth of all steps comes first"
    assert stopped_at([3.0 * 0.999**step for step in range(500)]) == (0, "")


def test_a_power_law_is_found_and_stops_a_job_whose_last_steps_gain_nothing() -> None:
    a, b, c = fit_power_law(range(1, 40), [1.5 + 2.0 * t**-0.5 for t in range(1, 40)])
    assert a + b * 4000**-c == pytest.approx(1.5 + 2.0 * 4000**-0.5, abs=0.05)
    curve = [1.5 + 2.0 * t**-0.8 for t in range(1, 401)]
    step, why = stopped_at(curve, 400, predicted_gain=0.01, converged=False)
    assert 80 < step < 400
    assert "not worth its last steps" in why
    early = 1.5 + 2.0 * (step / 2) ** -0.8
    end = 1.5 + 2.0 * 400**-0.8
    assert (early - end) / early > 0.01, "it was not stopped long before"
    assert stopped_at(curve, 400, converged=False) == (0, "")


def test_in_a_joint_run_one_is_stopped_the_others_go_on_and_a_resumed_run_decides_the_same(
    tmp_path: Path,
) -> None:
    config = StopConfig(warmup=3, every=1, patience=2, min_gain=0.9, diverged=False)

    class StopAfter(Listener):
        def stepped(self, trainer: Trainer, event: StepEvent) -> None:
            if trainer.round == 4:
                trainer.stop()

    def run(out: Path, *listeners: Listener) -> list[Any]:
        base = tiny()
        handle = attached(base, ["lora", "milora"])
        jobs = [job("lora", steps=9, stop=config), job("milora", steps=9)]
        made = JointTrainer(base, handle, jobs, out=out, resume=True, listeners=listeners)
        return made.run()

    first, second = run(tmp_path / "unbroken")
    assert first.status == "stopped_early"
    assert first.reason.startswith("converged")
    assert first.steps < 9
    assert (second.status, second.steps) == ("finished", 9)
    run(tmp_path / "broken", StopAfter())
    again, _ = run(tmp_path / "broken")
    assert (again.steps, again.reason) == (first.steps, first.reason)
    assert not math.isnan(again.train_loss)
