"""The MiLoRA oracle keeps what the paper's equations promise."""

import pytest
import torch
from torch import Tensor, nn

from oracles import lora
from oracles.milora import (
    GELU_A,
    GELU_B,
    Config,
    Params,
    Router,
    attention_pool_weights,
    balance_loss,
    gates,
    oracle_logits,
    parameter_count,
    pool,
    probabilities,
    rational,
    rational_denominator,
    top_k_mask,
)
from oracles.random_params import layer_modules, milora_params
from oracles.surgery import model_logits
from pico import FAMILIES, build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29, 44], [90, 33, 12, 7, 70, 52, 9]])
PROMPT = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]).bool()
N_MOD = 7


def run(
    model: nn.Module, params: Params, ids: Tensor = IDS, mask: Tensor | None = None, **changes
) -> tuple[Tensor, dict[str, Tensor]]:
    prompt = changes.pop("prompt", PROMPT)
    config = Config(modules=layer_modules(model), **changes)
    return oracle_logits(model, ids, mask, prompt, params, config)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_fresh_adapter_gives_the_logits_of_the_base_for_any_routing(pico, k):
    params = milora_params(pico)
    experts = {p: e._replace(B=torch.zeros_like(e.B)) for p, e in params.experts.items()}
    logits, _ = run(pico, params._replace(experts=experts), top_k=k)
    torch.testing.assert_close(logits, model_logits(pico, IDS, None), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dora", [False, True])
def test_all_modules_with_unit_gates_are_plain_lora(family, dora):
    model = build_pico(family)
    params = milora_params(model, dora=dora)
    logits, details = run(model, params, top_k=len(layer_modules(model)))
    expected = lora.oracle_logits(model, IDS, None, params.experts)
    assert details["gates"].eq(1).all()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chosen", range(N_MOD))
def test_one_forced_module_is_plain_lora_on_that_module(pico, chosen):
    params = milora_params(pico)
    forced = torch.zeros(2, 2, N_MOD)
    forced[:, :, chosen] = 1
    config = Config(modules=layer_modules(pico), top_k=1)
    logits, _ = oracle_logits(pico, IDS, None, PROMPT, params, config, forced_gates=forced)
    name = layer_modules(pico)[chosen]
    only = {p: e for p, e in params.experts.items() if p.endswith(name)}
    assert len(only) == 2
    expected = lora.oracle_logits(pico, IDS, None, only)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_exactly_k_gates_are_non_zero_per_sample_and_layer(pico, k):
    _, details = run(pico, milora_params(pico), top_k=k)
    assert details["gates"].shape == (2, 2, N_MOD)
    assert details["gates"].count_nonzero(-1).eq(k).all()


def test_the_two_prompts_of_a_batch_are_routed_differently(pico):
    _, details = run(pico, milora_params(pico), top_k=1)
    assert not torch.equal(details["gates"][0], details["gates"][1])


@pytest.mark.parametrize("pooler", ["attention", "mean", "last", "max"])
def test_response_tokens_leave_the_routing_bit_identical_and_prompt_tokens_do_not(pico, pooler):
    params = milora_params(pico)
    _, before = run(pico, params, pooler=pooler)
    response, prompt = IDS.clone(), IDS.clone()
    response[~PROMPT] = 77
    prompt[:, 3] = 77
    assert torch.equal(run(pico, params, response, pooler=pooler)[1]["p"], before["p"])
    assert not torch.equal(run(pico, params, prompt, pooler=pooler)[1]["p"], before["p"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_routing_nor_logits(pico, side):
    params = milora_params(pico)
    alone, details = run(pico, params)
    width, left = (3, 0) if side == "left" else (0, 3)
    pad = nn.functional.pad
    ids, prompt = pad(IDS, (width, left)), pad(PROMPT, (width, left))
    mask = pad(torch.ones_like(IDS), (width, left))
    logits, padded = run(pico, params, ids, mask, prompt=prompt)
    torch.testing.assert_close(padded["p"], details["p"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[:, width : width + 7], alone, atol=1e-5, rtol=1e-5)


def test_a_batch_routes_each_prompt_as_it_would_alone(pico):
    params = milora_params(pico)
    both, details = run(pico, params)
    for i in range(2):
        one, single = run(pico, params, IDS[i : i + 1], prompt=PROMPT[i : i + 1])
        torch.testing.assert_close(single["p"], details["p"][i : i + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one, both[i : i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [2, 7])
def test_the_balance_loss_is_one_when_uniform_and_n_when_collapsed(n):
    uniform = torch.full((5, n), 1 / n)
    assert balance_loss(uniform).item() == pytest.approx(1, abs=1e-6)
    collapsed = torch.eye(n)[torch.full((5,), n - 1)]
    assert balance_loss(collapsed).item() == n


def test_the_balance_loss_counts_only_the_argmax_and_its_gradient_flows_through_the_mean():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], requires_grad=True)
    loss = balance_loss(p)
    assert loss.item() == pytest.approx(3 * (0.5 * 0.3 + 0.5 * 0.45))
    (gradient,) = torch.autograd.grad(loss, p)
    # d loss / d p_xi = N f_i / N_B with f = (1/2, 1/2, 0) held constant.
    torch.testing.assert_close(gradient, torch.tensor([[0.75, 0.75, 0.0]] * 2))


def test_the_balance_of_the_layers_is_summed_or_averaged(pico):
    params = milora_params(pico)
    _, total = run(pico, params)
    _, mean = run(pico, params, reduction="mean")
    assert total["balance"].shape == (2,)
    torch.testing.assert_close(total["aux"], total["balance"].sum())
    torch.testing.assert_close(mean["aux"], total["aux"] / 2)


def test_the_balance_loss_reaches_router_and_pooler_but_no_expert_of_the_last_layer(pico):
    params = milora_params(pico)
    last = max(params.routers)
    router = Router(*(t.requires_grad_() for t in params.routers[last]))
    for expert in params.experts.values():
        expert.A.requires_grad_()
    _, details = run(pico, params)
    details["aux"].backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in router)
    grads = {p: e.A.grad for p, e in params.experts.items() if p.startswith(last)}
    assert all(g is None or not g.any() for g in grads.values())


def test_gates_by_mode_on_a_worked_example():
    p = torch.tensor([[0.5, 0.1, 0.4]])
    assert gates(p, 2, "ste").tolist() == [[1.0, 0.0, 1.0]]
    torch.testing.assert_close(gates(p, 2, "prob"), torch.tensor([[0.5, 0.0, 0.4]]))
    torch.testing.assert_close(gates(p, 2, "renorm"), torch.tensor([[2 * 5 / 9, 0.0, 2 * 4 / 9]]))


def test_straight_through_gates_are_exactly_one_and_pass_the_gradient_of_p_when_selected():
    p = torch.tensor([[0.5, 0.1, 0.4]], requires_grad=True)
    gate = gates(p, 2, "ste")
    assert gate.eq(torch.tensor([[1.0, 0.0, 1.0]])).all()
    gate.backward(torch.tensor([[2.0, 3.0, 5.0]]))
    assert p.grad.tolist() == [[2.0, 0.0, 5.0]]


def test_a_tie_goes_to_the_lower_index():
    p = torch.tensor([[0.2, 0.3, 0.2, 0.3, 0.0]])
    assert top_k_mask(p, 1).tolist() == [[0, 1, 0, 0, 0]]
    assert top_k_mask(p, 3).tolist() == [[1, 1, 0, 1, 0]]
    assert top_k_mask(torch.full((1, 7), 1 / 7), 3).tolist() == [[1, 1, 1, 0, 0, 0, 0]]


def test_the_rational_unit_starts_within_2e_4_of_gelu():
    x = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    a, b = torch.tensor(GELU_A).double(), torch.tensor(GELU_B).double()
    assert (rational(x, a, b) - nn.functional.gelu(x)).abs().max() < 2e-4


def test_the_rational_units_known_values_far_out():
    x = torch.tensor([-6.0, -10.0, 10.0], dtype=torch.float64)
    a, b = torch.tensor(GELU_A).double(), torch.tensor(GELU_B).double()
    expected = torch.tensor([0.25, 1.95, 11.95], dtype=torch.float64)
    torch.testing.assert_close(rational(x, a, b), expected, atol=0.01, rtol=0)


def test_the_absolute_value_is_around_the_whole_sum_of_the_denominator():
    b = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])
    x = torch.tensor([1.0, 2.0, -1.0])
    assert rational_denominator(x, b).tolist() == [1.0, 3.0, 3.0]
    a = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 1.0])
    torch.testing.assert_close(rational(x, a, b), torch.tensor([4.0, 73 / 3, 4 / 3]))


