"""Sums, SVD, TIES and DARE against dense restatements, and the properties their papers name."""

import pytest
import torch

from compose.samples import loras, merge, parts, product
from loramux.compose.algebra import best, cut, distance, inner, norm, stack
from loramux.compose.mergers.dare_linear import dropped
from loramux.compose.mergers.ties import threshold
from oracles import merging as oracle

MIXED, SCALES, WEIGHTS = (2, 3, 4), (2.0, 0.5, 1.5), (0.7, -0.4, 1.1)
EXACT = {"rtol": 1e-10, "atol": 1e-10}
FP32 = {"rtol": 2e-4, "atol": 2e-5}  # methods on entries work on fp32 products


@pytest.fixture
def mixed() -> list[oracle.Lora]:
    return loras(MIXED, SCALES)


# --- Sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cat", "linear", "task_arithmetic"])
def test_a_sum_is_the_weighted_sum_of_products_at_the_sum_of_the_ranks(name: str, mixed):
    made = merge(name, mixed, WEIGHTS)
    torch.testing.assert_close(product(made), oracle.weighted_sum(mixed, WEIGHTS), **EXACT)
    assert made.rank == sum(MIXED)
    assert made.error == 0


def test_the_output_is_the_loop_over_adapters_in_any_order(mixed):
    x = torch.randn(5, 12, dtype=torch.float64)
    looped = sum(w * s * x @ a.T @ b.T for (a, b, s), w in zip(mixed, WEIGHTS, strict=True))
    for order in ((0, 1, 2), (2, 0, 1)):
        made = merge("cat", [mixed[i] for i in order], [WEIGHTS[i] for i in order])
        torch.testing.assert_close(x @ made.a.T @ made.b, looped, **EXACT)


@pytest.mark.parametrize("name", ["cat", "linear", "svd", "task_arithmetic"])
def test_a_weight_of_one_reproduces_its_adapter_and_opposite_weights_cancel(name: str, mixed):
    options = {"rank": 9} if name == "svd" else {}
    alone = merge(name, mixed, (0.0, 1.0, 0.0), **options)
    torch.testing.assert_close(product(alone), oracle.delta(mixed[1]), **EXACT)
    none = merge(name, [mixed[0], mixed[0]], (0.6, -0.6), **options)
    torch.testing.assert_close(product(none), torch.zeros(10, 12, dtype=torch.float64), **EXACT)


def test_lambda_multiplies_and_zero_is_the_base(mixed):
    made = merge("task_arithmetic", mixed)
    torch.testing.assert_close(
        product(made.times(0.3)), 0.3 * oracle.weighted_sum(mixed, (1, 1, 1)), **EXACT
    )
    assert not product(made.times(0.0)).any()


def test_a_mean_brings_the_weights_to_a_sum_of_one(mixed):
    made = merge("mean", mixed, (1.0, 2.0, 5.0))
    wanted = oracle.weighted_sum(mixed, (0.125, 0.25, 0.625))
    torch.testing.assert_close(product(made), wanted, **EXACT)
    with pytest.raises(ValueError, match="must not sum to 0"):
        merge("mean", mixed, (1.0, 1.0, -2.0))


def test_pefts_linear_is_another_matrix_than_the_weighted_sum(mixed):
    """Why it is not used: adding A and B apart brings in the products of strangers."""
    from peft.utils.merge_utils import task_arithmetic

    same = loras((3, 3))
    root = torch.tensor([(0.5 * s) ** 0.5 for _, _, s in same], dtype=torch.float64)
    a = task_arithmetic([a for a, _, _ in same], root)
    b = task_arithmetic([b for _, b, _ in same], root)
    wanted = oracle.weighted_sum(same, (0.5, 0.5))
    assert (b @ a - wanted).norm() > 0.5 * wanted.norm()
    torch.testing.assert_close(product(merge("linear", same, (0.5, 0.5))), wanted, **EXACT)


# --- SVD ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 6, 9, 40])
def test_svd_is_the_nearest_matrix_of_rank_k_and_its_error_the_dropped_singular_values(k, mixed):
    made = merge("svd", mixed, WEIGHTS, rank=k)
    whole = oracle.weighted_sum(mixed, WEIGHTS)
    wanted, left = oracle.nearest_of_rank(whole, k)
    torch.testing.assert_close(product(made), wanted, **EXACT)
    assert made.error == pytest.approx(left / float(whole.norm()), abs=1e-9)
    assert made.rank == min(k, sum(MIXED))


