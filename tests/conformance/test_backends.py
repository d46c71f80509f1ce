"""Invariant 2: every backend that runs here gives the logits of `reference`, for the whole model."""

import pytest
import torch
from torch import Tensor, nn

import loramux
from conformance.cases import (
    IDS,
    MASK,
    Maker,
    Variant,
    every_variant,
    first_variants,
    logits_of,
    padded,
    random_requests,
)
from loramux.ops.choose import BACKENDS, why_not
from pico import build_pico

CPU = torch.device("cpu")
OTHERS = [
    name
    for name in BACKENDS
    if name != "reference" and not why_not(name, CPU, torch.float32, False)
]
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def switch(handle: loramux.Handle, backend: str) -> None:
    handle.dispatch.requested_backend = backend
    handle._forget()


def test_there_is_more_than_one_backend_to_compare() -> None:
    assert OTHERS


@pytest.mark.parametrize(
    ("family", "backend"),
    # Biases and fused or transposed linears for the choice that users get.
    [*(("llama", name) for name in OTHERS), *((f, "auto") for f in ("qwen2", "phi3", "gpt2"))],
)
@pytest.mark.parametrize("variant", every_variant(), ids=lambda v: v.name)
def test_a_backend_gives_the_logits_of_reference(
    make: Maker, variant: Variant, family: str, backend: str
):
    model = build_pico(family)
    handle = make.attach(model, variant, family)
    expected = logits_of(model)
    switch(handle, backend)
    torch.testing.assert_close(logits_of(model), expected, **TOLERANCE)
    assert handle.describe().count("backend") >= 1


def decoded(model: nn.Module, steps: int = 3) -> list[Tensor]:
    """Logits of the last prompt token and of a few steps with a KV cache."""
    with torch.no_grad():
        out = model(input_ids=IDS[:, :5], attention_mask=MASK[:, :5], use_cache=True)
        logits = [out.logits[:, -1]]
        for step in range(5, 5 + steps):
            out = model(
                input_ids=IDS[:, step : step + 1],
                attention_mask=torch.ones_like(IDS[:, : step + 1]),
                past_key_values=out.past_key_values,
            )
            logits.append(out.logits[:, -1])
    return logits


@pytest.mark.parametrize("backend", sorted({"cpu", "auto"} & {*OTHERS, "auto"}))
@pytest.mark.parametrize("variant", every_variant(), ids=lambda v: v.name)
def test_a_backend_gives_the_decoding_logits_of_reference(
    make: Maker, variant: Variant, backend: str
):
    model = build_pico("llama")
    handle = make.attach(model, variant)
    expected = decoded(model)
    switch(handle, backend)
    torch.testing.assert_close(decoded(model), expected, **TOLERANCE)


@pytest.mark.parametrize("backend", [*OTHERS, "auto"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_backend_gives_the_logits_of_reference_for_a_mixed_batch(
    make: Maker, family: str, backend: str
):
    model = build_pico(family)
    handle = make.attach_all(model, every_variant(), family)
    # Few rows, so that "auto" takes the kernel: 4 requests of at most 4 tokens.
    requests = random_requests([None, *handle.adapters], 4, seed=1, longest=4)
    inputs = padded(requests)
    results = []
    for name in ("reference", backend):
        switch(handle, name)
        with torch.no_grad(), handle.batch(adapters=[r.adapter for r in requests]):
            results.append(model(**inputs).logits)
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)


@pytest.mark.parametrize("variant", first_variants(), ids=lambda v: v.name)
def test_bfloat16_backends_agree_within_its_rounding(make: Maker, variant: Variant):
    model = build_pico("llama", dtype=torch.bfloat16)
    handle = make.attach(model, variant)
    expected = logits_of(model)
    switch(handle, "cpu" if "cpu" in OTHERS else "grouped")
    got = logits_of(model)
    # Routing may turn on a rounding; what is compared is the bulk of the logits.
    difference = (got - expected).float().abs()[MASK.bool()]
    assert difference.median() < 0.05 * expected.float().abs().max()


def test_a_backend_that_does_not_exist_is_refused_by_name(make: Maker, pico: nn.Module):
    make.attach(pico, first_variants()[0], backend="cuda-magic")
    with pytest.raises(ValueError, match="cuda-magic"):
        logits_of(pico)
