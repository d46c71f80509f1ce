"""LoRA-LEGO against a dense restatement with the optimal clusters, and every property its page names."""

from typing import Any

import pytest
import torch
from torch import Tensor

from compose.samples import loras, merge, parts, product
from loramux.compose.mergers.loralego import LegoOptions, centroids, pool
from oracles import merging as oracle

EXACT = {"rtol": 1e-9, "atol": 1e-9}
PLAIN = {"reweight_parameters": False, "reweight_output": False}
PAPER = {"balance": False}  # the page's algorithm to the letter


def permuted(lora: oracle.Lora, order: list[int]) -> oracle.Lora:
    a, b, s = lora
    return a[order], b[:, order], s


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("norm", ["inf", "l2"])
def test_the_merge_is_that_of_the_optimal_clusters(k: int, balance: bool, norm: str):
    given = loras((2, 3, 2), (2.0, 0.5, 1.0))
    made = merge("loralego", given, rank=k, balance=balance, norm=norm, n_init=50)
    wanted = oracle.lego(given, k, balance, float("inf") if norm == "inf" else 2.0)
    torch.testing.assert_close(product(made), wanted, **EXACT)


@pytest.mark.parametrize("ranks", [(3, 3), (2, 3, 5)])
def test_all_units_without_reweighting_are_the_sum(ranks: tuple[int, ...]):
    given = loras(ranks)
    made = merge("loralego", given, rank=sum(ranks), **PLAIN)
    wanted = oracle.weighted_sum(given, [1] * len(ranks))
    torch.testing.assert_close(product(made), wanted, **EXACT)


def test_all_units_of_equal_ranks_are_the_sum_over_the_root_of_n():
    given = loras((4, 4, 4))
    made = merge("loralego", given, rank=12)
    torch.testing.assert_close(
        product(made), oracle.weighted_sum(given, [1, 1, 1]) / 3**0.5, **EXACT
    )


@pytest.mark.parametrize("k", [4, 6])
def test_copies_of_one_adapter_merge_to_it(k: int):
    (lora,) = loras((4,))
    made = merge("loralego", [lora, permuted(lora, [2, 0, 3, 1]), lora], rank=k)
    torch.testing.assert_close(product(made), oracle.delta(lora), **EXACT)
    assert made.rank == 4  # clusters that equal points leave empty are not kept


def test_one_adapter_at_its_own_rank_is_itself():
    (lora,) = loras((5,), (0.7,))
    torch.testing.assert_close(product(merge("loralego", [lora])), oracle.delta(lora), **EXACT)


