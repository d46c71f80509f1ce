"""What MOELoRA, LoRAMoE, MoLA, HydraLoRA and MoLoRA have in common, against one dense oracle; and the shared oracles.

The numbers are those of the list of oracles that the five share.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import loramux
from loramux.core.mixing import LinearGate
from loramux.core.router import RouteView
from loramux.core.types import EVERYTHING, Route
from methods.bridge import (
    LORA_FAMILIES,
    adapter_of,
    build_double,
    close,
    finite_differences,
    same_gradients,
)
from methods.site_mixture_case import (
    ALPHA,
    ASKED,
    IDS,
    LABELS,
    MASK,
    METHODS,
    RANK,
    REAL,
    TASKS,
    assert_is_oracle,
    attached,
    config_of,
    expert,
    oracle,
    run,
)
from oracles import lora, site_mixture
from pico import build_pico

ONE: dict[str, dict[str, Any]] = {
    "hydralora": {"num_experts": 1},
    "loramoe": {"num_experts": 1},
    "moelora": {"num_experts": 1},
    "mola": {"experts_per_layer": (1,)},
    "molora": {"num_experts": 1},
}
ALL_LINEARS = r".*_proj"


@pytest.mark.parametrize("family", LORA_FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_logits_and_weights_are_the_oracles_in_every_family(method: str, family: str):
    assert_is_oracle(method, family, double=False)


@pytest.mark.parametrize("method", METHODS)
def test_9_the_stacked_computation_is_the_loop_over_experts(method: str):
    """Forward and backward, in double precision."""
    assert_is_oracle(method, "llama", double=True)
    model, handle = attached(method, double=True)
    got = run(model, handle)[REAL].square().mean()
    expected = oracle(method, handle, double=True)[0][REAL].square().mean()
    same_gradients(handle, got, expected)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_finite_differences(method: str):
    own = {"experts_per_layer": (3,)} if method == "mola" else {}
    model, handle = attached(method, double=True, layers_to_transform=(1,), **own)

    def value() -> Tensor:
        logits = run(model, handle)[REAL].square().mean()
        return logits + sum(handle.aux_losses().values())

    finite_differences(value, handle.trainable_parameters(), samples=2)


@pytest.mark.parametrize("method", METHODS)
def test_1_fresh_experts_leave_the_base_as_it_is(method: str):
    model, handle = attached(method, fresh=True)
    base = build_pico("llama")(input_ids=IDS, attention_mask=MASK).logits
    assert torch.equal(run(model, handle), base)


@pytest.mark.parametrize("method", METHODS)
def test_2_one_expert_is_a_lora_in_output_and_gradients(method: str):
    model, handle = attached(method, double=True, target_modules=ALL_LINEARS, **ONE[method])
    params = {path: expert(rows, 0) for path, rows in adapter_of(handle).rows.items()}
    assert {one.scale for one in params.values()} == {ALPHA / RANK}
    got = run(model, handle)[REAL].square().mean()
    base = build_double("llama").requires_grad_(False)
    expected = lora.oracle_logits(base, IDS, MASK, params)[REAL].square().mean()
    close(got, expected)
    same_gradients(handle, got, expected)


@pytest.mark.parametrize("method", METHODS)
def test_3_equal_experts_are_a_lora_and_teach_the_gate_nothing(method: str):
    model, handle = attached(method, double=True)
    for rows in adapter_of(handle).rows.values():
        for slot in range(1, rows.spans.num_slots):
            rows.b.data[rows.slot_rows(slot)] = rows.b.data[rows.slot_rows(0)]
            if not rows.tied:
                rows.a.data[rows.slot_rows(slot)] = rows.a.data[rows.slot_rows(0)]
    params = {path: expert(rows, 0) for path, rows in adapter_of(handle).rows.items()}

    got = run(model, handle)
    base = build_double("llama").requires_grad_(False)
    close(got[REAL].detach(), lora.oracle_logits(base, IDS, MASK, params)[REAL].detach())
    got[REAL].square().mean().backward()
    routers = [p for n, p in handle.trainable_parameters().items() if n.startswith("routers")]
    assert routers
    assert all(p.grad is not None and p.grad.abs().max() < 1e-12 for p in routers)


def test_4_a_gate_whose_logit_grows_without_bound_takes_that_expert_alone():
    gate = LinearGate(3, 5)
    x = torch.randn(7, 5)
    x[:, 0] = 1.0
    gate.weight.data.zero_()
    gate.weight.data[1, 0] = 1e4
    route = gate(view_of(x), EVERYTHING)
    assert torch.equal(route.weight, torch.tensor([0.0, 1.0, 0.0]).expand(7, 3))


@pytest.mark.parametrize("method", ["hydralora", "loramoe", "molora", "mola"])
def test_4_weights_of_one_expert_alone_give_that_experts_lora(method: str):
    model, handle = attached(method)
    routers: Any = adapter_of(handle).routers
    for router in routers.values():
        alone = torch.zeros(IDS.numel(), len(router.names))
        alone[:, 1] = 1.0
        router.forward = lambda view, incoming, alone=alone: Route(weight=alone)
    params = {path: expert(rows, 1) for path, rows in adapter_of(handle).rows.items()}
    expected = lora.oracle_logits(build_pico("llama"), IDS, MASK, params)
    close(run(model, handle).detach()[REAL], expected.detach()[REAL])


def test_4_a_task_whose_logit_grows_without_bound_takes_that_expert_alone():
    model, handle = attached("moelora")
    routers: Any = adapter_of(handle).routers
    for router in routers.values():
        router.embedding.data[:, 0] = 1.0
        router.weight.data[1, 0] = 1e4
    params = {path: expert(rows, 1) for path, rows in adapter_of(handle).rows.items()}
    expected = lora.oracle_logits(build_pico("llama"), IDS, MASK, params)
    close(run(model, handle).detach()[REAL], expected.detach()[REAL])


def test_5_taking_all_of_the_experts_is_the_dense_mixture():
    model, handle = attached("mola", experts_per_layer=(3,), top_k=3)
    dense, handle_of_dense = attached("molora", num_experts=3)
    assert torch.equal(run(model, handle), run(dense, handle_of_dense))
    assert all(record.slot is None for record in handle.routing())


@pytest.mark.parametrize("method", METHODS)
def test_6_the_order_of_the_experts_does_not_matter(method: str):
    model, handle = attached(method, double=True)
    before = run(model, handle).detach()
    adapter = adapter_of(handle)
    routers: Any = adapter.routers
    for path, rows in adapter.rows.items():
        num = rows.spans.num_slots
        order = [*range(1, num), 0]
        b = [rows.b.data[rows.slot_rows(slot)].clone() for slot in order]
        if not rows.tied:
            rows.a.data = torch.cat([rows.a.data[rows.slot_rows(slot)] for slot in order])
        rows.b.data = torch.cat(b)
        routers[path].weight.data = routers[path].weight.data[order]
    close(run(model, handle).detach(), before)


@pytest.mark.parametrize("method", METHODS)
def test_7_padding_changes_neither_the_loss_nor_the_auxiliary_loss(method: str):
    types: dict[str, Any] = {"sample_types": {"ask": 1, "sing": 0}} if method == "loramoe" else {}
    model, handle = attached(method, **types)
    model.train()
    found = []
    for more in (0, 5):
        with handle.batch(tasks=ASKED):
            loss = model(
                input_ids=nn.functional.pad(IDS, (0, more), value=7),
                attention_mask=nn.functional.pad(MASK, (0, more)),
                labels=nn.functional.pad(LABELS, (0, more), value=-100),
            ).loss
        found.append((loss, handle.aux_losses()))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert bool(found[0][1]) == (method in ("loramoe", "mola"))
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name])


@pytest.mark.parametrize("method", METHODS)
def test_8_a_saved_mixture_is_the_same_when_it_is_loaded(method: str, tmp_path: Path):
    model, handle = attached(method)
    folder = handle.save(tmp_path / "mixture")
    again = build_pico("llama")
    loaded = loramux.load(again, folder, backend="reference")
    assert torch.equal(run(again, loaded), run(model, handle))
    assert loaded.adapters["default"].method.config == adapter_of(handle).method.config


# -- 10: parameter counts of LLaMA-2-7B ------------------------------------------------------------

WIDTH, INNER, LAYERS = 4096, 11008, 32
ATTENTION = [(WIDTH, WIDTH)] * 4
FFN = [(WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]


def count(name: str, **settings: Any) -> int:
    """Parameters of a method on LLaMA-2-7B, of which nothing but shapes is built."""
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, vocab_size=8
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        handle = loramux.attach(model, loramux.config_from_dict({"name": name, **settings}))
    return sum(p.numel() for p in handle.trainable_parameters().values())


def test_10_parameter_counts_are_those_of_the_formulas():
    full, shared = site_mixture.count_full, site_mixture.count_shared
    assert count("loramoe") == full(FFN * LAYERS, 8, 4) == 51_314_688
    both = [(WIDTH, WIDTH)] * 2
    q_and_v = count("hydralora", r=8, num_experts=3, target_modules=("q_proj", "v_proj"))
    assert q_and_v == shared(both * LAYERS, 3, 8) == 9_175_040
    assert count("hydralora", r=8, num_experts=3) == shared(FFN * LAYERS, 3, 8) == 26_812_416
    quarters = [full((ATTENTION + FFN) * 8, n, 8) for n in (2, 4, 6, 8)]
    assert count("mola") == sum(quarters) == 105_635_840
    assert count("molora", num_experts=3) == full((ATTENTION + FFN) * LAYERS, 3, 4)
    by_task = site_mixture.count_by_task((ATTENTION + FFN) * LAYERS, 8, 16, 3)
    assert count("moelora", tasks=TASKS) == by_task


# -- what they refuse, and the approximation ---------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_dora_experts_are_refused(method: str):
    with pytest.raises(ValueError, match="leave use_dora off"):
        config_of(method, use_dora=True)


@pytest.mark.parametrize("method", ["hydralora", "loramoe", "molora"])
def test_the_approximation_keeps_the_largest_weights_and_only_outside_training(method: str):
    exact, handle_of_exact = attached(method)
    model, handle = attached(method, top_k_at_inference=2)
    model.train(), exact.train()
    torch.testing.assert_close(run(model, handle), run(exact, handle_of_exact))
    model.eval(), exact.eval()
    assert not torch.allclose(run(model, handle), run(exact, handle_of_exact))
    for record in handle.routing():
        kept = record.gates > 0
        assert bool((kept.sum(1) == 2).all())
        torch.testing.assert_close(record.gates.sum(1), torch.ones(len(kept)))
        lowest = record.probs.masked_fill(~kept, 2).amin(1)
        assert bool((lowest >= record.probs.masked_fill(kept, -1).amax(1)).all())


def test_the_approximation_with_all_experts_is_exact():
    exact, handle_of_exact = attached("molora")
    model, handle = attached("molora", top_k_at_inference=3)
    assert torch.equal(run(model, handle), run(exact, handle_of_exact))


def test_what_kernels_are_told_is_what_the_gate_decides():
    gate = LinearGate(4, 6, top_k=2)
    x = torch.randn(9, 6)
    route = gate(view_of(x), EVERYTHING)
    slot, weight = gate.lowered().choose(x)
    torch.testing.assert_close(torch.zeros(9, 4).scatter(1, slot, weight), route.weight)


@pytest.mark.parametrize("method", ["hydralora", "loramoe", "molora"])
def test_numbers_that_make_no_sense_are_refused(method: str):
    for wrong in ({"num_experts": 0}, {"top_k_at_inference": 0}, {"router_init_range": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            config_of(method, **wrong)


def test_methods_of_the_ffn_need_one():
    with pytest.raises(ValueError, match="none of the linears it usually targets"):
        loramux.attach(build_pico("llama"), config_of("loramoe", exclude_modules=r".*mlp.*", r=2))


def view_of(x: Tensor) -> RouteView:
    n = len(x)
    return RouteView(
        x_ND=x,
        request_N=torch.zeros(n, dtype=torch.long),
        prompt_N=torch.ones(n, dtype=torch.bool),
        valid_N=torch.ones(n, dtype=torch.bool),
        num_requests=1,
        training=False,
        record=lambda **_: None,
    )