def test_svd_with_every_rank_is_cat(mixed):
    made = merge("svd", mixed, WEIGHTS, rank=sum(MIXED))
    torch.testing.assert_close(product(made), product(merge("cat", mixed, WEIGHTS)), **EXACT)
    assert made.error == pytest.approx(0, abs=1e-12)
    assert merge("svd", mixed, WEIGHTS).rank == max(MIXED)
    limited = merge("linear", mixed, WEIGHTS, rank=3)
    torch.testing.assert_close(
        product(limited), product(merge("svd", mixed, WEIGHTS, rank=3)), **EXACT
    )


def test_svd_puts_the_singular_values_on_b(mixed):
    made = merge("svd", mixed, WEIGHTS, rank=4)
    torch.testing.assert_close(made.a @ made.a.T, torch.eye(4, dtype=torch.float64), **EXACT)


def test_norms_angles_and_distances_come_from_the_factors(mixed):
    p, q = (stack(parts([lora])) for lora in mixed[:2])
    dense_p, dense_q = oracle.delta(mixed[0]), oracle.delta(mixed[1])
    assert inner(p, q) == pytest.approx(float((dense_p * dense_q).sum()))
    assert norm(*p) == pytest.approx(float(dense_p.norm()))
    assert distance(p, q) == pytest.approx(float((dense_p - dense_q).norm()))
    assert distance(p, p) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (25, 25)])
def test_a_dense_matrix_is_cut_as_a_full_svd_cuts_it(shape: tuple[int, int]):
    matrix = torch.randn(shape, dtype=torch.float64).float()
    wanted, left = oracle.nearest_of_rank(matrix.double(), 5)
    made = cut(matrix, 5, seed=0)
    torch.testing.assert_close(product(made), wanted, rtol=1e-5, atol=1e-5)
    assert made.error == pytest.approx(left / float(matrix.norm()), rel=1e-5)


def test_a_randomised_cut_says_its_true_error_and_is_close_to_the_best(monkeypatch):
    monkeypatch.setattr("loramux.compose.algebra.EXACT_WIDTH", 8)
    matrix = torch.randn(120, 100)
    _, left = oracle.nearest_of_rank(matrix.double(), 12)
    made = cut(matrix, 12, seed=3)
    true = float((product(made) - matrix).norm() / matrix.norm())
    assert made.error == pytest.approx(true, rel=1e-4)
    assert left / float(matrix.norm()) <= true * 1.000001
    assert true < 1.01 * left / float(matrix.norm())
    again = cut(matrix, 12, seed=3)
    assert torch.equal(made.a, again.a) and torch.equal(made.b, again.b)


def test_cutting_uses_no_global_random_numbers(monkeypatch):
    monkeypatch.setattr("loramux.compose.algebra.EXACT_WIDTH", 8)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    cut(torch.ones(80, 70), 4, seed=1)
    merge("dare_linear", loras((2, 2)), seed=1)
    assert torch.equal(torch.rand(3), expected)


# --- TIES -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_trims_elects_and_averages_entry_by_entry(density: float, sign: str, mixed):
    made = merge("ties", mixed, WEIGHTS, density=density, sign=sign, rank=10)
    wanted = oracle.ties(mixed, WEIGHTS, density, sign)
    torch.testing.assert_close(product(made), wanted, **FP32)
    assert made.error == pytest.approx(0, abs=1e-3)


def test_ties_is_pefts_ties_on_the_products(mixed):
    from peft.utils.merge_utils import ties

    deltas = [oracle.delta(lora).float() for lora in mixed]
    theirs = ties(deltas, torch.tensor(WEIGHTS), 0.3)
    made = merge("ties", mixed, WEIGHTS, density=0.3, rank=10)
    torch.testing.assert_close(product(made).float(), theirs, **FP32)


def test_ties_of_copies_at_full_density_is_the_copy(mixed):
    made = merge("ties", [mixed[2]] * 3, density=1.0)
    torch.testing.assert_close(product(made), oracle.delta(mixed[2]), **FP32)


def test_ties_of_opposites_keeps_the_positive_side():
    (lora,) = loras((3,))
    against = (-lora[0], lora[1], lora[2])
    made = merge("ties", [lora, against], density=1.0, rank=10)
    torch.testing.assert_close(product(made), oracle.delta(lora).abs(), **FP32)


