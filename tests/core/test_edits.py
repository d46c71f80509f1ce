"""The editor: rows, row gates and optimizer moments move by one gather, and the optimizer's own tensors show it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import loramux
from loramux.core.adapter import Adapter
from loramux.core.edits import Editor, ranks_of
from loramux.methods.beamlora import RankScores
from pico import build_pico

SITE = "model.layers.1.mlp.down_proj"
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def trained(make: Make = OPTIMIZERS["adamw"], **config: Any) -> tuple[Adapter, Editor]:
    """An adapter after three steps on noise: every row has weights and moments of its own."""
    torch.manual_seed(0)
    handle = loramux.attach(build_pico("llama"), loramux.BeamLoRAConfig(r=4, **config))
    parameters = handle.trainable_parameters()
    optimizer = make(list(parameters.values()))
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    optimizer.zero_grad()
    editor = Editor(
        handle.adapters["default"], optimizer, parameters, torch.Generator().manual_seed(7)
    )
    return handle.adapters["default"], editor


def moments(editor: Editor, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    state = editor.optimizer.state[parameter]
    return {k: v.clone() for k, v in state.items() if torch.is_tensor(v) and v.dim() > 0}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("letter", ["a", "b"])
def test_moments_follow_their_rows_in_the_optimizers_own_tensors(name: str, letter: str) -> None:
    adapter, editor = trained(OPTIMIZERS[name])
    rows = adapter.rows[SITE]
    old = getattr(rows, letter)
    before, want = old.detach().clone(), moments(editor, old)
    assert want
    editor.gather(SITE, 0, [2, 1, 2, 0])
    assert getattr(rows, letter) is old
    assert torch.equal(old, before[[2, 1, 2, 0]])
    for key, value in moments(editor, old).items():
        assert torch.equal(value, want[key][[2, 1, 2, 0]]), key
        assert not torch.equal(value, want[key])


def test_an_edit_that_keeps_the_number_of_rows_keeps_every_parameter_object() -> None:
    adapter, editor = trained()
    known = {name: id(p) for name, p in editor.parameters.items()}
    groups = [[id(p) for p in group["params"]] for group in editor.optimizer.param_groups]
    editor.gather(SITE, 0, [3, -1, 1, 0])
    assert {name: id(p) for name, p in adapter.trainable().items()} == known
    assert [[id(p) for p in group["params"]] for group in editor.optimizer.param_groups] == groups


@pytest.mark.parametrize("index", [[3, 1], [0, 1, 2, 3, -1, 2], [-1, -1]])
def test_another_number_of_rows_makes_new_parameters_that_the_optimizer_goes_on_with(
    index: list[int],
) -> None:
    adapter, editor = trained()
    rows = adapter.rows[SITE]
    a, b, kept = rows.a, rows.b.detach().clone(), moments(editor, rows.b)
    steps = int(editor.optimizer.state[rows.b]["step"])
    editor.gather(SITE, 0, index)
    assert rows.a is not a and a not in editor.optimizer.state
    assert rows.spans.rank == (len(index),) and rows.a.shape[0] == len(index)
    for i, source in enumerate(index):
        own = moments(editor, rows.b)
        if source < 0:
            assert not rows.b[i].any() and rows.a[i].abs().min() > 0
            assert not any(value[i].any() for value in own.values())
        else:
            assert torch.equal(rows.b[i], b[source])
            assert all(torch.equal(own[key][i], kept[key][source]) for key in kept)
    assert int(editor.optimizer.state[rows.b]["step"]) == steps
    in_groups = {id(p) for group in editor.optimizer.param_groups for p in group["params"]}
    assert in_groups == {id(p) for p in editor.parameters.values()}
    assert editor.parameters == adapter.trainable()
    for parameter in editor.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    editor.optimizer.step()
    assert torch.isfinite(rows.b).all()


def test_rows_that_stay_are_left_as_they_are_and_rows_that_move_come_from_the_snapshot() -> None:
    adapter, editor = trained()
    rows = adapter.rows[SITE]
    snapshot = editor.snapshot()
    then_b, then = rows.b.detach().clone(), moments(editor, rows.b)
    for parameter in editor.parameters.values():
        parameter.grad = torch.randn_like(parameter)
    editor.optimizer.step()
    now_b, now = rows.b.detach().clone(), moments(editor, rows.b)
    editor.gather(SITE, 0, [0, 1, 0, 3], snapshot)
    assert torch.equal(rows.b[2], then_b[0]) and not torch.equal(rows.b[2], now_b[0])
    assert torch.equal(rows.b[[0, 1, 3]], now_b[[0, 1, 3]])
    for key, value in moments(editor, rows.b).items():
        assert torch.equal(value[2], then[key][0]) and not torch.equal(value[2], now[key][0])
        assert torch.equal(value[[0, 1, 3]], now[key][[0, 1, 3]])


def test_a_snapshot_of_other_ranks_is_refused() -> None:
    _, editor = trained()
    snapshot = editor.snapshot()
    editor.gather(SITE, 0, [0, 1, 2])
    with pytest.raises(ValueError, match="holds 4 rows .* has 3 now"):
        editor.gather(SITE, 0, [0, 1, 0], snapshot)


@pytest.mark.parametrize("how", ["keep", "zero"])
def test_moments_may_stay_or_be_forgotten(how: Any) -> None:
    adapter, editor = trained()
    rows = adapter.rows[SITE]
    before = moments(editor, rows.a)
    editor.gather(SITE, 0, [0, 0, 2, 3], moments=how)
    for key, value in moments(editor, rows.a).items():
        want = before[key].clone()
        if how == "zero":
            want[1] = 0
        assert torch.equal(value, want)
    with pytest.raises(ValueError, match="keeps the number of rows"):
        editor.gather(SITE, 0, [0, 1], moments=how)


def test_a_factored_optimizer_forgets_what_it_cannot_gather() -> None:
    adapter, editor = trained(lambda p: torch.optim.Adafactor(p, lr=1e-2))
    rows = adapter.rows[SITE]
    assert any(value.any() for value in moments(editor, rows.a).values())
    editor.gather(SITE, 0, [1, 0, 2, 3])
    assert not any(value.any() for value in moments(editor, rows.a).values())
    editor.gather(SITE, 0, [1, 0])
    for parameter in editor.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    editor.optimizer.step()


def test_row_gates_follow_their_rows_with_moments() -> None:
    adapter, editor = trained()
    rows = adapter.rows[SITE]
    gate = rows.gate
    assert isinstance(gate, RankScores)
    scores, kept = gate().detach().clone(), moments(editor, gate.logits)["exp_avg"]
    editor.gather(SITE, 0, [3, 0, -1])
    torch.testing.assert_close(gate()[:2], scores[[3, 0]])
    torch.testing.assert_close(gate()[2], scores[[3, 0]].mean())
    own = moments(editor, gate.logits)["exp_avg"]
    assert torch.equal(own[:2], kept[[3, 0]]) and own[2] == 0


def test_fresh_rows_are_drawn_from_the_editors_generator_only() -> None:
    drawn: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        adapter, editor = trained()
        editor.generator.manual_seed(seed)
        torch.manual_seed(len(drawn))
        before = torch.get_rng_state()
        editor.gather(SITE, 0, [-1, 0])
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(adapter.rows[SITE].a[0].detach().clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_resizing_restores_shapes_and_draws_nothing() -> None:
    adapter, editor = trained()
    before, state = ranks_of(adapter), editor.generator.get_state()
    editor.gather(SITE, 0, [1])
    editor.gather("model.layers.0.mlp.up_proj", 0, [])
    other = ranks_of(adapter)
    editor.resize(before)
    assert ranks_of(adapter) == before
    editor.resize(other)
    assert ranks_of(adapter) == other
    assert torch.equal(editor.generator.get_state(), state)


def test_wrong_places_and_rows_are_refused() -> None:
    _, editor = trained()
    with pytest.raises(ValueError, match="no rows at 'nowhere'"):
        editor.gather("nowhere", 0, [0])
    with pytest.raises(ValueError, match=r"rows 0\.\.3 .* got \[4\]"):
        editor.gather(SITE, 0, [0, 4])