def test_the_rational_denominator_is_never_below_one_and_the_output_finite_to_1e4():
    draw = torch.Generator().manual_seed(0)
    x = torch.cat([torch.linspace(-1e4, 1e4, 401), torch.randn(200, generator=draw)])
    for _ in range(20):
        b = 10 * torch.randn(5, generator=draw)
        assert (rational_denominator(x, b) >= 1).all()
    assert rational(x, torch.tensor(GELU_A), torch.tensor(GELU_B)).isfinite().all()


def test_the_attention_pooler_with_zero_query_is_the_masked_mean():
    H = torch.randn(2, 7, 6)
    got = pool(H, PROMPT, "attention", torch.zeros(6))
    mean = (H * PROMPT[..., None]).sum(1) / PROMPT.sum(1, keepdim=True)
    torch.testing.assert_close(got, mean)
    torch.testing.assert_close(got, pool(H, PROMPT, "mean"))


def test_attention_weights_sum_to_one_over_the_prompt_and_vanish_elsewhere():
    H, W_sa = torch.randn(2, 7, 6), torch.randn(6)
    weights = attention_pool_weights(H, W_sa, PROMPT)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert weights[~PROMPT].eq(0).all()
    pooled = torch.einsum("bt,btd->bd", weights, H)
    torch.testing.assert_close(pool(H, PROMPT, "attention", W_sa), pooled)


