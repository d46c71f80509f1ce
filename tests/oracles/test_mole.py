"""The MoLE oracle keeps what the paper's equations and the chosen increments promise."""

import math

import peft
import pytest
import torch
from torch import Tensor, nn

from oracles import lora
from oracles.mole import (
    Config,
    Gate,
    Params,
    balance_floor,
    balance_loss,
    gate_weights,
    initial_gate,
    layer_norm,
    mask_and_renormalise,
    mix,
    parameter_count,
)
from oracles.mole_model import oracle_logits, parallel_logits, single_expert, unit_of
from oracles.random_params import layer_linears, mole_params
from oracles.surgery import model_logits
from pico import build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29], [90, 33, 12, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
PROMPT = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
REAL = MASK.bool()

ADDITIVE = [
    (oracle_logits, Config(granularity=g, pool=p))
    for g in ("matrix", "layer", "block", "network")
    for p in ("token", "mean", "prompt_mean", "flatten")
]
PARALLEL = [
    (parallel_logits, Config(granularity=g, pool=p))
    for g in ("layer", "block")
    for p in ("token", "mean")
]
EVERY_MODE = [
    pytest.param(run, c, id=f"{run.__name__.split('_')[0]}-{c.granularity}-{c.pool}")
    for run, c in ADDITIVE + PARALLEL
]


def params_for(model: nn.Module, run, config: Config, num_experts: int = 3, **kwargs) -> Params:
    return mole_params(
        model,
        num_experts,
        config,
        parallel=run is parallel_logits,
        length=IDS.shape[1],
        **kwargs,
    )


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a[REAL], b[REAL], atol=tolerance, rtol=tolerance)


# -- the gate alone ------------------------------------------------------------------------------


def random_unit(num_experts: int = 3, width: int = 5, dtype: torch.dtype = torch.float64):
    E = [torch.randn(2, 6, width, dtype=dtype) for _ in range(num_experts)]
    e = torch.randn(num_experts * width, num_experts, dtype=dtype)
    return E, Gate(e, torch.tensor(0.2, dtype=dtype))


@pytest.mark.parametrize("pool", ["token", "mean", "prompt_mean"])
def test_a_fresh_gate_gives_exactly_one_over_n(pool):
    E, _ = random_unit(4)
    G = gate_weights(E, initial_gate(4, 5, torch.float64), pool, REAL, PROMPT)
    assert G.eq(0.25).all()


def test_one_norm_over_the_concatenation_keeps_the_relative_size_of_the_experts():
    E, _ = random_unit(2)
    z = layer_norm(torch.cat([10 * E[0], E[1]], dim=-1))
    torch.testing.assert_close(z, nn.functional.layer_norm(z, (10,)), atol=1e-4, rtol=1e-4)
    assert z[..., :5].var() > 20 * z[..., 5:].var()
    x = torch.cat(E, dim=-1)
    torch.testing.assert_close(layer_norm(x), nn.functional.layer_norm(x, (10,)))


def test_the_gate_reads_normalised_increments_so_a_common_factor_does_not_matter():
    E, gate = random_unit()
    G = gate_weights(E, gate, "token", REAL, PROMPT)
    same = gate_weights([30 * e for e in E], gate, "token", REAL, PROMPT)
    other = gate_weights([30 * E[0], *E[1:]], gate, "token", REAL, PROMPT)
    torch.testing.assert_close(same, G, atol=1e-3, rtol=0)
    assert (other - G).abs().max() > 0.05


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("mask", [(1, 0, 1), (0, 1, 0), (1, 1, 1)])
def test_masking_logits_equals_renormalising_the_weights(pool, mask):
    E, gate = random_unit()
    keep = torch.tensor(mask).bool()
    G = gate_weights(E, gate, pool, REAL, PROMPT)
    masked = gate_weights(E, gate, pool, REAL, PROMPT, expert_mask=keep)
    torch.testing.assert_close(masked, mask_and_renormalise(G, keep), atol=1e-6, rtol=0)
    assert masked[..., ~keep].eq(0).all()
    if keep.all():
        assert torch.equal(masked, G)


def test_masks_compose():
    E, gate = random_unit(4)
    G = gate_weights(E, gate, "token", REAL, PROMPT)
    a, b = torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([0, 1, 1, 1]).bool()
    twice = mask_and_renormalise(mask_and_renormalise(G, a), b)
    torch.testing.assert_close(twice, mask_and_renormalise(G, a & b))


