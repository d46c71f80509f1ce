"""LoRAMoE: the localised balancing loss, where its minimum lies, and what it needs to know of a row."""

from typing import Any

import pytest
import torch
from torch import Tensor

import loramux
from loramux.core.mixing import localised_weights, spread
from loramux.core.types import RouteRecord
from loramux.data import Example
from loramux.methods.loramoe import LoRAMoEConfig, localised_balance
from loramux.train import Job, Trainer, TrainingConfig
from methods.bridge import adapter_of, same_gradients
from methods.site_mixture_case import ASKED, MASK, attached, config_of, oracle, run
from oracles import site_mixture
from pico import build_pico

TYPES = {"ask": 1, "sing": 0}
ORIENTATIONS = ("code", "specialise")


def record_of(
    probs_NE: Tensor, request: list[int], tasks: tuple[str | None, ...], valid: Tensor | None = None
) -> RouteRecord:
    num = probs_NE.shape[1]
    return RouteRecord(
        adapter="default",
        path="site",
        layer=0,
        when="token",
        columns=tuple(map(str, range(num))),
        weight=probs_NE,
        probs=probs_NE,
        valid=torch.ones(len(request), dtype=torch.bool) if valid is None else valid,
        request=torch.tensor(request),
        tasks=tasks,
    )


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("delta", [0.0, 0.3])
def test_the_loss_is_the_oracles_over_all_linears_with_its_gradients(
    orientation: str, delta: float
):
    model, handle = attached(
        "loramoe", double=True, sample_types=TYPES, lbc_orientation=orientation, blc_alpha=delta
    )
    run(model, handle)
    got = handle.aux_losses()["default/localised"]
    _, details = oracle("loramoe", handle, double=True)
    kinds = [TYPES[task] for task in ASKED]
    terms = [
        site_mixture.localised(d["probs"], MASK.bool(), kinds, delta, orientation)
        for d in details.values()
    ]
    assert len(terms) == 6
    expected = 0.1 * torch.stack(terms).mean()
    torch.testing.assert_close(got, expected)
    same_gradients(handle, got, expected)


def test_the_sum_over_linears_is_the_released_reduction():
    _, handle = attached_and_run(aux_reduction="sum")
    _, mean = attached_and_run()
    torch.testing.assert_close(
        handle.aux_losses()["default/localised"], 6 * mean.aux_losses()["default/localised"]
    )


def attached_and_run(**settings: Any) -> tuple[Any, loramux.Handle]:
    model, handle = attached("loramoe", sample_types=TYPES, **settings)
    run(model, handle)
    return model, handle


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_minimum_gives_a_samples_own_half_the_share_that_the_page_says(orientation: Any):
    """(1 - delta)/2 with the released signs, which is less than one half, and (1 + delta)/2 with the others."""
    delta = 0.2
    config = LoRAMoEConfig(
        num_experts=6, blc_alpha=delta, sample_types={"a": 1, "b": 0}, lbc_orientation=orientation
    )
    torch.manual_seed(0)
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = localised_balance(record_of(logits.softmax(-1), [0, 1], ("a", "b")), config)
        value.backward()
        return value

    optimizer.step(loss)
    share = logits.detach().softmax(-1)
    expected = (1 - delta) / 2 if orientation == "code" else (1 + delta) / 2
    assert float(share[0, :3].sum()) == pytest.approx(expected, abs=1e-3)
    assert float(share[1, 3:].sum()) == pytest.approx(expected, abs=1e-3)


def test_constant_products_lose_nothing():
    config = config_of("loramoe", sample_types=TYPES, blc_alpha=0.25)
    weights = localised_weights(torch.tensor([1, 0]), 4, 0.25, "code")
    record = record_of(1 / weights, [0, 1], ("ask", "sing"))
    assert float(localised_balance(record, config)) == 0.0


def test_without_delta_it_is_the_squared_coefficient_of_variation():
    config = config_of("loramoe", sample_types=TYPES, blc_alpha=0.0)
    probs = torch.rand(5, 4, dtype=torch.float64)
    got = localised_balance(record_of(probs, [0, 0, 1, 1, 1], ("ask", "sing")), config)
    sums = torch.stack([probs[:2].sum(0), probs[2:].sum(0)])
    torch.testing.assert_close(got, (sums.std() / sums.mean()) ** 2)
    torch.testing.assert_close(got, spread(sums))


