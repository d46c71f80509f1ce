"""LoraHub: the search keeps its best, stays within bounds, starts at the base and leaves it untouched."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compose.samples import added_logits, loras, merge, our_logits, product, save_lora
from loramux import compose_adapters
from loramux.compose.mergers.lorahub import LoraHubOptions
from loramux.compose.search import Candidate, find_weights, search
from loramux.compose.sources import read_sources
from loramux.errors import LoramuxError
from loramux.eval.loading import Loaded
from loramux.formats.digest import model_digest
from loramux.recipe import DataSource
from oracles import merging as oracle
from pico import build_pico

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def quiet(_: str) -> None:
    return None


def bowl(target: list[float]) -> Any:
    return lambda w: sum((a - b) ** 2 for a, b in zip(w, target, strict=True))


# --- What a weight vector means -------------------------------------------------------------------


def test_factors_are_summed_apart_cross_terms_and_all():
    given = loras((3, 3, 3))
    made = merge("lorahub", given, (0.4, -1.0, 0.9))
    torch.testing.assert_close(product(made), oracle.lorahub(given, (0.4, -1.0, 0.9)), **EXACT)
    assert made.rank == 3 and made.error is None


def test_delta_is_the_weighted_sum_of_products_at_any_ranks():
    given = loras((2, 3, 4), (2.0, 0.5, 1.5))
    made = merge("lorahub", given, (0.4, -1.0, 0.9), combine="delta")
    wanted = oracle.weighted_sum(given, (0.4, -1.0, 0.9))
    torch.testing.assert_close(product(made), wanted, **EXACT)


def test_opposite_weights_are_one_model_in_factors_and_opposites_in_delta():
    given, w, minus = loras((3, 3)), (0.4, -1.1), (-0.4, 1.1)
    one, two = (product(merge("lorahub", given, each)) for each in (w, minus))
    torch.testing.assert_close(one, two, **EXACT)
    one, two = (product(merge("lorahub", given, each, combine="delta")) for each in (w, minus))
    torch.testing.assert_close(one, -two, **EXACT)


def test_half_of_one_adapter_is_a_quarter_in_factors_and_two_halves_are_it():
    (lora,) = loras((3,))
    quarter = merge("lorahub", [lora, lora], (0.5, 0.0))
    torch.testing.assert_close(product(quarter), 0.25 * oracle.delta(lora), **EXACT)
    whole = merge("lorahub", [lora, lora], (0.5, 0.5))
    torch.testing.assert_close(product(whole), oracle.delta(lora), **EXACT)


@pytest.mark.parametrize("combine", ["factors", "delta"])
def test_a_single_weight_of_one_reproduces_its_adapter(combine: str):
    given = loras((3, 3, 3))
    made = merge("lorahub", given, (0, 1, 0), combine=combine)
    torch.testing.assert_close(product(made), oracle.delta(given[1]), **EXACT)


# --- The search -----------------------------------------------------------------------------------


def test_a_budget_of_zero_gives_the_base():
    found = search(bowl([1.0, 1.0]), 2, LoraHubOptions(budget=0), 0, quiet)
    assert found["weights"] == [0.0, 0.0] and found["evaluations"] == []


def test_the_first_evaluation_is_the_base():
    found = search(bowl([1.0, -1.0]), 2, LoraHubOptions(budget=1, penalty=0), 0, quiet)
    assert found["weights"] == [0.0, 0.0] and found["evaluations"] == [2.0]


def test_the_best_is_the_least_of_what_was_seen_and_more_budget_is_never_worse():
    bests = []
    for budget in (1, 5, 20, 80):
        options = LoraHubOptions(budget=budget, optimizer="es")
        found = search(bowl([0.9, -0.6, 0.3]), 3, options, 7, quiet)
        assert len(found["evaluations"]) == budget
        assert found["objective"] == min(found["evaluations"])
        bests.append(found["objective"])
    assert bests == sorted(bests, reverse=True)
    assert bests[-1] < 0.3 * bests[0]


def test_weights_stay_within_their_bounds():
    seen = []

    def far(weights: list[float]) -> float:
        seen.extend(weights)
        return bowl([9.0, -9.0])(weights)

    found = search(far, 2, LoraHubOptions(budget=60, bound=0.8, optimizer="es"), 0, quiet)
    assert max(map(abs, seen)) <= 0.8
    assert found["weights"] == pytest.approx([0.8, -0.8])


def test_the_penalty_is_the_mean_size_of_the_weights():
    given: list[list[float]] = []

    def flat(weights: list[float]) -> float:
        given.append(list(weights))
        return 3.0

    found = search(flat, 4, LoraHubOptions(budget=9, penalty=0.05, optimizer="es"), 0, quiet)
    wanted = [3.0 + 0.05 * sum(map(abs, w)) / 4 for w in given]
    assert found["evaluations"] == pytest.approx(wanted)


def test_one_seed_gives_one_search():
    options = LoraHubOptions(budget=15, optimizer="es")
    one, two, other = (search(bowl([1.0, 0.2]), 2, options, s, quiet) for s in (3, 3, 4))
    assert one == two and one["evaluations"] != other["evaluations"]


def test_asking_for_nevergrad_without_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    assert search(bowl([1.0]), 1, LoraHubOptions(budget=2), 0, quiet)["optimizer"] == "es"
    with pytest.raises(LoramuxError, match="pip install nevergrad"):
        search(bowl([1.0]), 1, LoraHubOptions(optimizer="nevergrad"), 0, quiet)


# --- On a model -----------------------------------------------------------------------------------


@pytest.fixture
def setting(tmp_path: Path, tokenizer) -> tuple[list[Path], Loaded, str]:
    model = build_pico("llama")
    folders = [save_lora(model, tmp_path / f"{i}", seed=i) for i in range(3)]
    rows = [
        {"task": "t", "id": str(i), "prompt": p, "choices": None, "answer": a}
        for i, (p, a) in enumerate([("one", "two"), ("three words here", "4"), ("x", "yes")])
    ]
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folders, Loaded(model, tokenizer, None), str(data)


def mean_loss(logits: Tensor, batch: dict[str, Tensor]) -> tuple[float, int]:
    """Summed cross-entropy over the supervised tokens, and how many they are, token by token."""
    total, count = 0.0, 0
    for row, labels in zip(logits, batch["labels"], strict=True):
        for t in range(1, len(labels)):
            if labels[t] != -100:
                total -= float(row[t - 1].log_softmax(-1)[labels[t]])
                count += 1
    return total, count


@pytest.mark.parametrize("combine", ["factors", "delta"])
@pytest.mark.parametrize("loss_norm", ["mean", "lorahub"])
def test_the_objective_is_the_few_shot_loss_of_the_merged_model(combine, loss_norm, setting):
    folders, loaded, data = setting
    sources = read_sources(folders)
    options = LoraHubOptions(combine=combine, loss_norm=loss_norm)
    weights = [0.5, -0.7, 1.2]
    with Candidate(sources, loaded, [data], 3, options) as candidate:
        found = candidate.objective(weights)
        (batch,) = candidate.batches
    with torch.no_grad():
        restated = 0.0
        merged = {}
        for path in sources[0].tensors.sites:
            given = [
                (s.tensors.sites[path].a.double(), s.tensors.sites[path].b.double().T, 2.0)
                for s in sources
            ]
            both = {"factors": oracle.lorahub, "delta": oracle.weighted_sum}
            merged[path] = both[combine](given, weights)
        model = loaded.model
        kept = {p: model.get_submodule(p).weight.detach().clone() for p in merged}
        for path, change in merged.items():
            model.get_submodule(path).weight.data.add_(change.float())
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for path, weight in kept.items():
            model.get_submodule(path).weight.data.copy_(weight)
        total, count = mean_loss(logits, batch)
        # The published code: the mean of the one batch, over the number of examples.
        restated = total / count if loss_norm == "mean" else total / count / 3
    assert found == pytest.approx(restated, rel=1e-4)


def test_the_search_finds_the_adapter_that_was_made_for_the_rows(setting, tmp_path: Path):
    """Weights near those under which the rows' own model is best lower the loss below the base's."""
    folders, loaded, data = setting
    made = compose_adapters(
        "lorahub", folders, tmp_path / "out", base=loaded, data=[data], rows=3, seed=1, budget=25
    )
    values = made["search"]["evaluations"]
    assert len(values) == 25 and made["search"]["objective"] == min(values) < values[0]
    assert made["search"]["rows"] == 3
    assert made["weights"] == made["search"]["weights"]
    assert max(map(abs, made["weights"])) <= 1.5
    given = read_sources(folders)
    merged = {
        path: oracle.lorahub(
            [
                (s.tensors.sites[path].a.double(), s.tensors.sites[path].b.double().T, 2.0)
                for s in given
            ],
            made["weights"],
        )
        for path in given[0].tensors.sites
    }
    wanted = added_logits(loaded.model, merged)
    torch.testing.assert_close(
        our_logits(loaded.model, tmp_path / "out"), wanted, rtol=1e-4, atol=1e-4
    )


def test_the_base_is_untouched_by_a_search(setting):
    folders, loaded, data = setting
    before = model_digest(loaded.model)
    find_weights(read_sources(folders), loaded, [data], 3, LoraHubOptions(budget=8), 0, quiet)
    assert model_digest(loaded.model) == before
    assert not hasattr(loaded.model, "loramux")


def test_a_search_that_finds_nothing_says_so(setting):
    folders, loaded, data = setting
    options = LoraHubOptions(budget=1)
    with pytest.raises(LoramuxError, match="nothing better than the bare base"):
        find_weights(read_sources(folders), loaded, [data], 3, options, 0, quiet)


def test_a_source_says_which_rows_the_search_reads(setting, tmp_path: Path):
    folders, loaded, data = setting
    kept = tmp_path / "kept.jsonl"
    kept.write_text("".join(Path(data).read_text().splitlines(keepends=True)[1:3]))
    source = DataSource(path=str(data), skip=1, rows=2)
    options = LoraHubOptions(budget=4)
    sources = read_sources(folders)
    apart = find_weights(sources, loaded, [source], 5, options, 0, quiet)
    assert apart[1]["search"]["rows"] == 2
    assert apart == find_weights(sources, loaded, [str(kept)], 5, options, 0, quiet)


def test_factors_need_one_shape_and_one_scale(setting, tmp_path: Path):
    folders, loaded, data = setting
    other = save_lora(loaded.model, tmp_path / "other", alpha=16, seed=9)
    sources = read_sources([folders[0], other])
    with pytest.raises(LoramuxError, match="use combine='delta'"):
        find_weights(sources, loaded, [data], 3, LoraHubOptions(budget=2), 0, quiet)
    options = LoraHubOptions(budget=6, combine="delta")
    found, _ = find_weights(sources, loaded, [data], 3, options, 0, quiet)
    assert len(found) == 2


def test_weights_of_ones_own_are_refused(setting, tmp_path: Path):
    folders, loaded, data = setting
    with pytest.raises(LoramuxError, match="finds the weights itself"):
        compose_adapters(
            "lorahub", folders, tmp_path / "o", base=loaded, data=[data], weights=(1, 1, 1)
        )


@pytest.mark.parametrize("options", [{"budget": -1}, {"bound": 0}, {"combine": "sum"}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]):
    with pytest.raises(ValueError, match="budget|bound|combine"):
        LoraHubOptions(**options)