def test_one_adapter_is_compressed_to_fewer_ranks():
    a, b, s = loras((3,))[0]
    near = 1 + 0.01 * torch.randn(3, 1, dtype=torch.float64)
    doubled = torch.cat([a, a * near]), torch.cat([b, b * near.T], dim=1), s
    made = merge("loralego", [doubled], rank=3, reweight_output=False)
    wanted = oracle.delta(doubled) / 2
    assert made.rank == 3
    assert (product(made) - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize(
    "options", [{}, PAPER, {"align_sign": True}], ids=["ours", "paper", "sign"]
)
def test_permuting_ranks_or_adapters_changes_no_bit(options: dict[str, Any]):
    given = loras((6, 6, 6), (2.0, 2.0, 0.5))
    made = merge("loralego", given, rank=6, **options)
    order = [4, 1, 5, 0, 2, 3]
    shuffled = [permuted(given[2], order), given[0], permuted(given[1], order[::-1])]
    again = merge("loralego", shuffled, rank=6, **options)
    assert torch.equal(made.a, again.a) and torch.equal(made.b, again.b)


def planted(num: int = 3, rank: int = 6, noise: float = 1e-3) -> list[oracle.Lora]:
    """Noisy copies of common units, their ranks shuffled: what the method is made for."""
    made = torch.Generator().manual_seed(1)
    a = torch.randn(rank, 40, generator=made, dtype=torch.float64)
    b = torch.randn(30, rank, generator=made, dtype=torch.float64)
    copies = []
    for _ in range(num):
        order = torch.randperm(rank, generator=made).tolist()
        copy = tuple(
            m + noise * torch.randn(m.shape, generator=made, dtype=torch.float64) for m in (a, b)
        )
        copies.append(permuted((*copy, 1.0), order))
    return copies


def test_planted_units_are_recovered_where_averaging_the_factors_fails():
    given = planted()
    wanted = oracle.weighted_sum(given, [1 / 3] * 3)
    for options in ({}, PAPER):
        made = merge("loralego", given, rank=6, **options)
        assert (product(made) - wanted).norm() < 0.01 * wanted.norm()
    mean_a = sum(a for a, _, _ in given) / 3
    mean_b = sum(b for _, b, _ in given) / 3
    assert (mean_b @ mean_a - wanted).norm() > 0.3 * wanted.norm()


def centres(given: list[oracle.Lora], member: list[int], **options: Any) -> tuple[Tensor, Tensor]:
    chosen = LegoOptions(**options)
    units, weight = pool(parts(given), chosen)
    return units, centroids(units, weight, torch.tensor(member), chosen)


@pytest.mark.parametrize(("norm", "order"), [("inf", float("inf")), ("l2", 2.0)])
def test_a_centroid_has_the_mean_norm_of_its_members_and_a_singleton_is_itself(norm, order):
    units, found = centres(loras((2, 3)), [0, 1, 0, 0, 2], norm=norm, balance=False)
    sizes = torch.linalg.vector_norm(units[[0, 2, 3]], ord=order, dim=1)
    torch.testing.assert_close(torch.linalg.vector_norm(found[0], ord=order), sizes.mean())
    assert torch.equal(found[1], units[1]) and torch.equal(found[2], units[4])


def test_the_scale_is_folded_in_before_clustering():
    given = loras((4, 4), (2.0, 2.0))
    folded = [(a * 2**0.5, b * 2**0.5, 1.0) for a, b, _ in given]
    for options in ({}, PAPER):
        one, two = (merge("loralego", each, rank=4, **options) for each in (given, folded))
        torch.testing.assert_close(product(one), product(two), **EXACT)


def test_a_negative_scale_is_folded_in_too():
    given = loras((3, 3), (-2.0, 1.0))
    made = merge("loralego", given, rank=6, **PLAIN)
    torch.testing.assert_close(product(made), oracle.weighted_sum(given, [1, 1]), **EXACT)


def test_the_result_has_the_rank_that_was_asked_for():
    made = merge("loralego", loras((4, 6)), rank=5)
    assert made.a.shape == (5, 12) and made.b.shape == (5, 10)
    assert int(torch.linalg.matrix_rank(product(made))) <= 5
    assert merge("loralego", loras((4, 6))).rank == 6  # the largest, where ranks differ
    assert merge("loralego", loras((2, 3)), rank=50).rank == 5  # never more than there are units


def rescaled(lora: oracle.Lora, factor: float) -> oracle.Lora:
    a, b, s = lora
    return a * factor, b / factor, s


def test_balancing_makes_the_gauge_irrelevant_and_without_it_the_gauge_matters():
    given = loras((8, 8, 8))
    other = [rescaled(given[0], 5.0), *given[1:]]
    one, two = (product(merge("loralego", each, rank=8)) for each in (given, other))
    assert (one - two).norm() < 1e-6 * one.norm()
    one, two = (product(merge("loralego", each, rank=8, **PAPER)) for each in (given, other))
    assert (one - two).norm() > 0.1 * one.norm()


def test_aligning_signs_makes_them_irrelevant_and_without_it_they_matter():
    given = loras((8, 8, 8))
    other = [rescaled(given[0], -1.0), *given[1:]]
    one, two = (product(merge("loralego", e, rank=8, align_sign=True)) for e in (given, other))
    assert (one - two).norm() < 1e-6 * one.norm()
    one, two = (product(merge("loralego", each, rank=8)) for each in (given, other))
    assert (one - two).norm() > 0.1 * one.norm()


def test_balancing_and_aligning_leave_every_product_alone():
    given = loras((4, 3), (2.0, 0.5))
    made = merge("loralego", given, rank=7, align_sign=True, **PLAIN)
    torch.testing.assert_close(product(made), oracle.weighted_sum(given, [1, 1]), **EXACT)


def test_one_seed_gives_one_result():
    given = loras((8, 8))
    one, two = (merge("loralego", given, seed=3, rank=5) for _ in range(2))
    assert torch.equal(one.a, two.a) and torch.equal(one.b, two.b)


def test_a_heavier_adapter_pulls_the_centroids():
    given = planted(num=2, noise=0.05)
    first = oracle.delta(given[0])
    even, heavy = (product(merge("loralego", given, w, rank=6)) for w in ((1, 1), (50, 1)))
    assert (heavy - first).norm() < 0.3 * (even - first).norm()


def test_a_unit_with_a_zero_half_survives_balancing():
    a, b, s = loras((3,))[0]
    b[:, 1] = 0
    made = merge("loralego", [(a, b, s)])
    torch.testing.assert_close(product(made), oracle.delta((a, b, s)), **EXACT)


@pytest.mark.parametrize("options", [{"rank": 0}, {"n_init": 0}, {"norm": "l1"}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]):
    with pytest.raises(ValueError, match="rank|n_init|norm"):
        merge("loralego", loras((2,)), **options)
