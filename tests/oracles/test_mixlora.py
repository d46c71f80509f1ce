"""The MixLoRA oracle keeps what the paper's equations promise."""

import math

import pytest
import torch
from torch import Tensor

from oracles import lora
from oracles.lora import initial_magnitude
from oracles.mixlora import (
    Ffn,
    base_multiply_adds,
    expert_ffn,
    ffn_combined,
    ffn_naive,
    read_ffn,
    route_switch,
    route_top_k,
    route_top_p,
    router_logits,
    top_p_selection,
)
from oracles.mixlora_model import (
    Config,
    aux_losses,
    balance_code,
    balance_paper,
    oracle_logits,
    parameter_count,
    z_loss,
)
from oracles.random_params import ffn_experts, generator, mixlora_params
from oracles.surgery import model_logits
from pico import FAMILIES, build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29], [90, 33, 12, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
SHAPES = ("llama", "gemma", "phi3", "gpt2")


def block(
    family: str = "llama", num_experts: int = 4, dora: tuple[str, ...] = ()
) -> tuple[Ffn, list[dict[str, lora.LowRank]], Tensor, Tensor]:
    """One FFN in float64 with experts, rows x and a router G."""
    model = build_pico(family, dtype=torch.float64).requires_grad_(False)
    layers = model.transformer.h if family == "gpt2" else model.model.layers
    ffn, draw = read_ffn(layers[0].mlp), generator(0)
    experts = ffn_experts(ffn, num_experts, 3, draw, scale=2.0, dora=dora)
    x = torch.randn(11, 32, generator=draw, dtype=torch.float64)
    return ffn, experts, x, torch.randn(num_experts, 32, generator=draw, dtype=torch.float64)


def leaves_of(experts: list[dict[str, lora.LowRank]], *others: Tensor) -> list[Tensor]:
    tensors = [t for e in experts for f in e.values() for t in (f.A, f.B, f.magnitude)]
    leaves = [t for t in (*tensors, *others) if t is not None]
    return [leaf.requires_grad_() for leaf in leaves]


# -- routing -------------------------------------------------------------------------------------


def test_top_k_weights_are_the_largest_probabilities_renormalised():
    z = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    route = route_top_k(z, 2)
    torch.testing.assert_close(route.weight, torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    assert route.selected.tolist() == [[True, True, False, False]]
    assert not route.overflow.any()


def test_top_p_keeps_those_up_to_the_threshold_and_the_first_that_crosses():
    # Sixteenths are exact in binary, so the running sum meets the threshold exactly.
    exact = torch.tensor([[8.0, 4.0, 3.0, 1.0]]) / 16
    assert top_p_selection(exact, 12 / 16).tolist() == [[True, True, True, False]]
    assert top_p_selection(exact, 11.9 / 16).tolist() == [[True, True, False, False]]
    assert top_p_selection(exact, 7.9 / 16).tolist() == [[True, False, False, False]]
    assert top_p_selection(exact, 1.0).all()


def test_top_p_on_the_example_of_the_specification():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    assert top_p_selection(p, 0.8).tolist() == [[True, True, True, False]]
    assert top_p_selection(p, 0.79).tolist() == [[True, True, False, False]]


def test_top_p_weights_are_raw_unless_renormalised():
    z = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    raw, fair = route_top_p(z, 0.79), route_top_p(z, 0.79, renormalise=True)
    expected = torch.tensor([[0.5, 0.3, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(raw.weight, expected)
    torch.testing.assert_close(fair.weight, expected / 0.8)


def test_the_temperature_divides_logits_or_by_flag_probabilities():
    z = torch.tensor([[2.0, 1.0, 0.0]])
    torch.testing.assert_close(
        route_top_p(z, 1.0, temperature=0.5).weight, torch.softmax(2 * z, -1)
    )
    divided = route_top_p(z, 1.0, temperature=0.5, divide="probabilities")
    p = z.softmax(-1)
    torch.testing.assert_close(divided.weight[0, 0], 2 * p[0, 0])
    assert divided.selected.tolist() == [[True, False, False]]


def test_the_switch_sends_tokens_beyond_capacity_to_overflow_in_order_and_per_sequence():
    z = torch.tensor([[9.0, 0.0]] * 3 + [[0.0, 9.0]] + [[9.0, 0.0]] * 2)
    sequence = torch.tensor([0, 0, 0, 0, 1, 1])
    route = route_switch(z, capacity=2, sequence=sequence)
    assert route.overflow.tolist() == [False, False, True, False, False, False]
    assert route.weight.tolist() == [[1, 0], [1, 0], [0, 0], [0, 1], [1, 0], [1, 0]]


def test_the_switch_ignores_padding_when_it_counts_and_has_no_limit_without_a_capacity():
    z = torch.tensor([[9.0, 0.0]] * 4)
    mask = torch.tensor([False, True, True, True])
    limited = route_switch(z, capacity=2, token_mask=mask)
    assert limited.overflow.tolist() == [False, False, False, True]
    assert not route_switch(z).overflow.any()


def test_the_switch_weight_is_one_with_the_gradient_of_p_or_p_itself():
    z = torch.tensor([[0.3, 0.1, -0.2]], requires_grad=True)
    p = z.softmax(-1)
    (expected,) = torch.autograd.grad(p[0, 0], z)
    route = route_switch(z)
    assert route.weight.tolist() == [[1.0, 0.0, 0.0]]
    torch.testing.assert_close(torch.autograd.grad(route.weight.sum(), z)[0], expected)
    torch.testing.assert_close(route_switch(z, multiply=True).weight[0, 0], p[0, 0])


# -- the FFN -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_expert_is_the_ffn_of_the_model(family):
    model = build_pico(family)
    layers = model.transformer.h if family == "gpt2" else model.model.layers
    x = torch.randn(5, 32)
    torch.testing.assert_close(expert_ffn(x, read_ffn(layers[1].mlp), {}), layers[1].mlp(x))


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("form", [ffn_naive, ffn_combined])
def test_zero_b_gives_the_dense_ffn_under_renormalised_top_k(family, form):
    ffn, experts, x, G = block(family)
    zero = [{n: f._replace(B=torch.zeros_like(f.B)) for n, f in e.items()} for e in experts]
    y = form(x, ffn, zero, route_top_k(router_logits(x, G), 2))
    torch.testing.assert_close(y, expert_ffn(x, ffn, {}), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("strategy", ["top_k", "top_p", "switch"])
@pytest.mark.parametrize("dora_entry", [False, True])
def test_combining_before_w2_equals_the_naive_loop_in_output_and_every_gradient(
    family, strategy, dora_entry
):
    ffn, _, _, _ = block(family)
    dora = tuple(ffn.linears)[:-1] if dora_entry else ()
    ffn, experts, x, G = block(family, dora=dora)
    route = {
        "top_k": lambda z: route_top_k(z, 2),
        "top_p": lambda z: route_top_p(z, 0.8),
        "switch": lambda z: route_switch(z, capacity=2),
    }[strategy]
    leaves = leaves_of(experts, x, G)
    results = []
    for form in (ffn_naive, ffn_combined):
        y = form(x, ffn, experts, route(router_logits(x, G)))
        gradients = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        results.append([y, *(torch.zeros(1) if g is None else g for g in gradients)])
    assert strategy != "switch" or route(router_logits(x, G)).overflow.any()
    for naive, combined in zip(*results, strict=True):
        torch.testing.assert_close(combined, naive, atol=1e-9, rtol=1e-9)


def test_combining_refuses_dora_on_the_exit_linear():
    ffn, experts, x, G = block(dora=("down_proj",))
    with pytest.raises(ValueError, match="use ffn_naive"):
        ffn_combined(x, ffn, experts, route_top_k(router_logits(x, G), 2))


@pytest.mark.parametrize("family", SHAPES)
def test_identical_experts_are_one_lora_ffn_and_give_the_router_no_gradient(family):
    ffn, experts, x, G = block(family)
    G.requires_grad_()
    y = ffn_naive(x, ffn, [experts[0]] * 4, route_top_k(router_logits(x, G), 2))
    torch.testing.assert_close(y, expert_ffn(x, ffn, experts[0]), atol=1e-10, rtol=1e-10)
    (gradient,) = torch.autograd.grad(y.square().sum(), G)
    assert gradient.abs().max() < 1e-9


def test_the_router_does_get_a_gradient_from_distinct_experts():
    ffn, experts, x, G = block()
    G.requires_grad_()
    y = ffn_naive(x, ffn, experts, route_top_k(router_logits(x, G), 2))
    assert torch.autograd.grad(y.square().sum(), G)[0].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_finite_differences_agree_with_autograd(family):
    ffn, experts, x, G = block(family, num_experts=3)
    x = x[:3]
    names = list(ffn.linears)
    leaves = [t for e in experts for n in names for t in (e[n].A, e[n].B)]

    def run(x: Tensor, G: Tensor, *factors: Tensor) -> Tensor:
        feed, built = iter(factors), []
        for _ in experts:
            built.append({n: lora.LowRank(next(feed), next(feed), 2.0) for n in names})
        return ffn_naive(x, ffn, built, route_top_k(router_logits(x, G), 2))

    inputs = [t.detach().requires_grad_() for t in (x, G, *leaves)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_base_multiply_adds_of_llama_2_7b_at_top_2():
    counts = base_multiply_adds(4096, 11008, 2)
    millions = {name: round(count / 1e6, 1) for name, count in counts.items()}
    assert millions == {"naive": 270.5, "shared": 180.4, "combined": 135.3}


# -- auxiliary losses ----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balanced_selections_give_k_in_the_code_form_and_one_in_the_paper_form(k):
    num_experts, tokens = 8, 16
    p = torch.full((tokens, num_experts), 1 / num_experts)
    selected = torch.zeros(tokens, num_experts, dtype=torch.bool)
    for t in range(tokens):
        selected[t, [(t + j) % num_experts for j in range(k)]] = True
    assert balance_code(p, selected).item() == pytest.approx(k)
    nearly = p + 1e-6 * torch.eye(num_experts).repeat(tokens // num_experts, 1)
    assert balance_paper(nearly).item() == pytest.approx(1, abs=1e-4)


def test_all_tokens_on_the_same_experts_give_n_in_both_forms():
    z = torch.tensor([[60.0, 30.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]] * 5)
    route = route_top_k(z, 2)
    assert balance_code(route.p, route.selected).item() == pytest.approx(8)
    assert balance_paper(route.p).item() == pytest.approx(8)


def test_the_dynamic_balance_counts_the_mean_size_of_the_selected_set():
    p = torch.full((4, 4), 0.25)
    sizes = [1, 2, 3, 4]
    selected = torch.zeros(4, 4, dtype=torch.bool)
    for t, size in enumerate(sizes):
        selected[t, :size] = True
    assert balance_code(p, selected).item() == pytest.approx(sum(sizes) / 4)


def test_masked_tokens_do_not_touch_any_auxiliary_loss():
    z = torch.randn(6, 4)
    mask = torch.tensor([True, True, True, True, False, False])
    changed = z.clone()
    changed[4:] = 100 * torch.randn(2, 4)
    before, after = (aux_losses([route_top_k(v, 2)] * 2, mask, k=2) for v in (z, changed))
    short = aux_losses([route_top_k(z[:4], 2)] * 2, None, k=2)
    for name in before:
        assert torch.equal(before[name], after[name])
        torch.testing.assert_close(before[name], short[name])


def test_pooling_layers_hides_an_imbalance_that_the_per_layer_form_sees():
    left = route_top_k(torch.tensor([[60.0, 0.0]] * 4), 1)
    right = route_top_k(torch.tensor([[0.0, 60.0]] * 4), 1)
    losses = aux_losses([left, right], None, k=1)
    assert losses["code_pooled"].item() == pytest.approx(1)
    assert losses["code_per_layer"].item() == pytest.approx(2)


def test_the_z_loss_is_the_mean_squared_logsumexp():
    z = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert z_loss(z).item() == pytest.approx(expected)
    assert z_loss(z, torch.tensor([True, False])).item() == pytest.approx(math.log(2) ** 2)


# -- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dora", [False, True])
def test_one_expert_and_top_1_is_plain_lora_on_every_projection(family, dora):
    model = build_pico(family)
    params = mixlora_params(model, num_experts=1, dora=dora)
    logits, details = oracle_logits(model, IDS, MASK, params, Config(top_k=1))
    everything = dict(params.linears)
    for path, (expert,) in params.experts.items():
        everything |= {f"{path}.{name}": factors for name, factors in expert.items()}
    expected = lora.oracle_logits(model, IDS, MASK, everything)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert details["aux"]["code_per_layer"].item() == pytest.approx(1)


@pytest.mark.parametrize("strategy", ["mixlora", "mixlora-dynamic", "mixlora-switch"])
@pytest.mark.parametrize("family", SHAPES)
def test_fresh_adapters_leave_the_base_logits_and_trained_ones_do_not(family, strategy):
    model = build_pico(family)
    params = mixlora_params(model)
    config = Config(strategy=strategy, capacity=2, renormalise=True)
    fresh = params._replace(
        linears={p: e._replace(B=0 * e.B) for p, e in params.linears.items()},
        experts={
            p: [{n: f._replace(B=0 * f.B) for n, f in e.items()} for e in experts]
            for p, experts in params.experts.items()
        },
    )
    base = model_logits(model, IDS, MASK)
    logits, _ = oracle_logits(model, IDS, MASK, fresh, config)
    torch.testing.assert_close(logits, base, atol=1e-5, rtol=1e-5)
    assert (oracle_logits(model, IDS, MASK, params, config)[0] - base).abs().max() > 0.1


def test_dora_experts_start_as_the_base_at_any_top_k(pico):
    params = mixlora_params(pico)

    def start(site: str, factors: lora.LowRank) -> lora.LowRank:
        magnitude = initial_magnitude(pico.get_submodule(site).weight)
        return factors._replace(B=0 * factors.B, magnitude=magnitude)

    fresh = params._replace(
        linears={p: start(p, f) for p, f in params.linears.items()},
        experts={
            p: [{n: start(f"{p}.{n}", f) for n, f in e.items()} for e in experts]
            for p, experts in params.experts.items()
        },
    )
    logits, _ = oracle_logits(pico, IDS, MASK, fresh, Config(top_k=2))
    torch.testing.assert_close(logits, model_logits(pico, IDS, MASK), atol=1e-5, rtol=1e-5)


def test_extra_padding_and_another_sample_change_neither_logits_nor_masked_losses(pico):
    params, config = mixlora_params(pico), Config()
    alone, before = oracle_logits(pico, IDS[1:, :4], None, params, config)
    together, _ = oracle_logits(pico, IDS, MASK, params, config)
    torch.testing.assert_close(together[1:, :4], alone, atol=1e-5, rtol=1e-5)
    _, padded = oracle_logits(pico, IDS[1:], MASK[1:], params, config)
    for name, value in before["aux"].items():
        torch.testing.assert_close(padded["aux"][name], value, atol=1e-5, rtol=1e-5)
    assert padded["aux_unmasked"]["z"] != padded["aux"]["z"]


def test_parameter_count_of_llama_2_7b_at_rank_16_and_8_experts():
    counts = parameter_count(4096, 11008, 32, 16, 8)
    assert counts["routers"] == 1_048_576
    assert sum(counts.values()) == 203_423_744