def test_the_fast_gate_input_changes_the_weights_and_an_empty_mask_is_refused():
    E, gate = random_unit()
    keep = torch.tensor([True, True, False])
    exact = gate_weights(E, gate, "token", REAL, PROMPT, keep)
    fast = gate_weights(E, gate, "token", REAL, PROMPT, keep, "fast")
    assert (exact - fast).abs().max() > 1e-3
    with pytest.raises(ValueError, match="every branch is masked"):
        gate_weights(E, gate, "token", REAL, PROMPT, keep & False)


def test_a_large_temperature_gives_one_over_n_and_a_small_one_the_argmax():
    E, gate = random_unit()
    sharp = gate_weights(E, gate, "token", REAL, PROMPT)
    hot = gate_weights(E, gate._replace(log_tau=torch.tensor(20.0)), "token", REAL, PROMPT)
    cold = gate_weights(E, gate._replace(log_tau=torch.tensor(-12.0)), "token", REAL, PROMPT)
    torch.testing.assert_close(hot, torch.full_like(hot, 1 / 3), atol=1e-6, rtol=0)
    one_hot = nn.functional.one_hot(sharp.argmax(-1), 3).to(cold.dtype)
    torch.testing.assert_close(cold, one_hot, atol=1e-6, rtol=0)


def test_permuting_adapters_with_the_rows_and_columns_of_e_permutes_the_weights():
    E, gate = random_unit()
    order = [2, 0, 1]
    e = gate.e.reshape(3, 5, 3)[order][:, :, order].reshape(15, 3)
    G = gate_weights(E, gate, "token", REAL, PROMPT)
    moved = gate_weights([E[i] for i in order], gate._replace(e=e), "token", REAL, PROMPT)
    torch.testing.assert_close(moved, G[..., order])
    torch.testing.assert_close(mix([E[i] for i in order], moved), mix(E, G))


def test_the_token_gate_is_causal_and_the_mean_gate_reads_only_valid_tokens():
    E, gate = random_unit()
    later, padding = [e.clone() for e in E], [e.clone() for e in E]
    for e in later:
        e[:, 3] = e[:, 3].square()
    for e in padding:
        e[~REAL] = 7.0
    before, after = (gate_weights(v, gate, "token", REAL, PROMPT) for v in (E, later))
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3] - after[:, 3]).abs().max() > 1e-3
    mean, padded, moved = (gate_weights(v, gate, "mean", REAL, PROMPT) for v in (E, padding, later))
    assert torch.equal(mean, padded)
    assert (mean - moved).abs().max() > 1e-3


def test_flatten_refuses_another_length():
    E, _ = random_unit()
    gate = Gate(torch.zeros(6 * 15, 3, dtype=torch.float64), torch.tensor(0.0))
    assert gate_weights(E, gate, "flatten", REAL, PROMPT).shape == (2, 3)
    with pytest.raises(ValueError, match="only at the length"):
        gate_weights([e[:, :5] for e in E], gate, "flatten", REAL[:, :5], PROMPT[:, :5])


# -- the balance loss ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_balance_loss_is_n_log_n_when_uniform_and_larger_otherwise(n):
    uniform = torch.full((2, n), 1 / n)
    assert balance_loss([uniform], REAL).item() == pytest.approx(n * math.log(n), rel=1e-6)
    assert balance_floor(n) == pytest.approx(n * math.log(n))
    tilted = torch.softmax(torch.arange(n) / 10, 0).expand(2, n)
    assert balance_loss([tilted], REAL) > balance_floor(n) + 1e-4


def test_two_opposite_gates_are_balanced_because_the_mean_comes_before_the_log():
    first, second = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[0.0, 1.0]] * 2)
    assert balance_loss([first, second], REAL).item() == pytest.approx(2 * math.log(2))
    assert balance_loss([first], REAL).item() == pytest.approx(-math.log(1e-8))


def test_the_balance_loss_ignores_the_order_of_experts_and_padded_tokens():
    G = torch.rand(2, 6, 3).softmax(-1)
    loss = balance_loss([G], REAL)
    torch.testing.assert_close(balance_loss([G[..., [2, 0, 1]]], REAL), loss)
    changed = G.masked_fill(~REAL[..., None], 0.9)
    assert torch.equal(balance_loss([changed], REAL), loss)


