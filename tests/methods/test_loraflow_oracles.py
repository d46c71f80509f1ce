"""The eleven oracles of LoRA-Flow's specification, by number."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import loramux
from loramux.methods.loraflow import LoRAFlowConfig
from methods.bridge import adapter_of, close
from methods.frozen_case import (
    IDS,
    MASK,
    NAMES,
    REAL,
    Frozen,
    merged_logits,
    piecewise,
    random_experts,
)
from oracles import loraflow
from oracles.surgery import model_logits
from pico import LAYERS, WIDTH, build_pico


def flow(root: Path, gate_std: float = 0.0, **options: Any) -> Frozen:
    """Attached gates, moved off their start by `gate_std`."""
    made = Frozen(root, LoRAFlowConfig, **options)
    draw = torch.Generator().manual_seed(7)
    for router in made.routers.values():
        for parameter in router.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.data += gate_std * noise.to(parameter.dtype)
    return made


@pytest.mark.parametrize("number", [0, 1])
def test_1_an_anchored_start_is_that_adapter_alone(tmp_path: Path, number: int):
    made = flow(tmp_path, ranks=(4, 2), init=f"anchor:{NAMES[number]}")
    got = made.run().detach()
    one_hot = torch.nn.functional.one_hot(torch.tensor(number), 2).double()
    assert all(record.gates.eq(one_hot).all() for record in made.records().values())
    close(got[REAL], made.alone(number)[REAL])


def test_1_a_uniform_start_is_pefts_cat_adapter_with_weights_one_over_k(tmp_path: Path):
    made = flow(tmp_path, double=False)
    theirs: Any = None
    for name, folder in zip(NAMES, made.folders, strict=False):
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(made.base(), folder, adapter_name=name)
        else:
            theirs.load_adapter(folder, adapter_name=name)
    theirs.add_weighted_adapter(list(NAMES[:3]), [1 / 3] * 3, "mix", combination_type="cat")
    theirs.set_adapter("mix")
    close(made.run().detach()[REAL], model_logits(theirs.eval(), IDS, MASK).detach()[REAL])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (1.5, -0.7, 0.0), (0.0, 0.0, 0.0)])
def test_2_without_w_the_gates_are_static_weights_of_any_size_and_sign(
    tmp_path: Path, weights: tuple[float, ...], static: bool
):
    made = flow(tmp_path, static=static)
    for router in made.routers.values():
        router.bias.data = torch.tensor(weights, dtype=torch.float64) - 1 / 3
    close(made.run().detach()[REAL], merged_logits(made, weights)[REAL])


@pytest.mark.parametrize("granularity", ["layer", "module", "step"])
def test_3_the_weights_sum_to_one_plus_the_biases(
    tmp_path: Path, granularity: loraflow.Granularity
):
    made = flow(tmp_path, gate_std=0.5, granularity=granularity)
    made.run()
    for path, record in made.records().items():
        bias = made.routers[path].bias.sum()
        torch.testing.assert_close(record.gates.sum(-1) - bias, torch.ones(12).double())


def test_4_exactly_the_gates_train(tmp_path: Path):
    made = flow(tmp_path, gate_std=0.3)
    trained = made.handle.trainable_parameters()
    counted = sum(p.numel() for p in trained.values())
    assert counted == loraflow.parameter_count(LAYERS, 3, WIDTH)
    made.run()[REAL].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    assert all(p.grad is None for p in made.model.parameters() if not p.requires_grad)


def test_5_identical_adapters_give_w_no_gradient_and_b_one(tmp_path: Path):
    def gradients(made: Frozen, name: str) -> float:
        leaves = [getattr(router, name) for router in made.routers.values()]
        found = torch.autograd.grad(made.run()[REAL].square().mean(), leaves)
        return max(float(g.abs().max()) for g in found)

    distinct = flow(tmp_path / "distinct")
    assert gradients(distinct, "weight") > 1e-4  # although W is 0
    first = random_experts(distinct.base(), (4,))
    same = {site: [entries[0]] * 3 for site, entries in first.items()}
    made = flow(tmp_path / "same", experts=same)
    assert gradients(made, "weight") < 1e-12
    assert gradients(made, "bias") > 1e-4


def test_6_later_tokens_do_not_change_earlier_weights(tmp_path: Path):
    made = flow(tmp_path, gate_std=0.3)
    made.run()
    before = {path: r.gates.view(2, 6, 3) for path, r in made.records().items()}
    changed = IDS.clone()
    changed[0, 4:] = 70
    made.run(changed)
    for path, record in made.records().items():
        torch.testing.assert_close(record.gates.view(2, 6, 3)[0, :4], before[path][0, :4])
        assert not torch.allclose(record.gates.view(2, 6, 3)[0, 4:], before[path][0, 4:])


def test_6_equal_tokens_have_equal_weights_in_the_first_layer(tmp_path: Path):
    made = flow(tmp_path, gate_std=0.3)
    made.run(torch.tensor([[5, 17, 5, 61, 17, 5]]), None)
    first = made.records()["model.layers.0"].gates
    torch.testing.assert_close(first[0], first[2])
    torch.testing.assert_close(first[1], first[4])
    later = made.records()["model.layers.1"].gates
    assert not torch.allclose(later[0], later[2])


@pytest.mark.parametrize("granularity", ["layer", "module", "step"])
def test_7_token_by_token_the_logits_and_weights_are_those_of_the_whole(
    tmp_path: Path, granularity: loraflow.Granularity
):
    made = flow(tmp_path, gate_std=0.3, granularity=granularity)
    whole = made.run(IDS[:1], None).detach()
    gates = {path: record.gates.detach() for path, record in made.records().items()}
    close(piecewise(made.model, IDS[:1], [3, 1, 1, 1]), whole)
    for path, record in made.records().items():
        close(record.gates, gates[path][-1:])


def test_8_all_linears_of_a_layer_share_the_weights_of_its_input(tmp_path: Path):
    made = flow(tmp_path, gate_std=0.5)
    made.run()
    state: Any = made.handle.dispatch.last
    adapter = adapter_of(made.handle)
    routes = {path: state.route(adapter, site) for path, site in adapter.sites.items()}
    for path, route in routes.items():
        layer = adapter.sites[path].layer_path
        assert route.weight is routes[f"{layer}.self_attn.q_proj"].weight
    both = [routes[f"model.layers.{i}.mlp.up_proj"].weight for i in range(LAYERS)]
    assert not torch.allclose(both[0], both[1])


def test_8_a_disturbed_attention_changes_the_next_layers_weights_and_not_its_own(tmp_path: Path):
    made = flow(tmp_path, gate_std=0.5)
    made.run()
    before = {path: record.gates for path, record in made.records().items()}
    attention = made.model.model.layers[0].self_attn
    hook = attention.register_forward_hook(lambda m, a, out: (out[0] + 1.0, *out[1:]))
    made.run()
    hook.remove()
    after = {path: record.gates for path, record in made.records().items()}
    assert torch.equal(after["model.layers.0"], before["model.layers.0"])
    assert not torch.allclose(after["model.layers.1"], before["model.layers.1"])


def test_9_a_high_temperature_leaves_one_over_k_and_the_bias(tmp_path: Path):
    made = flow(tmp_path, gate_std=0.5, temperature=1e9)
    made.run()
    for path, record in made.records().items():
        expected = (made.routers[path].bias.detach() + 1 / 3).expand(12, 3)
        close(record.gates.detach(), expected, 1e-6)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_10_adapters_of_rank_4_and_16_fuse_as_one_by_one(tmp_path: Path, backend: str):
    made = flow(tmp_path, gate_std=0.3, ranks=(4, 16), double=False)
    made.handle.dispatch.requested_backend = backend
    gates = {p: loraflow.Gate(r.weight, r.bias) for p, r in made.routers.items()}
    params = loraflow.Params(made.experts, gates)
    expected, _ = loraflow.oracle_logits(made.base(), IDS, MASK, params, loraflow.Config())
    with torch.no_grad():
        close(made.run()[REAL], expected.detach()[REAL], 2e-5)


def test_11_reordering_adapters_with_their_gates_changes_nothing(tmp_path: Path):
    made = flow(tmp_path / "one", gate_std=0.4)
    expected, order = made.run().detach(), [2, 0, 1]
    experts = {site: [entries[i] for i in order] for site, entries in made.experts.items()}
    other = flow(tmp_path / "two", experts=experts)
    for path, router in other.routers.items():
        router.weight.data = made.routers[path].weight.data[order]
        router.bias.data = made.routers[path].bias.data[order]
    close(other.run().detach()[REAL], expected[REAL])


def test_11_a_gate_loads_only_with_the_adapters_it_was_trained_for(tmp_path: Path):
    made = flow(tmp_path / "adapters", gate_std=0.4, double=False)
    expected: Tensor = made.run()
    folder = made.handle.save(tmp_path / "mixture")
    loaded = loramux.load(build_pico("llama"), folder, backend="reference")
    assert torch.equal(loaded.model(input_ids=IDS, attention_mask=MASK).logits, expected)
    path = folder / "mixture_config.json"
    header = json.loads(path.read_text())
    header["experts"].reverse()
    path.write_text(json.dumps(header))
    with pytest.raises(ValueError, match="order"):
        loramux.load(build_pico("llama"), folder)
