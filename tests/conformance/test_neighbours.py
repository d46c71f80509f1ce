"""Invariant 3: a request's logits are the same alone and in any batch of requests of other adapters."""

import pytest
import torch
from torch import Tensor, nn

import loramux
from conformance.cases import Maker, Request, every_variant, packed, padded, random_requests
from methods.bridge import build_double
from pico import build_pico

TOLERANCE = 1e-5  # times the largest logit: BLAS picks other kernels for other batch sizes


@pytest.fixture(scope="module")
def crowd(make: Maker) -> loramux.Handle:
    """One model with every variant of every method attached."""
    return make.attach_all(build_pico("llama"), every_variant())


def alone(handle: loramux.Handle, request: Request) -> Tensor:
    """Logits [T, V] of one request in a batch of its own."""
    with torch.no_grad(), handle.batch(adapters=[request.adapter]):
        return handle.model(input_ids=torch.tensor([request.ids])).logits[0]


def assert_equal_alone(handle: loramux.Handle, request: Request, got: Tensor) -> None:
    expected = alone(handle, request)
    tolerance = TOLERANCE * float(expected.abs().max().clamp_min(1))
    torch.testing.assert_close(
        got, expected, atol=tolerance, rtol=0, msg=lambda text: f"{request.adapter}: {text}"
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("count", "seed"), [(1, 0), (2, 1), (5, 2), (11, 3), (16, 4), (16, 5)])
def test_a_request_does_not_see_its_neighbours(
    crowd: loramux.Handle, count: int, seed: int, side: str
):
    requests = random_requests([None, *crowd.adapters], count, seed)
    inputs = padded(requests, side)
    with torch.no_grad(), crowd.batch(adapters=[r.adapter for r in requests]):
        logits = crowd.model(**inputs).logits
    for row, request in enumerate(requests):
        assert_equal_alone(crowd, request, logits[row, inputs["attention_mask"][row].bool()])


@pytest.mark.parametrize("seed", range(3))
def test_a_request_does_not_see_its_neighbours_in_a_packed_row(crowd: loramux.Handle, seed: int):
    requests = random_requests([None, *crowd.adapters], 7, 100 + seed)
    inputs = packed(requests)
    with torch.no_grad(), crowd.batch(adapters=[r.adapter for r in requests]):
        logits = crowd.model(**inputs).logits[0]
    start = 0
    for request in requests:
        assert_equal_alone(crowd, request, logits[start : start + len(request.ids)])
        start += len(request.ids)


@pytest.mark.parametrize("name", [None, *(v.name for v in every_variant())])
def test_every_adapter_beside_every_other_kind(crowd: loramux.Handle, name: str | None):
    """The request in question first, then one neighbour of every kind."""
    tokens = (5, 17, 40, 61, 8)
    others = [other for other in [None, *crowd.adapters] if other != name]
    requests = [Request(name, tokens), *(Request(other, (90, 33, 12)) for other in others)]
    with torch.no_grad(), crowd.batch(adapters=[r.adapter for r in requests]):
        logits = crowd.model(**padded(requests, "left")).logits
    assert_equal_alone(crowd, requests[0], logits[0])


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3", "gpt2"])
def test_neighbours_do_not_matter_in_other_families(make: Maker, family: str):
    handle = make.attach_all(build_pico(family), every_variant(), family)
    requests = random_requests([None, *handle.adapters], 8, 7)
    inputs = padded(requests, "left")
    with torch.no_grad(), handle.batch(adapters=[r.adapter for r in requests]):
        logits = handle.model(**inputs).logits
    for row, request in enumerate(requests):
        assert_equal_alone(handle, request, logits[row, inputs["attention_mask"][row].bool()])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_reaches_no_router_with_either_attention(make: Maker, attention: str):
    """Rows of pure padding attend to nothing; what they hold must not enter a sum."""
    model = build_pico("llama", attn_implementation=attention)
    handle = make.attach_all(model, every_variant())
    requests = [Request(name, (5, 17, 40)) for name in handle.adapters]
    requests.append(Request(None, tuple(range(10, 30))))
    inputs = padded(requests, "left")
    with torch.no_grad(), handle.batch(adapters=[r.adapter for r in requests]):
        logits = model(**inputs).logits
    assert logits.isfinite().all()
    for row, request in enumerate(requests):
        assert_equal_alone(handle, request, logits[row, inputs["attention_mask"][row].bool()])


def test_gradients_of_a_request_do_not_see_its_neighbours(make: Maker):
    """Sums over requests of each adapter's loss: in one batch as one by one, in double precision."""
    model = build_double()
    handle = make.attach_all(model, every_variant())
    for adapter in handle.adapters.values():
        adapter.double()
    requests = random_requests(list(handle.adapters), 12, 8)

    def total(logits: Tensor, mask: Tensor) -> Tensor:
        return (logits * mask[..., None]).square().sum() / 1000

    def gradients() -> dict[str, Tensor]:
        found = {
            name: p.grad.clone()
            for name, p in handle.holder.named_parameters()
            if p.grad is not None
        }
        model.zero_grad()
        return found

    inputs = padded(requests)
    with handle.batch(adapters=[r.adapter for r in requests]):
        total(model(**inputs).logits, inputs["attention_mask"]).backward()
    together = gradients()
    for request in requests:
        single = padded([request])
        with handle.batch(adapters=[request.adapter]):
            total(model(**single).logits, single["attention_mask"]).backward()
    one_by_one = gradients()
    for name, expected in one_by_one.items():
        got = together.get(name, torch.zeros_like(expected))
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9, msg=name)


def test_the_number_of_adapters_must_be_the_number_of_requests(crowd: loramux.Handle):
    with (
        pytest.raises(ValueError, match="3 requests, but 2 adapters"),
        crowd.batch(adapters=[None, None]),
    ):
        crowd.model(input_ids=torch.ones(3, 4, dtype=torch.long))


def test_an_unknown_adapter_is_refused_before_the_model_runs(crowd: loramux.Handle):
    with pytest.raises(ValueError, match="no adapter named 'nobody'"), crowd.batch(["nobody"]):
        raise AssertionError("the body must not run")


def test_two_attached_models_in_one_process_do_not_meet(make: Maker):
    """Calls interleaved layer by layer would mix up whatever is process-wide."""
    chosen = [v for v in every_variant() if v.name in ("milora-ste", "mixlora-top2")]
    models: list[nn.Module] = []
    handles = []
    for seed, variant in enumerate(chosen):
        models.append(build_pico("llama", seed=seed))
        handles.append(make.attach(models[-1], variant, seed=seed))
    ids = torch.tensor([[5, 17, 40, 61, 8]])
    with torch.no_grad():
        expected = [model(ids).logits for model in models]
        inside = []

        def other_model(*_: object) -> None:
            inside.append(models[1](ids).logits)

        hook = models[0].model.layers[1].register_forward_pre_hook(other_model)
        got = models[0](ids).logits
        hook.remove()
    assert torch.equal(got, expected[0])
    assert torch.equal(inside[0], expected[1])
    assert {r.adapter for h in handles for r in h.routing()} == {"default"}
    assert [r.when for r in handles[0].routing()] == ["prompt", "prompt"]
    assert [r.when for r in handles[1].routing()] == ["token", "token"]
