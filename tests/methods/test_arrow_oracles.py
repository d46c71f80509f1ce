"""The oracles of Arrow's specification, and PEFT's own outputs where the algorithm is the same."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import loramux
from loramux.methods.arrow import ArrowConfig, top_direction
from methods.bridge import adapter_of, close
from methods.frozen_case import IDS, MASK, REAL, Frozen, random_experts
from oracles import arrow
from oracles.surgery import model_logits
from pico import build_pico

SITE = "model.layers.0.mlp.down_proj"


def routed(root: Path, **options: Any) -> Frozen:
    return Frozen(root, ArrowConfig, **{"top_k": 2, **options})


@pytest.mark.parametrize("rank", [1, 4, 40])
def test_a_prototype_has_unit_length_and_no_direction_is_amplified_more(rank: int):
    draw = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, 32, generator=draw)
    b = torch.randn(rank, 48, generator=draw)
    found = top_direction(a, b)
    assert found.shape == (32,)
    torch.testing.assert_close(found.norm(), torch.tensor(1.0))
    others = torch.nn.functional.normalize(torch.randn(1000, 32, generator=draw), dim=1)
    reach = (b.T @ a @ found).norm()
    assert (b.T @ a @ others.T).norm(dim=0).max() < reach
    torch.testing.assert_close(reach, torch.linalg.matrix_norm(b.T @ a, 2))


@pytest.mark.parametrize("ratio", [0.9, 0.99, 0.9999])
def test_a_prototype_is_exact_where_the_first_two_singular_values_are_close(ratio: float):
    draw = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(48, 4, generator=draw)).Q
    right = torch.linalg.qr(torch.randn(32, 4, generator=draw)).Q
    size = torch.tensor([1.0, ratio, 0.3, 0.1])
    found = top_direction((right * size).T, left.T.contiguous())
    assert (found @ right[:, 0]).abs() > 1 - 1e-4


def test_the_sign_of_a_prototype_does_not_matter(tmp_path: Path):
    made = routed(tmp_path, double=False)
    expected = made.run()
    for router in made.routers.values():
        router.prototypes[1].neg_()
    assert torch.equal(made.run(), expected)


def test_one_expert_has_weight_one(tmp_path: Path):
    made = routed(tmp_path, ranks=(4,), top_k=None)
    close(made.run().detach()[REAL], made.alone(0)[REAL])
    assert all(record.gates.eq(1).all() for record in made.records().values())


def test_all_experts_are_a_plain_softmax(tmp_path: Path):
    made = routed(tmp_path, top_k=3, router_temperature=2.0)
    made.run()
    for record in made.records().values():
        torch.testing.assert_close(record.gates, record.logits.softmax(-1))


def test_a_larger_b_leaves_the_prototype_as_it_was(tmp_path: Path):
    made = routed(tmp_path)
    rows = adapter_of(made.handle).rows[SITE]
    before = made.routers[SITE].prototypes.clone()
    rows.b.data *= 7
    made.routers[SITE].bind(rows)
    close(made.routers[SITE].prototypes, before, 1e-6)


def test_weights_sum_to_one_and_k_of_them_are_not_zero(tmp_path: Path):
    made = routed(tmp_path)
    made.run()
    assert len(made.records()) == 14
    for record in made.records().values():
        torch.testing.assert_close(record.gates.sum(-1), torch.ones(12).double())
        assert (record.gates > 0).sum(-1).eq(2).all()


def test_one_more_expert_changes_no_other_prototype(tmp_path: Path):
    three = routed(tmp_path / "three")
    four = routed(tmp_path / "four", ranks=(4, 2, 3, 5))
    for path, router in three.routers.items():
        assert torch.equal(router.prototypes, four.routers[path].prototypes[:3])


@pytest.mark.parametrize("backend", ["reference", "grouped", "auto"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gathered_is_dense(tmp_path: Path, top_k: int, backend: str):
    """The oracle computes every expert; here the pairs handed to a kernel are k per token."""
    made = routed(tmp_path, top_k=top_k, double=False)
    made.handle.dispatch.requested_backend = backend
    expected, weights = arrow.oracle_logits(made.base(), IDS, MASK, made.experts, top_k)
    with torch.no_grad():
        close(made.run()[REAL], expected.detach()[REAL], 2e-5)
    state: Any = made.handle.dispatch.last
    pairs = state.step_plans[SITE].parts[0].pairs
    assert pairs.num_pairs == 12 * top_k
    for path, record in made.records().items():
        close(record.gates[REAL.reshape(-1)], weights[path].detach()[REAL], 1e-5)


# -- PEFT ----------------------------------------------------------------------------------------


def in_peft(made: Frozen, top_k: int, temperature: float) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.create_arrow_model(
            base_model=made.base(),
            task_specific_adapter_paths=list(made.folders),
            arrow_config=peft.ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=1),
        ).eval()


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 1.0), (3, 0.5)])
def test_logits_are_pefts_where_its_prototypes_are_exact(
    tmp_path: Path, top_k: int, temperature: float
):
    """One power iteration is exact for adapters of rank 1."""
    made = routed(
        tmp_path, ranks=(1, 1, 1), top_k=top_k, router_temperature=temperature, double=False
    )
    expected = model_logits(in_peft(made, top_k, temperature), IDS, MASK).detach()
    close(made.run().detach()[REAL], expected[REAL], 2e-5)


def test_logits_are_pefts_with_our_prototypes(tmp_path: Path):
    made = routed(tmp_path, ranks=(4, 4, 4), double=False)
    theirs = in_peft(made, 2, 1.0)
    model_logits(theirs, IDS, MASK)  # its prototypes are made in the first forward
    found = {
        name.partition("model.")[2].partition("model.")[2].partition(".lora_arrow")[0]: module
        for name, module in theirs.named_modules()
        if hasattr(module, "prototypes")
    }
    ours = {path.removeprefix("model."): router for path, router in made.routers.items()}
    assert len(found) == 14
    worst = 1.0
    for path, module in found.items():
        prototypes = ours[path.removeprefix("model.")].prototypes
        worst = min(worst, float((module.prototypes * prototypes).sum(1).abs().min()))
        module.prototypes.copy_(prototypes)
    assert worst < 0.999, "fifteen iterations from a random vector are not exact"
    expected = model_logits(theirs, IDS, MASK).detach()
    close(made.run().detach()[REAL], expected[REAL], 2e-5)


def test_what_peft_refuses_works(tmp_path: Path):
    """Ranks and targets may differ."""
    experts = random_experts(build_pico("llama"), (4, 2))
    holes = {s: [e[0], e[1] if "mlp" in s else None] for s, e in experts.items()}
    made = routed(tmp_path, experts=holes, double=False)
    expected, _ = arrow.oracle_logits(made.base(), IDS, MASK, made.experts, 2)
    close(made.run().detach()[REAL], expected.detach()[REAL])
    attention = made.records()["model.layers.0.self_attn.q_proj"]
    assert attention.gates[:, 0].eq(1).all(), "an adapter without rows here is never chosen"
    assert attention.slot is not None and attention.slot.shape == (12, 1)
    assert loramux.handle_of(made.model) is made.handle