# -- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("run", "config"), EVERY_MODE)
def test_adapters_with_zero_b_leave_the_base_and_no_residual_counts_twice(pico, run, config):
    params = params_for(pico, run, config)
    zero = {s: [e._replace(B=0 * e.B) for e in es] for s, es in params.experts.items()}
    logits, _ = run(pico, IDS, MASK, PROMPT, params._replace(experts=zero), config)
    assert torch.equal(logits, model_logits(pico, IDS, MASK))


@pytest.mark.parametrize(("run", "config"), EVERY_MODE)
def test_a_single_adapter_gets_weight_one_for_any_gate(pico, run, config):
    params = params_for(pico, run, config, num_experts=1)
    logits, details = run(pico, IDS, MASK, PROMPT, params, config)
    assert all(G.eq(1).all() for G in details["gates"].values())
    close(logits, lora.oracle_logits(pico, IDS, MASK, single_expert(params, 0)))


@pytest.mark.parametrize(("run", "config"), EVERY_MODE)
def test_masking_all_but_one_branch_is_that_adapter_alone(pico, run, config):
    params = params_for(pico, run, config)
    masked = config._replace(expert_mask=(False, False, True))
    logits, _ = run(pico, IDS, MASK, PROMPT, params, masked)
    close(logits, lora.oracle_logits(pico, IDS, MASK, single_expert(params, 2)))


@pytest.mark.parametrize("granularity", ["matrix", "layer", "block", "network"])
def test_at_step_zero_the_model_is_the_one_merged_with_weights_one_over_n(pico, granularity):
    config = Config(granularity=granularity)
    params = params_for(pico, oracle_logits, config, gate_std=0.0)
    logits, details = oracle_logits(pico, IDS, MASK, PROMPT, params, config)
    torch.testing.assert_close(details["balance_excess"], torch.tensor(0.0), atol=1e-5, rtol=0)
    merged = build_pico("llama")
    for site, experts in params.experts.items():
        weight = merged.get_submodule(site).weight
        weight.data = lora.merged_weight(weight.data, experts, [1 / 3] * 3)
    close(logits, model_logits(merged, IDS, MASK))


def test_at_step_zero_the_model_equals_a_peft_cat_adapter_with_weights_one_over_n(pico):
    ranks = (4, 2, 3)
    params = params_for(pico, oracle_logits, Config(), gate_std=0.0, ranks=ranks)
    expected, _ = oracle_logits(pico, IDS, MASK, PROMPT, params, Config())
    targets = sorted({site.split(".")[-1] for site in params.experts})
    model = None
    for i, rank in enumerate(ranks):
        scale = params.experts[layer_linears(pico)[0]][i].scale
        config = peft.LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=targets)
        if model is None:
            model = peft.get_peft_model(build_pico("llama"), config, adapter_name="a0")
        else:
            model.add_adapter(f"a{i}", config)
        for site, experts in params.experts.items():
            layer = model.base_model.model.get_submodule(site)
            layer.lora_A[f"a{i}"].weight.data = experts[i].A.clone()
            layer.lora_B[f"a{i}"].weight.data = experts[i].B.clone()
    model.add_weighted_adapter(["a0", "a1", "a2"], [1 / 3] * 3, "mix", combination_type="cat")
    model.set_adapter("mix")
    close(model_logits(model.eval(), IDS, MASK), expected)


