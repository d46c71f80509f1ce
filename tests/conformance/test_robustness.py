"""Errors and interruptions inside a forward, a generation or a batch leave the handle usable."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import loramux
from conformance.cases import (
    IDS,
    LABELS,
    MASK,
    Maker,
    Variant,
    first_variants,
    learning,
    logits_of,
    padded,
    random_requests,
)
from pico import build_pico

VARIANTS = [pytest.param(v, id=v.name) for v in first_variants()]


class Trouble(Exception):
    """Not one of ours."""


def failing(module: nn.Module, error: type[BaseException]) -> Callable[[], None]:
    """Make a module raise; returns what takes it back."""

    def fail(*_: object) -> None:
        raise error

    return module.register_forward_pre_hook(fail).remove


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["model.layers.0", "model.layers.1.mlp", "lm_head"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_error_inside_a_forward_leaves_the_next_one_right(
    make: Maker, variant: Variant, where: str, error: type[BaseException]
):
    model = build_pico("llama")
    handle = make.attach(model, variant)
    expected = logits_of(model)
    heal = failing(model.get_submodule(where), error)
    with pytest.raises(error):
        logits_of(model)
    heal()
    # Another shape, other requests: nothing of the call that failed may be left.
    single = logits_of(model, input_ids=IDS[:1], attention_mask=MASK[:1])
    torch.testing.assert_close(single, expected[:1], atol=1e-5, rtol=1e-5)
    with handle.batch(adapters=[None, "default"]):
        logits_of(model)
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_error_inside_a_checkpointed_backward_leaves_the_next_step_right(
    make: Maker, variant: Variant, error: type[BaseException]
):
    model = build_pico("llama")
    handle = make.attach(model, variant)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return {
            n: p.grad.clone()
            for n, p in handle.trainable_parameters().items()
            if p.grad is not None
        }

    expected = step()
    loss = model(**batch).loss
    heal = failing(model.model.layers[0].mlp, error)
    with pytest.raises(error):
        loss.backward()
    heal()
    found = step()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_error_inside_generate_leaves_the_next_one_right(
    make: Maker, variant: Variant, error: type[BaseException]
):
    model = build_pico("llama")
    make.attach(model, variant)
    options = {"attention_mask": MASK.flip(1), "max_new_tokens": 4, "min_new_tokens": 4}
    expected = model.generate(IDS, do_sample=False, **options)
    calls = []

    def third_time(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error

    hook = model.model.layers[1].register_forward_pre_hook(third_time)
    with pytest.raises(error):
        model.generate(IDS, do_sample=False, **options)
    hook.remove()
    assert torch.equal(model.generate(IDS, do_sample=False, **options), expected)


def test_the_body_alone_may_be_interrupted_too(make: Maker):
    """Encoders and reward models call `model.model`; its state must not stay open either."""
    model = build_pico("llama")
    make.attach(model, first_variants()[1])
    expected = model.model(IDS).last_hidden_state
    heal = failing(model.model.layers[1], KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model.model(IDS)
    heal()
    assert torch.equal(model.model(IDS).last_hidden_state, expected)


def test_masks_of_the_wrong_shape_are_refused_and_the_next_call_works(make: Maker):
    model = build_pico("llama")
    make.attach(model, first_variants()[1])
    expected = logits_of(model)
    for name in ("prompt_mask", "segment_ids"):
        with pytest.raises(ValueError, match=name):
            model(input_ids=IDS, **{name: torch.ones(2, 3, dtype=torch.long)})
    assert torch.equal(logits_of(model), expected)


def test_an_error_inside_a_batch_ends_the_batch(make: Maker):
    model = build_pico("llama")
    handle = make.attach(model, first_variants()[0])
    expected = logits_of(model)
    with pytest.raises(Trouble), handle.batch(adapters=[None, None]):
        raise Trouble
    assert torch.equal(logits_of(model), expected)


def test_batches_nest_and_the_outer_one_returns(make: Maker):
    model = build_pico("llama")
    handle = make.attach(model, first_variants()[0])
    base_and_adapter = {}
    with handle.batch(adapters=["default", None]):
        base_and_adapter["outer"] = logits_of(model)
        with handle.batch(adapters=[None, "default"]):
            base_and_adapter["inner"] = logits_of(model)
        assert torch.equal(logits_of(model), base_and_adapter["outer"])
    assert not torch.equal(base_and_adapter["inner"], base_and_adapter["outer"])


def test_adapters_come_and_go_without_touching_the_others(make: Maker):
    model = build_pico("llama")
    variants = first_variants()
    handle = make.attach_all(model, variants)
    requests = random_requests([v.name for v in variants[:2]], 4, 1)
    names = [r.adapter for r in requests]

    def run() -> torch.Tensor:
        with torch.no_grad(), handle.batch(adapters=names):
            return model(**padded(requests)).logits

    expected = run()
    for variant in variants[2:]:
        handle.remove(variant.name)
    assert list(handle.adapters) == [v.name for v in variants[:2]]
    torch.testing.assert_close(run(), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match=variants[2].name):
        handle.use(variants[2].name)
    handle.remove(variants[0].name)
    with pytest.raises(ValueError, match="no adapter"):
        handle.save("nowhere", variants[0].name)


def test_a_prompt_that_routes_nowhere_after_its_adapter_was_removed_is_the_base(make: Maker):
    model = build_pico("llama")
    base = logits_of(model)
    handle = make.attach(model, first_variants()[1])
    handle.remove("default")
    assert torch.equal(logits_of(model), base)


def test_a_linear_called_on_its_own_says_what_to_do(make: Maker):
    model = build_pico("llama")
    handle = make.attach(model, first_variants()[0])
    x = torch.ones(1, 32)
    with pytest.raises(RuntimeError, match="outside a forward pass"):
        model.model.layers[0].self_attn.q_proj(x)
    handle.use(None)
    bare = build_pico("llama").model.layers[0].self_attn.q_proj(x)
    assert torch.equal(model.model.layers[0].self_attn.q_proj(x), bare)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_may_be_called_positionally_with_embeddings_or_through_its_body(
    make: Maker, variant: Variant
):
    model = build_pico("llama")
    make.attach(model, variant)
    expected = model(input_ids=IDS, attention_mask=MASK).logits
    assert torch.equal(model(IDS, MASK).logits, expected)
    x = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=x, attention_mask=MASK).logits, expected)
    hidden = model.model(IDS, attention_mask=MASK).last_hidden_state
    assert torch.equal(model.lm_head(hidden), expected)


@pytest.mark.parametrize("variant", learning(first_variants()), ids=lambda v: v.name)
def test_a_model_moved_to_bfloat16_after_attaching_runs_and_keeps_full_precision_rows(
    make: Maker, variant: Variant
):
    """`model.to(bf16)` casts what hangs on it; loading into a bf16 model keeps rows and routers as they are."""
    model = build_pico("llama", dtype=torch.bfloat16)
    handle = make.attach(model, variant, backend="auto")
    assert all(p.dtype == torch.float32 for p in handle.trainable_parameters().values())
    logits = logits_of(model)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    model.train()
    loss = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
    loss.backward()
    assert all(
        p.grad.dtype == torch.float32
        for p in handle.trainable_parameters().values()
        if p.grad is not None
    )
    exact = make.attach(build_pico("llama"), variant)
    close = (logits_of(exact.model) - logits.float()).abs()[MASK.bool()].median()
    assert close < 0.2
    assert isinstance(handle, loramux.Handle)