def test_poolers_read_the_last_and_the_largest_prompt_value():
    H = torch.arange(14.0).reshape(2, 7, 1)
    assert pool(H, PROMPT, "last").tolist() == [[3.0], [11.0]]
    assert pool(-H, PROMPT, "max").tolist() == [[0.0], [-7.0]]


def test_a_sample_without_a_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one per sample"):
        pool(torch.randn(2, 7, 6), PROMPT & torch.tensor([[True], [False]]), "mean")


def test_the_norm_makes_routing_blind_to_the_scale_of_the_residual_stream(pico):
    router = next(iter(milora_params(pico).routers.values()))
    router = router._replace(W_sa=torch.zeros_like(router.W_sa))
    H = torch.randn(2, 7, 32)
    with_norm = Config(modules=layer_modules(pico))
    without = with_norm._replace(norm="none")
    small, large = (probabilities(s * H, PROMPT, router, with_norm) for s in (1, 50))
    torch.testing.assert_close(small, large, atol=1e-4, rtol=1e-3)
    small, large = (probabilities(s * H, PROMPT, router, without) for s in (1, 50))
    assert (small - large).abs().max() > 0.1


def test_parameter_counts_of_llama_2_7b_at_rank_32():
    d, f = 4096, 11008
    shapes = [(d, d)] * 4 + [(d, f), (d, f), (f, d)]
    assert parameter_count(shapes, d, 32, 32) == {
        "lora": 79_953_920,
        "routers": 917_504,
        "poolers": 131_072,
        "rational": 384,
    }