@pytest.mark.parametrize(("run", "config"), EVERY_MODE)
def test_only_gates_and_temperatures_would_train_and_both_get_a_gradient(pico, run, config):
    pico.requires_grad_(False)
    params = params_for(pico, run, config)
    leaves = [t.requires_grad_() for gate in params.gates.values() for t in gate]
    logits, _ = run(pico, IDS, MASK, PROMPT, params, config)
    gradients = torch.autograd.grad(logits[REAL].square().mean(), leaves)
    assert all(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("granularity", ["matrix", "layer", "network"])
def test_identical_adapters_give_the_gates_no_gradient_and_distinct_ones_do(granularity):
    model = build_pico("llama", dtype=torch.float64).requires_grad_(False)
    config = Config(granularity=granularity)
    distinct = params_for(model, oracle_logits, config, num_experts=2, gate_std=0.0)
    same = distinct._replace(experts={s: [es[0]] * 2 for s, es in distinct.experts.items()})
    sizes = []
    for params in (same, distinct):
        leaves = [gate.e.requires_grad_() for gate in params.gates.values()]
        logits, _ = oracle_logits(model, IDS, MASK, PROMPT, params, config)
        gradients = torch.autograd.grad(logits[REAL].square().mean(), leaves)
        sizes.append(max(g.abs().max().item() for g in gradients))
    assert sizes[0] < 1e-12
    assert sizes[1] > 1e-4


@pytest.mark.parametrize("pool", ["mean", "token", "prompt_mean"])
def test_padding_changes_nothing(pico, pool):
    config = Config(pool=pool)
    params = params_for(pico, oracle_logits, config)
    together, _ = oracle_logits(pico, IDS, MASK, PROMPT, params, config)
    alone, _ = oracle_logits(pico, IDS[1:, :4], None, PROMPT[1:, :4], params, config)
    torch.testing.assert_close(together[1:, :4], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["token", "prompt_mean", "mean"])
def test_later_tokens_do_not_change_earlier_logits_except_in_mean_mode(pico, pool):
    config = Config(pool=pool)
    params = params_for(pico, oracle_logits, config)
    changed = IDS.clone()
    changed[0, 4:] = 70
    before, after = (
        oracle_logits(pico, ids, MASK, PROMPT, params, config)[0][0, :4] for ids in (IDS, changed)
    )
    assert torch.allclose(before, after, atol=1e-5) is (pool != "mean")


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize(
    ("granularity", "num_units"), [("layer", 4), ("block", 2), ("network", 1), ("matrix", None)]
)
def test_there_is_one_gate_per_unit(family, granularity, num_units):
    model = build_pico(family)
    config = Config(granularity=granularity)
    params = params_for(model, oracle_logits, config)
    _, details = oracle_logits(model, IDS, MASK, PROMPT, params, config)
    assert len(details["gates"]) == (num_units or len(layer_linears(model)))
    units = {unit_of(site, granularity, model) for site in params.experts}
    assert units == set(details["gates"]) == set(params.gates)


def test_parallel_and_additive_are_different_functions(pico):
    config = Config(granularity="block", pool="mean")
    fresh = params_for(pico, oracle_logits, config, gate_std=0.0)
    exact = params_for(pico, parallel_logits, config, gate_std=0.0)
    additive, _ = oracle_logits(pico, IDS, MASK, PROMPT, fresh, config)
    parallel, _ = parallel_logits(pico, IDS, MASK, PROMPT, exact, config)
    assert (additive - parallel)[REAL].abs().max() > 1e-2


def test_an_adapter_without_a_site_adds_nothing_there(pico):
    params = params_for(pico, oracle_logits, Config(), num_experts=2)
    site = layer_linears(pico)[3]
    holes = dict(params.experts) | {site: [None, params.experts[site][1]]}
    zeros = dict(params.experts) | {
        site: [params.experts[site][0]._replace(B=0 * params.experts[site][0].B), holes[site][1]]
    }
    with_hole, with_zero = (
        oracle_logits(pico, IDS, MASK, PROMPT, params._replace(experts=e), Config())[0]
        for e in (holes, zeros)
    )
    torch.testing.assert_close(with_hole, with_zero)


def test_weight_sum_n_with_fresh_gates_adds_every_adapter_at_full_strength(pico):
    config = Config(weight_sum="N")
    params = params_for(pico, oracle_logits, config, gate_std=0.0)
    logits, _ = oracle_logits(pico, IDS, MASK, PROMPT, params, config)
    merged = build_pico("llama")
    for site, experts in params.experts.items():
        weight = merged.get_submodule(site).weight
        weight.data = lora.merged_weight(weight.data, experts, [1.0] * 3)
    torch.testing.assert_close(
        logits[REAL], model_logits(merged, IDS, MASK)[REAL], atol=1e-4, rtol=1e-4
    )


def test_parameter_counts_of_the_specification(pico):
    assert parameter_count(1, 8, 1024) == 65_537
    assert parameter_count(1, 3, 320) == 2_881
    params = params_for(pico, oracle_logits, Config(granularity="layer"))
    counted = sum(gate.e.numel() + 1 for gate in params.gates.values())
    # First linears: q_proj (32 out) and gate_proj (48 out) in each of two layers.
    assert counted == parameter_count(2, 3, 32) + parameter_count(2, 3, 48)
