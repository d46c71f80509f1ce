"""MoLoRA: soft weights that leave nothing out, and how it starts. Its twin MoV is no LoRA and not here."""

import pytest
import torch

from methods.bridge import adapter_of
from methods.site_mixture_case import attached, run


def test_the_weights_of_a_token_sum_to_one_and_none_is_zero():
    model, handle = attached("molora")
    run(model, handle)
    for record in handle.routing():
        torch.testing.assert_close(record.gates.sum(1), torch.ones(len(record.gates)))
        assert bool((record.gates > 0).all())


def test_a_and_gates_start_normal_with_a_deviation_of_two_hundredths():
    _, handle = attached("molora", fresh=True, num_experts=10)
    adapter = adapter_of(handle)
    for values in (
        [rows.a for rows in adapter.rows.values()],
        [router.weight for router in adapter.routers.values()],  # type: ignore[union-attr]
    ):
        assert float(torch.cat([v.detach().reshape(-1) for v in values]).std()) == pytest.approx(
            0.02, rel=0.05
        )


def test_an_initialisation_that_was_asked_for_is_kept():
    _, handle = attached("molora", fresh=True, init_lora_weights="gaussian")
    stacked = torch.cat([rows.a.detach().reshape(-1) for rows in adapter_of(handle).rows.values()])
    assert float(stacked.std()) == pytest.approx(1 / 4, rel=0.1)


def test_there_is_no_auxiliary_loss():
    model, handle = attached("molora")
    run(model, handle)
    assert handle.aux_losses() == {}
