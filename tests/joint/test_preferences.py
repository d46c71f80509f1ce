"""Preference jobs beside others: what they are alone, and their references stay what they were."""

from typing import Any

import pytest
import torch

from joint.jobs import Seen, attached, job, tiny, weights
from loramux.recipe import DpoConfig
from loramux.train import Trainer
from loramux.train.joint import JointTrainer
from train.toys import pairs

REFERENCE = "lora-reference"


def run(jobs: list[Any], trainer: type[Trainer], dtype: torch.dtype) -> tuple[Any, Seen]:
    base = tiny(dtype=dtype)
    handle = attached(base, [*(each.name for each in jobs), REFERENCE], dtype)
    handle.adapters[REFERENCE].set_trainable(False)
    seen = Seen()
    trainer(base, handle, jobs, listeners=(seen,)).run()
    return handle, seen


def preference_jobs(steps: int) -> list[Any]:
    first = DpoConfig(name="dpo", label_smoothing=0.1)
    second = DpoConfig(name="dpo", loss_type="ipo", reference=REFERENCE)
    return [
        job("lora", steps=steps, train=pairs(5), objective=first, validation=pairs(2), eval_every=2),
        job("mixlora", steps=steps, train=pairs(4, seed=1), objective=second),
        job("dora", steps=steps, train=pairs(6, seed=2), objective=first, micro_batch_size=1,
            gradient_accumulation_steps=2),
    ]  # fmt: skip


def test_preference_jobs_beside_others_end_with_the_weights_of_their_solo_runs_to_1e_9() -> None:
    jobs = [*preference_jobs(4), job("milora", steps=2)]
    handle, seen = run(jobs, JointTrainer, torch.float64)
    for each in jobs:
        alone, solo = run([each], Trainer, torch.float64)
        want, have = weights(alone, each.name), weights(handle, each.name)
        for key, value in want.items():
            torch.testing.assert_close(
                have[key], value, rtol=0, atol=1e-9, msg=f"{each.name} {key}"
            )
        assert seen.losses[each.name] == pytest.approx(solo.losses[each.name], abs=1e-6)
    before, _ = run([job("milora", steps=1)], Trainer, torch.float64)
    assert all(
        torch.equal(value, weights(before, REFERENCE)[key])
        for key, value in weights(handle, REFERENCE).items()
    )


def test_a_preference_job_alone_in_a_joint_run_has_the_bits_of_its_solo_run() -> None:
    for each in preference_jobs(2)[:2]:
        handle, seen = run([each], JointTrainer, torch.float32)
        alone, solo = run([each], Trainer, torch.float32)
        have, want = weights(handle, each.name), weights(alone, each.name)
        assert all(torch.equal(have[key], value) for key, value in want.items())
        assert seen.losses == solo.losses