def test_scaled_weights_lose_the_same():
    config = config_of("loramoe", sample_types=TYPES)
    probs = torch.rand(5, 4, dtype=torch.float64)
    losses = [
        localised_balance(record_of(s * probs, [0, 0, 1, 1, 1], ("ask", "sing")), config)
        for s in (1.0, 7.0)
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_a_single_expert_may_lose_something_by_unequal_lengths():
    config = config_of("loramoe", num_experts=1)
    one = localised_balance(record_of(torch.ones(5, 1), [0, 0, 1, 1, 1], (None, None)), config)
    assert float(one) == pytest.approx(0.5 / 2.5**2)
    assert float(localised_balance(record_of(torch.ones(2, 1), [0, 0], (None,)), config)) == 0.0


def test_neither_padding_nor_requests_of_other_adapters_count():
    config = config_of("loramoe", sample_types=TYPES)
    probs = torch.rand(4, 4)
    plain = localised_balance(record_of(probs, [0, 0, 1, 1], ("ask", "sing")), config)
    padded = torch.cat([probs, torch.rand(2, 4)])
    valid = torch.tensor([True] * 4 + [False] * 2)
    # Request 1 belongs to somebody else, so it owns no token here; its task is none of ours.
    record = record_of(padded, [0, 0, 2, 2, 2, 1], ("ask", "dance", "sing"), valid)
    torch.testing.assert_close(localised_balance(record, config), plain)


def test_a_training_row_without_a_type_is_refused_and_a_star_stands_for_all_others():
    model, handle = attached("loramoe", sample_types={"ask": 1})
    assert handle.routing() == []
    model.train()
    for tasks in (None, ("ask", "sing")):
        with pytest.raises(ValueError, match=r"knows the tasks \['ask'\].*'\*' for all"):
            run(model, handle, tasks)
    model.eval()
    run(model, handle, None)
    assert set(handle.aux_losses()) == {"default/localised"}, "shown, without types"
    model, handle = attached("loramoe", sample_types={"ask": 1, "*": 0})
    model.train()
    run(model, handle)
    starred = handle.aux_losses()["default/localised"]
    model, handle = attached("loramoe", sample_types=TYPES)
    run(model, handle)
    torch.testing.assert_close(starred, handle.aux_losses()["default/localised"])


def test_a_training_row_without_a_type_is_refused_before_the_run_and_a_validation_row_is_not():
    training = TrainingConfig(steps=1, micro_batch_size=2)
    known, other = (Example.build(task, [5, 6, 7], [False, True, True]) for task in ("ask", "sing"))
    model, handle = attached("loramoe", sample_types={"ask": 1})
    with pytest.raises(ValueError, match=r"training rows of task 'sing': .*knows the tasks"):
        Trainer(model, handle, [Job("default", [known, other], training)])
    Trainer(model, handle, [Job("default", [known], training, validation=[other])]).run()
    model, handle = attached("loramoe", sample_types={"ask": 1}, blc_weight=0.0)
    Trainer(model, handle, [Job("default", [known, other], training)]).run()


def test_without_types_the_loss_only_evens_out_the_experts():
    model, handle = attached("loramoe")
    run(model.train(), handle, None)
    _, details = oracle("loramoe", handle)
    terms = [
        site_mixture.localised(d["probs"], MASK.bool(), [None, None], 0.1) for d in details.values()
    ]
    got = handle.aux_losses()["default/localised"]
    torch.testing.assert_close(got, 0.1 * torch.stack(terms).mean())


def test_a_weight_of_zero_turns_the_loss_and_what_it_needs_off():
    model, handle = attached("loramoe", sample_types=TYPES, blc_weight=0.0)
    run(model.train(), handle, None)
    assert handle.aux_losses() == {}


def test_it_sits_at_the_linears_of_the_ffn():
    _, handle = attached("loramoe", fresh=True)
    assert {path.split(".")[-2] for path in adapter_of(handle).rows} == {"mlp"}
    everywhere = loramux.attach(
        build_pico("llama"), config_of("loramoe", target_modules=("q_proj", "up_proj"))
    )
    assert len(adapter_of(everywhere).rows) == 4


def test_types_must_be_zero_or_one_and_experts_come_in_halves():
    with pytest.raises(ValueError, match="sample_types must map names of tasks to 0 or 1"):
        config_of("loramoe", sample_types={"ask": 2})
    with pytest.raises(ValueError, match="num_experts must be even, got 3"):
        config_of("loramoe", sample_types=TYPES, num_experts=3)
    config_of("loramoe", sample_types=TYPES, num_experts=3, blc_weight=0.0)
