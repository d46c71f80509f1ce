"""The schedule's shape, and an optimizer state that survives its file."""

import pytest
import torch
from torch import nn

from loramux.recipe import TrainingConfig
from loramux.train.optim import (
    Scheduler,
    clip,
    load_optimizer_tensors,
    lr_factor,
    make_optimizer,
    optimizer_tensors,
    set_lr,
)

TRAINING = TrainingConfig(steps=4, weight_decay=0.1)


def toy(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(5, 3, generator=generator)) for name in ("a.b", "c/d")}


def step(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    sum(p.square().sum() for p in parameters.values()).backward()
    set_lr(optimizer, 0.1)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_the_rate_rises_to_its_peak_and_is_never_zero(kind: Scheduler) -> None:
    factors = [lr_factor(step, 50, kind, 0.1) for step in range(50)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(factors) == 1.0
    assert min(factors) > 0
    assert factors[5:] == sorted(factors[5:], reverse=True)


def test_linear_and_cosine_are_halfway_down_in_the_middle() -> None:
    assert lr_factor(50, 100, "linear", 0.0) == pytest.approx(0.5)
    assert lr_factor(50, 100, "cosine", 0.0) == pytest.approx(0.5)
    assert lr_factor(99, 100, "constant", 0.0) == 1.0


def test_a_schedule_that_is_all_warmup_ends_at_the_peak() -> None:
    assert lr_factor(9, 10, "linear", 1.0) == 1.0


def test_an_optimizer_that_was_written_and_read_goes_on_with_the_same_bits() -> None:
    one, two = toy(), toy()
    first, second = make_optimizer(one, TRAINING), make_optimizer(two, TRAINING)
    for _ in range(3):
        step(one, first)
        step(two, second)
    fresh = make_optimizer(two, TRAINING)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(second, two).items()}
    load_optimizer_tensors(fresh, two, saved)
    step(one, first)
    step(two, fresh)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_state_of_another_adapter_is_refused() -> None:
    parameters = toy()
    optimizer = make_optimizer(parameters, TRAINING)
    with pytest.raises(ValueError, match=r"'other\.x'"):
        load_optimizer_tensors(optimizer, parameters, {"other.x|exp_avg": torch.zeros(1)})


def test_an_adapter_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="trainable=True"):
        make_optimizer({}, TRAINING)


def test_clipping_returns_the_norm_before() -> None:
    parameters = toy()
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 2.0)
    assert clip(parameters, 1.0).item() == pytest.approx((30 * 4) ** 0.5)
    norm = torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1.0, rel=1e-4)


def test_gradients_within_the_norm_keep_their_bits_and_those_that_are_not_finite_do_not_pass() -> (
    None
):
    parameters = toy()
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 0.125)
    before = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    norm = clip(parameters, 10.0)
    assert all(torch.equal(before[name], p.grad) for name, p in parameters.items())  # type: ignore[arg-type]
    found = [p.grad.clone() for p in parameters.values() if p.grad is not None]
    torch.nn.utils.clip_grads_with_norm_(parameters.values(), 10.0, norm)
    assert all(torch.equal(a, p.grad) for a, p in zip(found, parameters.values(), strict=True))  # type: ignore[arg-type]
    parameters["a.b"].grad = torch.full_like(parameters["a.b"], float("nan"))
    assert clip(parameters, 10.0).isnan()
