"""RAMoLE trained on retrieved sets: what a row of a step sees; and what a router can learn where adapters are small."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loramux
from loramux.core.router import RouteView
from loramux.core.types import EVERYTHING, Site
from loramux.methods.ramole import RAMoLEConfig, RAMoLEMethod, RouterLoRA, Survivors
from loramux.ops.contract import Spans
from loramux.persist.ramole import read_router
from methods.frozen_case import IDS, MASK, Frozen
from methods.ramole_case import routed

FOUR = (4, 2, 3, 5)
RANKINGS = {"red": [["red", "green", "blue"]], "other": [["blue", "grey", "red"]]}
SETS: dict[str, Any] = {"train_set": "retrieved", "retrieved": RANKINGS, "retrieved_k": 2}
TASKS = ("red", "other")


def step(made: Frozen, tasks: tuple[str, ...] = TASKS) -> list[list[set[int]]]:
    """One forward pass in training mode: the experts with a weight, by linear and row."""
    made.model.train()
    made.model(input_ids=IDS, attention_mask=MASK, labels=IDS, tasks=tasks).loss.backward()
    found = []
    for record in made.handle.routing():
        gates = record.gates.detach().view(2, -1, len(FOUR))
        torch.testing.assert_close(gates.sum(-1)[MASK.bool()], torch.ones(int(MASK.sum())))
        found.append([set((row[:4] > 0).any(0).nonzero()[:, 0].tolist()) for row in gates])
    return found


def test_a_row_sees_the_first_of_its_tasks_ranking_and_its_own_in_every_second_step(tmp_path: Path):
    made = Frozen(tmp_path, RAMoLEConfig, ranks=FOUR, double=False, **SETS)
    torch.manual_seed(0)
    seen = []
    for _ in range(24):
        first, *others = step(made)
        assert all(other == first for other in others), "one draw for all linears"
        assert first[1] == {2, 3}, "its own adapter is not there, so nothing is left out"
        seen.append(first[0])
    assert {frozenset(s) for s in seen} == {frozenset({0, 1}), frozenset({1, 2})}
    assert 6 <= seen.count({0, 1}) <= 18


def test_a_row_is_routed_as_if_its_set_were_all_there_is(tmp_path: Path):
    made = routed(tmp_path, ranks=FOUR, double=False, **SETS)
    torch.manual_seed(0)
    (sets, *_) = step(made)
    trained = {r.path: r.gates.detach().view(2, -1, 4) for r in made.handle.routing()}
    first = next(iter(trained))
    made.model.eval()
    for row, chosen in enumerate(sets):
        names = ("red", "green", "blue", "grey")
        made.handle.mask_experts({name: i in chosen for i, name in enumerate(names)})
        made.run()
        alone = {r.path: r.gates.detach().view(2, -1, 4) for r in made.handle.routing()}
        torch.testing.assert_close(trained[first][row], alone[first][row])


def test_outside_training_every_adapter_acts(tmp_path: Path):
    made = Frozen(tmp_path, RAMoLEConfig, ranks=FOUR, double=False, **SETS)
    made.run()
    assert all((r.gates[:4] > 0).all() for r in made.handle.routing())


def test_a_saved_router_serves_any_set_whatever_it_was_trained_with(tmp_path: Path):
    plain, other = (
        routed(tmp_path / name, ranks=FOUR, double=False, **options)
        for name, options in (("all", {}), ("retrieved", SETS))
    )
    routers = [read_router(m.handle.save(tmp_path / f"m{i}")) for i, m in enumerate((plain, other))]
    assert routers[1].config.train_set == "all" and not routers[1].config.retrieved
    assert routers[0].digest == routers[1].digest


def test_a_row_of_an_unknown_task_is_refused(tmp_path: Path):
    made = Frozen(tmp_path, RAMoLEConfig, ranks=FOUR, double=False, **SETS)
    with pytest.raises(ValueError, match="a row has 'elsewhere'; give rankings for it"):
        step(made, ("red", "elsewhere"))
    method = RAMoLEMethod(RAMoLEConfig(adapters=made.folders, **SETS))
    method.check_training_task("red")
    with pytest.raises(ValueError, match="retrieved knows the tasks"):
        method.check_training_task("elsewhere")
    RAMoLEMethod(RAMoLEConfig(adapters=made.folders)).check_training_task("elsewhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_set": "retrieved"}, "go together"),
        ({"retrieved": RANKINGS}, "go together"),
        ({**SETS, "retrieved": {"red": [["red", "violet", "blue"]]}}, "must hold rankings of"),
        ({**SETS, "retrieved": {"red": [["red", "blue"]]}}, "at least 2 beside its own"),
        ({**SETS, "retrieved": {"red": [["blue", "blue", "grey"]]}}, "each expert once"),
        ({**SETS, "retrieved_k": 1}, "retrieved_k must be at least 2"),
    ],
)
def test_rankings_that_mean_nothing_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RAMoLEConfig(adapters=("x/red", "x/green", "x/blue", "x/grey"), **options)


# -- whether a router learns ------------------------------------------------------------------------


def planted(normalise_keys: bool, size: float, steps: int = 40, width: int = 64) -> float:
    """Mean weight of the one right adapter of four after a short training; size: of what adapters add."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(4, 8, width, generator=draw) / width**0.5
    b = torch.randn(4, 8, width, generator=draw) * size / 8**0.5
    names = tuple("abcd")
    torch.manual_seed(0)
    config = RAMoLEConfig(adapters=names, normalise_keys=normalise_keys)
    site = Site("s", "s", 0, "l", "b", "other", "plain", width, width, width)
    router = RouterLoRA(config, site, Survivors(4, 0.0))
    rows = loramux.Rows(
        Spans.packed([8] * 4, [1.0] * 4), a.reshape(32, width), b.reshape(32, width)
    )
    router.bind(rows)
    centre_TI = torch.randn(4, width, generator=draw)  # what inputs of a task have in common

    def inputs(number: int) -> tuple[Tensor, Tensor]:
        task = torch.randint(4, (number,), generator=draw)
        return 0.3 * (centre_TI[task] + 0.5 * torch.randn(number, width, generator=draw)), task

    def weights(x: Tensor) -> Tensor:
        everybody = torch.ones(len(x), dtype=torch.bool)
        view = RouteView(x, everybody.long(), everybody, everybody, 1, True, lambda **_: None)
        found = router(view, EVERYTHING).weight
        assert found is not None
        return found

    optimizer = torch.optim.AdamW(router.parameters(), lr=3e-3)
    for _ in range(steps):
        x, task = inputs(128)
        values = torch.einsum("ni,eri,ero->neo", x, a, b)
        right = values[torch.arange(128), task]
        away = ((weights(x).unsqueeze(-1) * values).sum(1) - right).square().mean()
        optimizer.zero_grad()
        (away / right.square().mean()).backward()
        optimizer.step()
    x, task = inputs(1000)
    return float(weights(x).detach()[torch.arange(1000), task].mean())


def test_of_four_small_adapters_the_right_one_is_found_where_keys_are_normalised():
    """Where adapters add little, scores of the paper's form hardly leave 0 in a short training; their size is why."""
    assert planted(normalise_keys=True, size=0.05) > 0.7
    assert planted(normalise_keys=False, size=0.05) < 0.35
    assert planted(normalise_keys=False, size=5.0) > 0.5
