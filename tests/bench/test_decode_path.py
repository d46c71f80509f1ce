"""The quick way of a decode step: taken where it may be, left at once when anything it relied on has changed."""

import pytest
import torch

import loramux
from loramux.bench.adapters import randomise
from loramux.bench.decode import Decoder
from loramux.ops import cpu
from loramux.ops.contract import Pairs, Spans
from loramux.ops.cpu_bound import bind
from pico import build_pico

needs_kernel = pytest.mark.skipif(not cpu.available(), reason="no C kernel here")
LAYERS = ("model.layers.0", "model.layers.1")


@pytest.fixture
def milora():
    """A bf16 model behind a prompt, and its handle."""
    model = build_pico("llama", dtype=torch.bfloat16)
    handle = loramux.attach(model, loramux.MiLoRAConfig(r=4, top_k=2))
    randomise(handle)
    return Decoder(model, torch.arange(4, 12).reshape(1, 8), steps=3), handle


def logits(decoder):
    with torch.no_grad():
        out = decoder.step(0)
    decoder.rewind(1)
    return out


def bound_sites(handle):
    state = handle.dispatch.last
    return [p for p, plan in state.plans.items() if plan is not None and plan.bound is not None]


def hooked(model):
    return [path for path in LAYERS if model.get_submodule(path)._forward_pre_hooks]


@needs_kernel
def test_every_site_takes_the_quick_way_from_the_third_step_on(milora):
    decoder, handle = milora
    first, _, third = (logits(decoder) for _ in range(3))
    assert len(bound_sites(handle)) == len(handle.linears) == 14
    assert torch.equal(third, first)


@pytest.mark.parametrize("change", ["replace", "move", "in place"])
@pytest.mark.parametrize("what", ["a", "b", "weight"])
def test_a_changed_parameter_is_seen_by_the_next_step(milora, what, change):
    decoder, handle = milora
    before = [logits(decoder) for _ in range(4)][-1]
    (adapter,) = handle.adapters.values()
    path = next(p for p, plan in handle.dispatch.last.plans.items() if plan.parts)
    owner = handle.linears[path].base_layer if what == "weight" else adapter.rows[path]
    values = torch.randn_like(getattr(owner, what))
    if change == "replace":
        setattr(owner, what, torch.nn.Parameter(values, requires_grad=False))
    elif change == "move":
        getattr(owner, what).data = values
    else:
        getattr(owner, what).data.copy_(values)
    after = logits(decoder)
    assert not torch.equal(after, before)
    handle.dispatch.last.plans.clear()  # lowered anew, this is what it must be
    assert torch.equal(logits(decoder), after)


@needs_kernel
def test_a_bound_call_equals_the_kernel_and_declines_what_it_was_not_made_for():
    weight = {"weight": torch.randn(24, 16), "bias": torch.randn(24)}
    rows = {"a": torch.randn(4, 16), "b": torch.randn(4, 24)}
    spans, index = Spans.packed([4], [2.0]), torch.arange(3, dtype=torch.int32)
    pairs = Pairs(index, index, index * 0, torch.rand(3), 3, 3)
    run = bind(weight, rows, spans, pairs, (1, 3, 16))
    x = torch.randn(1, 3, 16)
    expected = cpu.linear(x, *weight.values(), *rows.values(), spans, pairs)
    assert torch.equal(run(x), expected)
    assert run(x[:, :2]) is None
    assert run(x.double()) is None
    assert run(torch.randn(1, 16, 3).transpose(1, 2)) is None
    weight["bias"] = weight["bias"].clone()
    assert run(x) is None


def test_routers_listen_to_the_prompt_and_not_to_decode_steps(milora):
    decoder, handle = milora
    assert hooked(decoder.model) == list(LAYERS)  # from the prompt
    logits(decoder)
    assert hooked(decoder.model) == []
    first = [record.gates for record in handle.routing()]
    Decoder(decoder.model, torch.arange(20, 30).reshape(1, 10), steps=1)
    assert hooked(decoder.model) == list(LAYERS)
    logits(decoder)  # the first prompt goes on
    assert hooked(decoder.model) == [] and first == [r.gates for r in handle.routing()]
    handle.detach()
    assert hooked(decoder.model) == []


def test_a_forward_that_is_run_again_listens_as_it_did(milora):
    decoder, handle = milora
    prompt = handle.dispatch.last
    logits(decoder)
    with handle.dispatch.resume(prompt):
        assert hooked(decoder.model) == list(LAYERS)


def test_token_routers_listen_always():
    model = build_pico("llama")
    handle = loramux.attach(model, loramux.MixLoRAConfig(r=2, num_experts=3))
    randomise(handle)
    decoder = Decoder(model, torch.arange(4, 12).reshape(1, 8), steps=1)
    decoder()
    assert all(model.get_submodule(f"{path}.mlp")._forward_pre_hooks for path in LAYERS)


def test_recomputed_layers_route_although_a_decode_step_came_between():
    model = build_pico("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    handle = loramux.attach(model, loramux.MiLoRAConfig(r=2, top_k=2))
    randomise(handle)
    ids = torch.arange(4, 16).reshape(1, 12)
    labels = ids.clone()
    labels[:, :6] = -100

    def gradients(between):
        model.zero_grad()
        loss = model.train()(ids, labels=labels, use_cache=False).loss
        between()
        loss.backward()
        return [
            p.grad.clone() for p in handle.trainable_parameters().values() if p.grad is not None
        ]

    def decode():
        model.eval()
        decoder = Decoder(model, ids[:, :6], steps=1)
        decoder()
        assert hooked(model) == []
        model.train()

    plain = gradients(lambda: None)
    assert plain
    torch.testing.assert_close(gradients(decode), plain, rtol=0, atol=0)