def test_ties_divides_by_the_count_and_not_by_the_weights():
    (lora,) = loras((3,))
    made = merge("ties", [lora, lora], (0.5, 2.0), density=1.0)
    torch.testing.assert_close(product(made), (0.5 + 2.0) / 2 * oracle.delta(lora), **FP32)


def test_ties_changes_no_entry_that_every_adapter_trimmed(mixed):
    kept = [oracle.trim(oracle.delta(lora), 0.2) != 0 for lora in mixed]
    made = product(merge("ties", mixed, density=0.2, rank=10))
    assert not (made.abs() > 1e-4)[~torch.stack(kept).any(0)].any()


def test_a_cut_ties_is_the_nearest_of_its_rank(mixed):
    whole = oracle.ties(mixed, WEIGHTS, 0.4)
    wanted, left = oracle.nearest_of_rank(whole, 3)
    made = merge("ties", mixed, WEIGHTS, density=0.4, rank=3)
    torch.testing.assert_close(product(made), wanted, **FP32)
    assert made.error == pytest.approx(left / float(whole.norm()), rel=1e-3)


@pytest.mark.parametrize("size", [7, 5000])
def test_the_threshold_is_that_of_a_full_sort(size: int, monkeypatch):
    monkeypatch.setattr("loramux.compose.mergers.ties.SAMPLE", 64)
    values = torch.randn(1, size)
    for density in (0.2, 0.5, 0.99):
        count = int(density * size)
        wanted = values.abs().flatten().sort(descending=True).values[count - 1]
        assert threshold(values, density) == float(wanted)
    constant = torch.ones(1, size)
    assert threshold(constant, 0.5) == 1.0


# --- DARE -----------------------------------------------------------------------------------------


def test_dare_at_density_one_is_the_weighted_sum(mixed):
    made = merge("dare_linear", mixed, WEIGHTS, density=1.0, rank=10)
    torch.testing.assert_close(product(made), oracle.weighted_sum(mixed, WEIGHTS), **FP32)
    made = merge("dare_ties", mixed, WEIGHTS, density=1.0, rank=10)
    torch.testing.assert_close(product(made), oracle.ties(mixed, WEIGHTS, 1.0), **FP32)


def test_dare_keeps_entries_whole_or_not_at_all_scaled_by_the_density(mixed):
    for kept, lora in zip(dropped(parts(mixed), 0.5, seed=3), mixed, strict=True):
        there = kept != 0
        assert 0.3 < float(there.float().mean()) < 0.7
        torch.testing.assert_close(kept[there].double(), oracle.delta(lora)[there] / 0.5, **FP32)


def test_dare_ties_elects_among_what_was_not_dropped(mixed):
    kept = [k.double() for k in dropped(parts(mixed), 0.5, seed=7)]
    made = merge("dare_ties", mixed, WEIGHTS, seed=7, density=0.5, rank=10)
    torch.testing.assert_close(product(made), oracle.elect_and_average(kept, WEIGHTS), **FP32)


def test_the_mean_of_dare_over_seeds_is_the_weighted_sum(mixed):
    made = [
        product(merge("dare_linear", mixed, WEIGHTS, seed=s, density=0.5, rank=10))
        for s in range(400)
    ]
    wanted = oracle.weighted_sum(mixed, WEIGHTS)
    assert (torch.stack(made).mean(0) - wanted).norm() < 0.1 * wanted.norm()
    assert (made[0] - wanted).norm() > 0.5 * wanted.norm()


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_one_seed_gives_one_result(name: str, mixed):
    one, two, other = (merge(name, mixed, seed=s) for s in (4, 4, 5))
    assert torch.equal(one.a, two.a) and torch.equal(one.b, two.b)
    assert not torch.equal(one.a, other.a)


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan"), "half"])
@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties"])
def test_a_density_outside_its_range_is_refused(name: str, density):
    with pytest.raises(ValueError, match="density must be a number above 0 and at most 1"):
        merge(name, loras((2, 2)), density=density)


def test_a_density_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match="keeps none of 120 entries"):
        merge("ties", loras((2, 2)), density=0.001)


def test_best_of_nothing_is_nothing():
    made = best(torch.zeros(2, 5), torch.zeros(2, 4), 1)
    assert made.error == 0 and made.rank == 1
