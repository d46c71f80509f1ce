"""Invariants 8, 13 and 14: who owns a gradient, same seed same bits, and activation checkpointing changes nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import loramux
from conformance.cases import (
    IDS,
    LABELS,
    MASK,
    Maker,
    Variant,
    crossed,
    every_variant,
    first_variants,
    learning,
    logits_of,
    named,
    variants_of,
)
from pico import build_pico

BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}


def gradients(handle: loramux.Handle) -> dict[str, Tensor]:
    return {
        name: p.grad.clone()
        for name, p in handle.trainable_parameters().items()
        if p.grad is not None
    }


def step(model: nn.Module, backward: Callable[[Tensor], None] = torch.Tensor.backward) -> Tensor:
    model.zero_grad()
    loss = model(**BATCH).loss
    backward(loss)
    return loss.detach()


# -- ownership -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "family"), learning(crossed("phi3", "gpt2")), ids=named)
def test_the_base_gets_no_gradient_and_the_routers_and_some_rows_do(
    make: Maker, variant: Variant, family: str
):
    model = build_pico(family)
    base = dict(model.named_parameters())
    handle = make.attach(model, variant, family)
    model.train()
    step(model)
    assert all(not p.requires_grad and p.grad is None for p in base.values())
    trained = handle.trainable_parameters()
    routers = [name for name in trained if name.startswith("routers_by_key")]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert all(trained[name].grad.abs().max() > 0 for name in routers)
    rows = [p for name, p in trained.items() if name not in routers]
    if variant.method_class.trains_rows:
        assert any(p.grad.abs().max() > 0 for p in rows)
    else:
        assert not rows


def test_each_trainable_parameter_belongs_to_exactly_one_adapter(make: Maker):
    handle = make.attach_all(build_pico("llama"), every_variant())
    owned = [p for name in handle.adapters for p in handle.trainable_parameters(name).values()]
    assert len(owned) == len({id(p) for p in owned})
    assert {id(p) for p in owned} == {id(p) for p in handle.model.parameters() if p.requires_grad}


def test_only_the_adapters_of_a_batch_get_gradients(make: Maker):
    handle = make.attach_all(build_pico("llama"), first_variants())
    model, (first, *others) = handle.model, list(handle.adapters)
    with handle.batch(adapters=[first, None]):
        model(**BATCH).loss.backward()
    assert all(p.grad is not None for p in handle.trainable_parameters(first).values())
    for name in others:
        assert all(p.grad is None for p in handle.trainable_parameters(name).values())


def test_a_batch_of_base_requests_has_no_gradient_at_all(make: Maker):
    model = build_pico("llama")
    handle = make.attach(model, first_variants()[0])
    handle.use(None)
    assert not model(**BATCH).loss.requires_grad


# -- order and seeds -----------------------------------------------------------------------------


def trained_bits(make: Maker, variant: Variant, seed: int) -> dict[str, Tensor]:
    model = build_pico("llama")
    handle = make.attach(model, variant, seed=seed, trained=False, lora_dropout=0.1)
    model.train()
    parameters = handle.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for _ in range(3):
        step(model)
        optimizer.step()
    return {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize("variant", variants_of("lora", "milora", "mixlora"), ids=lambda v: v.name)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(make: Maker, variant: Variant):
    once, again, other = (trained_bits(make, variant, seed) for seed in (3, 3, 4))
    assert list(once) == list(again)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert any(not torch.equal(once[name], other[name]) for name in once)


@pytest.mark.parametrize(("variant", "family"), crossed("phi3", "gpt2"), ids=named)
def test_sites_and_parameters_come_in_the_order_of_the_model(
    make: Maker, variant: Variant, family: str
):
    model = build_pico(family)
    handle = make.attach(model, variant, family)
    adapter = handle.adapters["default"]
    declared = [path for path in handle.sites if path in adapter.rows]
    assert list(adapter.rows) == list(adapter.sites) == declared
    layers = [adapter.sites[path].layer for path in declared]
    assert layers == sorted(layers)
    names = [name for name, _ in adapter.named_parameters() if name.startswith("rows_by_key")]
    first = list(dict.fromkeys(name.split(".")[1].replace("/", ".") for name in names))
    assert first == declared


def test_adapters_are_listed_in_the_order_they_were_added(make: Maker):
    handle = make.attach_all(build_pico("llama"), every_variant())
    assert list(handle.adapters) == [variant.name for variant in every_variant()]


# -- activation checkpointing --------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "family"), learning(crossed("gpt2")), ids=named)
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(
    make: Maker, variant: Variant, family: str
):
    found = []
    for checkpointing in (False, True):
        model = build_pico(family)
        handle = make.attach(model, variant, family, lora_dropout=_dropout(variant))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(5)
        loss = step(model)
        found.append((loss, gradients(handle), handle.aux_losses()))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)


def _dropout(variant: Variant) -> float:
    return 0.0 if variant.method_class.needs_adapters else 0.2


@pytest.mark.parametrize("variant", learning(every_variant()), ids=lambda v: v.name)
def test_two_checkpointed_forwards_before_one_backward_keep_their_own_routes(
    make: Maker, variant: Variant
):
    model = build_pico("llama")
    handle = make.attach(model, variant)
    model.train()
    halves = [{key: value[row : row + 1] for key, value in BATCH.items()} for row in range(2)]

    def summed() -> dict[str, Tensor]:
        model.zero_grad()
        first, second = (model(**half).loss for half in halves)
        (first + 2 * second).backward()
        return gradients(handle)

    expected = summed()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(summed(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", every_variant(), ids=lambda v: v.name)
def test_running_a_layer_again_overwrites_what_its_router_recorded(make: Maker, variant: Variant):
    model = build_pico("llama")
    handle = make.attach(model, variant)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    loss = model(**BATCH).loss
    before = {name: value.detach() for name, value in handle.aux_losses().items()}
    records = [(r.path, r.gates.detach()) for r in handle.routing()]
    loss.backward()
    after = {name: value.detach() for name, value in handle.aux_losses().items()}
    torch.testing.assert_close(after, before)
    assert [r.path for r in handle.routing()] == [path for path, _ in records]
    for record, (_, gates) in zip(handle.routing(), records, strict=True):
        torch.testing.assert_close(record.gates.detach(), gates)


@pytest.mark.parametrize("variant", learning(every_variant()), ids=lambda v: v.name)
def test_reentrant_checkpointing_is_refused_where_the_prompt_routes_else_right(
    make: Maker, variant: Variant
):
    model = build_pico("llama")
    handle = make.attach(model, variant)
    model.train()
    step(model)
    expected = gradients(handle)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    if handle.adapters["default"].routes_on_prompt:
        with pytest.raises(ValueError, match="use_reentrant"):
            step(model)
        # The refusal leaves the handle usable.
        model.gradient_checkpointing_disable()
        step(model)
    elif handle.adapters["default"].routers:
        # A loss recorded inside a re-entrant segment has no graph: silence would drop it.
        with pytest.raises(ValueError, match="use_reentrant"):
            step(model)
        return
    else:
        step(model)
    torch.testing.assert_close(gradients(handle), expected, atol=1e-6, rtol=1e-5)


def test_checkpointing_that_does_not_say_which_is_torchs_reentrant_one_and_refused(make: Maker):
    model = build_pico("llama")
    make.attach(model, variants_of("mixlora")[0])
    model.gradient_checkpointing_enable({"preserve_rng_state": True})
    model.train()
    with pytest.raises(ValueError, match="use_reentrant"):
        step(model)


# -- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", every_variant(), ids=lambda v: v.name)
def test_the_loss_of_a_training_step_contains_the_auxiliary_losses_once(
    make: Maker, variant: Variant
):
    model = build_pico("llama")
    handle = make.attach(model, variant)
    plain = model(**BATCH).loss
    model.train()
    loss = model(**BATCH).loss
    auxiliary = sum(handle.aux_losses().values())
    torch.testing.assert_close(loss, plain + auxiliary)
    as_tuple = model(**BATCH, return_dict=False)[0]
    torch.testing.assert_close(as_tuple, loss)


@pytest.mark.parametrize("variant", variants_of("milora", "mixlora", "mole"), ids=lambda v: v.name)
def test_the_auxiliary_loss_is_weighted_by_this_micro_batchs_share_of_the_step(
    make: Maker, variant: Variant
):
    """Two micro-batches of one step: each adds its share, as the stock Trainer sums them."""
    model = build_pico("llama")
    handle = make.attach(model, variant)
    model.train()
    total = int((LABELS[:, 1:] != -100).sum())
    extra = []
    for row in range(2):
        half = {key: value[row : row + 1] for key, value in BATCH.items()}
        own = int((half["labels"][:, 1:] != -100).sum())
        loss = model(**half, num_items_in_batch=torch.tensor(total)).loss
        auxiliary = sum(handle.aux_losses().values())
        model.eval()
        plain = model(**half, num_items_in_batch=torch.tensor(total)).loss
        model.train()
        torch.testing.assert_close(loss - plain, auxiliary * own / total, atol=1e-6, rtol=1e-4)
        extra.append(own / total)
    assert sum(extra) == pytest.approx(1)


@pytest.mark.parametrize("variant", every_variant(), ids=lambda v: v.name)
def test_evaluation_draws_no_randomness_whatever_the_dropout(make: Maker, variant: Variant):
    model = build_pico("llama")
    noisy = {"lora_dropout": _dropout(variant)}
    if variant.method == "mixlora":
        noisy["jitter_noise"] = 0.3
    make.attach(model, variant, **noisy)
    torch.manual_seed(1)
    once = logits_of(model)
    torch.manual_seed(2)
    assert torch.equal(logits_of(model), once)
    if any(noisy.values()):
        model.train()
        assert not torch.equal(logits_of(model), once)


@pytest.mark.parametrize("variant", learning(every_variant()), ids=lambda v: v.name)
def test_an_evaluation_in_inference_mode_does_not_stop_the_training_after_it(
    make: Maker, variant: Variant
):
    """Tensors made in inference mode cannot enter a backward pass: nothing made there may be kept."""
    model = build_pico("llama")
    handle = make.attach(model, variant)
    with torch.inference_mode():
        model(IDS, attention_mask=MASK)
        model.generate(IDS[:, :4], max_new_tokens=2, do_sample=False)
    model.train()
    step(model)
    found = gradients(handle)
    fresh = build_pico("llama")
    expected = make.attach(fresh, variant)
    fresh.train()
    step(fresh)
    torch.testing.assert_close(found, gradients(expected))
