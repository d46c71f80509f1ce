"""Activations that wait on the host change no bit of a job, alone or beside others; weights stay where they are."""

from typing import Any

import pytest
import torch

from joint.jobs import attached, job, solo, tiny, weights
from loramux.train.joint import JointTrainer
from loramux.train.offload import Offload


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_job_ends_with_the_bits_of_one_whose_activations_stay(checkpointing: bool) -> None:
    given: dict[str, Any] = {"steps": 2, "gradient_checkpointing": checkpointing}
    plain, _ = solo(job("mixlora", **given))
    away, _ = solo(job("mixlora", **given, offload_activations=True))
    assert all(torch.equal(away[key], plain[key]) for key in plain)


def test_jobs_of_one_call_too_and_the_next_run_keeps_them_again() -> None:
    names = ["lora", "smora"]
    found = []
    for offload in (False, True):
        base = tiny()
        handle = attached(base, names)
        jobs = [job(name, steps=2, offload_activations=offload) for name in names]
        trainer = JointTrainer(base, handle, jobs)
        trainer.run()
        assert trainer.forward.offload is None
        found.append({name: weights(handle, name) for name in names})
    for name in names:
        assert all(torch.equal(found[1][name][key], value) for key, value in found[0][name].items())


def test_activations_are_copied_and_weights_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny()
    handle = attached(base, ["lora"])
    offload = Offload(base)
    copied: list[tuple[int, ...]] = []
    kept: list[int] = []
    pack = Offload._pack

    def note(self: Offload, tensor: torch.Tensor) -> Any:
        found = pack(self, tensor)
        if isinstance(found, tuple):
            copied.append(tuple(tensor.shape))
        else:
            kept.append(tensor.untyped_storage().data_ptr())
        return found

    monkeypatch.setattr(Offload, "_pack", note)
    with offload.saving():
        logits = base(torch.arange(4, 68).view(2, 32)).logits
    logits.sum().backward()
    assert (2, 32, 32) in copied or (64, 32) in copied
    own = {p.untyped_storage().data_ptr() for p in base.parameters()}
    assert own & set(kept)
    assert handle.trainable_parameters()
