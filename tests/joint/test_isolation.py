"""Jobs trained together are the jobs trained alone: losses, gradients, weights, random numbers."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from joint.jobs import METHODS, Seen, attached, job, solo, tiny, weights
from loramux.train.joint import JointTrainer
from loramux.train.joint.forward import JointForward


def together(
    jobs: list[Any], family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, Seen, JointTrainer]:
    base = tiny(family, dtype)
    handle = attached(base, [each.name for each in jobs], dtype)
    seen = Seen()
    trainer = JointTrainer(base, handle, jobs, listeners=(seen,), **options)
    trainer.run()
    return handle, seen, trainer


def test_unlike_jobs_end_with_the_weights_of_their_solo_runs_to_1e_9_over_100_steps() -> None:
    jobs = [job(name, steps=100) for name in METHODS]
    handle, seen, _ = together(jobs, dtype=torch.float64)
    for each in jobs:
        want, alone = solo(each, dtype=torch.float64)
        have = weights(handle, each.name)
        assert have.keys() == want.keys()
        for key, value in want.items():
            torch.testing.assert_close(
                have[key], value, rtol=0, atol=1e-9, msg=f"{each.name} {key}"
            )
        assert seen.losses[each.name] == pytest.approx(alone.losses[each.name], abs=1e-9)
        assert seen.norms[each.name] == pytest.approx(alone.norms[each.name], abs=1e-9)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "phi3"])
def test_sliding_windows_dropout_of_the_base_and_fused_linears_stay_apart_too(family: str) -> None:
    jobs = [job("lora", steps=6), job("mixlora", steps=6), job("milora", steps=4)]
    handle, _, trainer = together(jobs, family, torch.float64)
    assert not trainer.calls.obstacle
    for each in jobs:
        want, _ = solo(each, family, torch.float64)
        for key, value in weights(handle, each.name).items():
            torch.testing.assert_close(
                value, want[key], rtol=0, atol=1e-9, msg=f"{each.name} {key}"
            )


def test_losses_and_gradients_of_fp32_are_those_of_solo_steps_from_equal_state_to_1e_5() -> None:
    jobs = [job(name, steps=6) for name in METHODS]
    base = tiny()
    handle = attached(base, list(METHODS))
    trainer = JointTrainer(base, handle, jobs)
    pairs: list[tuple[Any, Any]] = []

    class Both(JointForward):
        """Runs every part alone as well, from the same state, before it runs them together."""

        def __call__(self, parts: Any) -> Any:
            alone = []
            for part in parts:
                counts = counts_of(handle, part.name)
                rng = dict(part.rng)
                alone.append((self.alone(part), dict(part.rng)))
                part.rng.update(rng)
                put_counts(handle, part.name, counts)
            found = super().__call__(parts)
            for part, one, (other, rng) in zip(parts, found, alone, strict=True):
                assert torch.equal(part.rng["cpu"], rng["cpu"]), part.name
                # Clipping scales the tensors themselves later.
                grads = tuple(None if grad is None else grad.clone() for grad in one.grads)
                pairs.append((replace(one, grads=grads), other))
            return found

    trainer.calls.joint = Both(base, handle, trainer.forward)
    trainer.run()
    assert len(pairs) >= 30
    for one, other in pairs:
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.aux, other.aux, rtol=1e-5, atol=1e-5)
        for mine, want in zip(one.grads, other.grads, strict=True):
            assert (mine is None) == (want is None)
            if mine is not None:
                torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)


def counts_of(handle: Any, name: str) -> list[Any]:
    routers = handle.adapters[name].routers.values()
    return [(getattr(r, "counts", None), getattr(r, "_stepped_from", None)) for r in routers]


def put_counts(handle: Any, name: str, counts: list[Any]) -> None:
    for router, (own, stepped) in zip(handle.adapters[name].routers.values(), counts, strict=True):
        if hasattr(router, "counts"):
            router.counts, router._stepped_from = own, stepped


def test_a_job_alone_in_a_joint_run_has_the_bits_of_its_solo_run() -> None:
    each = job("mixlora")
    handle, seen, _ = together([each])
    want, alone = solo(each)
    have = weights(handle, "mixlora")
    assert all(torch.equal(have[key], want[key]) for key in want)
    assert seen.losses == alone.losses


def test_packed_rows_see_their_own_samples_only() -> None:
    packed = job("lora", packing=True, sequence_len=32, steps=6)
    others = [job("mixlora", steps=6, packing=True, sequence_len=40), job("milora", steps=6)]
    handle, _, _ = together([packed, *others], dtype=torch.float64)
    plain = job("lora", steps=6)
    want, _ = solo(packed, dtype=torch.float64)
    have = weights(handle, "lora")
    for key, value in want.items():
        torch.testing.assert_close(have[key], value, rtol=0, atol=1e-9)
    unpacked, _ = solo(plain, dtype=torch.float64)
    # Dropout is drawn for other rows, so only the size of the difference says that nothing leaked.
    assert max(float((have[k] - unpacked[k]).abs().max()) for k in unpacked) < 0.5


def test_activation_checkpointing_draws_and_routes_the_same_again() -> None:
    names = ["lora", "mixlora", "smora"]
    plain, _, _ = together([job(name, steps=4) for name in names], dtype=torch.float64)
    again, _, _ = together(
        [job(name, steps=4, gradient_checkpointing=True) for name in names], dtype=torch.float64
    )
    for name in names:
        want = weights(plain, name)
        for key, value in weights(again, name).items():
            torch.testing.assert_close(value, want[key], rtol=0, atol=1e-9, msg=f"{name} {key}")


def test_the_base_is_multiplied_once_per_linear_and_direction_whatever_the_number_of_jobs() -> None:
    def calls(names: list[str]) -> int:
        base = tiny()
        handle = attached(base, names)
        trainer = JointTrainer(base, handle, [job(name, "lora", steps=1) for name in names])
        count = 0

        def note(*_: Any) -> None:
            nonlocal count
            count += 1

        for linear in handle.linears.values():
            linear.base_layer.register_forward_hook(note)
            linear.base_layer.register_full_backward_hook(note)
        trainer.run()
        return count

    assert calls(["lora-1", "lora-2"]) == calls(["lora-1", "lora-2", "lora-3", "lora-4"])


def test_jobs_that_end_leave_the_others_as_they_were_and_the_base_untouched() -> None:
    before = {key: value.clone() for key, value in tiny().named_parameters()}
    jobs = [job("lora", steps=3), job("mixlora", steps=9)]
    handle, _, _ = together(jobs)
    want, _ = solo(jobs[1])
    for key, value in weights(handle, "mixlora").items():
        torch.testing.assert_close(value, want[key], rtol=0, atol=1e-4)
    handle.detach()
    for key, parameter in handle.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[key])


def test_the_model_attends_and_draws_as_before_when_the_run_is_over() -> None:
    base = tiny("gpt2")
    handle = attached(base, ["lora", "milora"])
    own = base.config._attn_implementation
    state = torch.get_rng_state()
    JointTrainer(base, handle, [job("lora", steps=2), job("milora", steps=2)]).run()
    assert base.config._attn_implementation == own
    assert "loramux_rows" not in vars(base.config)
    assert torch.equal(torch.get_rng_state(), state)
    assert not base.training
    assert all("forward" not in vars(module) for module in base.modules())
