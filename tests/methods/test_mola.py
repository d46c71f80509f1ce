"""MoLA: experts by layer, two of them per token, and the balance of each linear."""

import pytest
import torch

import loramux
from loramux.methods.mola import spread_over
from methods.bridge import adapter_of, same_gradients
from methods.site_mixture_case import RANK, REAL, attached, config_of, oracle, run
from oracles import site_mixture
from pico import build_pico


def test_two_of_two_experts_are_the_dense_softmax():
    model, handle = attached("mola", experts_per_layer=(2,))
    dense, handle_of_dense = attached("molora", num_experts=2)
    assert torch.equal(run(model, handle), run(dense, handle_of_dense))


def test_every_quarter_of_the_layers_gets_its_number():
    quarters = spread_over((2, 4, 6, 8), range(32))
    assert [quarters[layer] for layer in range(32)] == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8
    assert list(spread_over((2, 4, 6, 8), range(30)).values()).count(2) == 8
    assert spread_over((5,), [3, 7]) == {3: 5, 7: 5}
    assert spread_over((1, 2, 3), [0, 1, 2]) == {0: 1, 1: 2, 2: 3}


@pytest.mark.parametrize(
    ("layers", "numbers"), [(4, (2, 4, 6, 8)), (8, (2, 2, 4, 4, 6, 6, 8, 8)), (2, (2, 6))]
)
def test_a_model_of_any_depth_gets_the_pattern(layers: int, numbers: tuple[int, ...]):
    model = build_pico("llama", num_hidden_layers=layers)
    handle = loramux.attach(model, config_of("mola", experts_per_layer=(2, 4, 6, 8)))
    for path, rows in adapter_of(handle).rows.items():
        assert rows.spans.num_slots == numbers[int(path.split(".")[2])]


def test_of_some_layers_only_those_are_counted():
    handle = loramux.attach(
        build_pico("llama", num_hidden_layers=6),
        config_of("mola", experts_per_layer=(1, 3), layers_to_transform=(1, 4)),
    )
    found = {int(p.split(".")[2]): r.spans.num_slots for p, r in adapter_of(handle).rows.items()}
    assert found == {1: 1, 4: 3}


def test_more_numbers_than_layers_are_refused():
    config = config_of("mola", experts_per_layer=(2, 4, 6))
    with pytest.raises(ValueError, match="has 3 numbers for 2 layers .* give at most 2"):
        loramux.attach(build_pico("llama"), config)


def test_the_parameters_are_those_of_the_formula():
    _, handle = attached("mola", fresh=True)
    adapter = adapter_of(handle)
    count = sum(
        site_mixture.count_full([(site.d_in, site.d_out)], 2 if site.layer == 0 else 4, RANK)
        for site in adapter.sites.values()
    )
    assert sum(p.numel() for p in handle.trainable_parameters().values()) == count


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_the_oracles_with_its_gradients(reduction: str):
    model, handle = attached("mola", double=True, aux_reduction=reduction)
    run(model, handle)
    _, details = oracle("mola", handle, double=True)
    terms = torch.stack(
        [site_mixture.selection_balance(d["weights"], d["probs"], REAL) for d in details.values()]
    )
    expected = 1e-3 * (terms.mean() if reduction == "mean" else terms.sum())
    got = handle.aux_losses()["default/balance"]
    torch.testing.assert_close(got, expected)
    same_gradients(handle, got, expected, 1e-12)


def test_a_balanced_linear_loses_one_times_the_coefficient():
    model, handle = attached("mola", fresh=True, router_init_range=0.0, experts_per_layer=(2,))
    run(model, handle)
    assert float(handle.aux_losses()["default/balance"].detach()) == pytest.approx(1e-3)


def test_each_token_takes_two_experts_whose_weights_sum_to_one():
    model, handle = attached("mola", experts_per_layer=(4,))
    run(model, handle)
    for record in handle.routing():
        assert bool(((record.gates > 0).sum(1) == 2).all())
        torch.testing.assert_close(record.gates.sum(1), torch.ones(len(record.gates)))


@pytest.mark.parametrize("wrong", [(), (2, 0), "2468", 4])
def test_numbers_of_experts_are_checked(wrong: object):
    with pytest.raises(ValueError, match="experts_per_layer"):
        config_of("mola", experts_per_layer=wrong)
