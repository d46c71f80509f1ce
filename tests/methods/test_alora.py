"""ALoRA's rounds: when they come, whom they spare, what they write down, and that a killed run repeats them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from loramux.core.ablation import Unit
from loramux.core.controller import Moment
from loramux.core.edits import Editor
from loramux.methods.alora import Allocation, ALoRAConfig
from loramux.report.page import Section
from loramux.report.ranks import rank_history, rank_section
from loramux.report.records import JobRecord, read_adapter_record
from loramux.train import CheckpointError, Listener, StepEvent, Trainer
from loramux.train.runner import JobRunner
from methods.alora_case import RANK, SHORT, adapter_under, edits_of, planted, ranks, trainer
from pico import build_pico
from train.test_resume import contents


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": -1}, "rounds must be at least 0"),
        ({"ranks_per_round": 1.5}, r"ranks_per_round must be a number in \[0, 1\)"),
        ({"ranks_per_round": 0}, "ranks_per_round must be at least 1"),
        ({"ranks_per_round": True}, "ranks_per_round must be an integer"),
        ({"first_round": 0}, "first_round must be a finite number above 0"),
        ({"round_unit": "batches"}, "round_unit must be one of"),
        ({"score": "guess"}, "score must be one of"),
        ({"use_dora": True}, "leave use_dora off"),
    ],
)
def test_values_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ALoRAConfig(**settings)


def test_a_round_that_would_take_every_rank_is_refused_before_anything_is_attached() -> None:
    model = build_pico("llama")
    with pytest.raises(ValueError, match="would remove all 28 ranks"):
        loramux.attach(model, ALoRAConfig(r=2, ranks_per_round=28))
    assert not hasattr(model, "loramux")


def test_the_default_scale_is_one_and_stays_one() -> None:
    run = trainer(ALoRAConfig(**SHORT))
    run.run()
    assert {rows.spans.scale for rows in adapter_under(run).rows.values()} == {(1.0,)}
    assert len(set(ranks(adapter_under(run)).values())) > 1


@pytest.mark.parametrize(("given", "moved"), [(None, 7), (3, 3), (0.1, 4), (0.001, 1)])
def test_ranks_per_round_is_a_count_a_share_or_the_linears_of_a_layer(
    given: int | float | None, moved: int
) -> None:
    assert ALoRAConfig(ranks_per_round=given).num_moved(42, 7) == moved


def test_rounds_in_epochs_follow_the_data(caplog: pytest.LogCaptureFixture) -> None:
    settings = {**SHORT, "first_round": 1.0, "round_every": 0.25, "round_unit": "epochs"}
    run = trainer(ALoRAConfig(**settings), steps=9)  # 24 examples in batches of 4: 6 steps
    run.run()
    steps = [edit["step"] for edit in edits_of(run) if edit["what"] == "round"]
    assert steps == [6, 8]  # 7.5 rounds to the even step


def test_rounds_that_do_not_fit_are_said(caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(ALoRAConfig(**{**SHORT, "rounds": 9}))
    run.run()
    assert "3 of ALoRA's 9 rounds fit into 8 steps" in caplog.text
    assert [e["step"] for e in edits_of(run) if e["what"] == "round"] == [3, 5, 7]


def test_a_default_that_hardly_moves_anything_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run = trainer(
            ALoRAConfig(r=64, rounds=1, first_round=7, round_unit="steps", score="taylor")
        )
        run.run()
    assert "ALoRA moves 7 of 896 ranks per round, 0.8 % in all" in caplog.text


def rounds_of(grace: int, number: int, born: int, min_rank: int = 0) -> list[int]:
    """Which of five ranks go when three may, the last two of them fresh and of the lowest importance."""
    controller = Allocation(ALoRAConfig(grace_rounds=grace, min_rank=min_rank))
    controller.moved, controller.round = 3, number
    controller.ids = {"a": [0, 1, 2, 3, 4], "b": [0]}
    controller.born = {"a": [-1, -1, -1, born, born], "b": [-1]}
    units = [*(Unit("a", (row,)) for row in range(5)), Unit("b", (0,))]
    return controller._lowest(units, [0.5, 0.3, 0.4, 0.1, 0.2, 9.0])


def test_fresh_ranks_are_spared_for_as_many_rounds_as_asked() -> None:
    assert rounds_of(grace=1, number=1, born=0) == [1, 2, 0]
    assert rounds_of(grace=1, number=2, born=0) == [3, 4, 1]
    assert rounds_of(grace=2, number=2, born=0) == [1, 2, 0]
    assert rounds_of(grace=0, number=1, born=0) == [3, 4, 1]


def test_min_rank_is_kept_by_every_linear() -> None:
    assert rounds_of(grace=0, number=5, born=0, min_rank=4) == [3]


def test_the_last_rank_of_the_model_stays() -> None:
    controller = Allocation(ALoRAConfig())
    controller.moved = 5
    controller.ids, controller.born = {"a": [0, 1]}, {"a": [-1, -1]}
    assert controller._lowest([Unit("a", (0,)), Unit("a", (1,))], [2.0, 1.0]) == [1]


def test_the_ledger_names_every_rank_once(tmp_path: Path) -> None:
    run = trainer(ALoRAConfig(**{**SHORT, "rounds": 3, "grace_rounds": 0}), out=tmp_path)
    run.run()
    edits = json.loads((tmp_path / "edits.json").read_text())
    assert edits == json.loads(json.dumps(edits_of(run)))
    for what in ("prune", "add"):
        named = [(e["site"], e["rank"]) for e in edits if e["what"] == what]
        assert len(named) == len(set(named)) == 15
    added = {(e["site"], e["rank"]): e["round"] for e in edits if e["what"] == "add"}
    assert all(rank >= RANK for _, rank in added)
    for edit in edits:
        if edit["what"] == "prune" and edit["rank"] >= RANK:
            assert edit["round"] > added[edit["site"], edit["rank"]]
            assert edit["importance"] == pytest.approx(edit["removal"] + edit["alone"])


def test_without_resampling_every_round_scores_the_same_examples() -> None:
    tokens = []
    for resample in (False, True):
        config = ALoRAConfig(**{**SHORT, "rounds": 3, "resample": resample, "score_rows": 3})
        run = trainer(config)
        drawn: list[Any] = []
        samples = run.runners[0]._samples

        def watched(num: int, draw: Any, samples: Any = samples, drawn: Any = drawn) -> Any:
            found = samples(num, draw)
            drawn.append(torch.cat([batch["input_ids"].reshape(-1) for batch in found]).tolist())
            return found

        run.runners[0].control.samples = watched
        run.run()
        tokens.append(len({tuple(ids) for ids in drawn}))
    assert tokens == [1, 3]


class StopAt(Listener):
    def __init__(self, step: int):
        self.step = step

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        if event.step == self.step:
            trainer.stop()


@pytest.mark.parametrize("step", [2, 3, 4, 6])
@pytest.mark.parametrize("score", ["ablation", "taylor"])
def test_a_stopped_run_ends_with_the_bits_of_an_unbroken_one(
    step: int, score: str, tmp_path: Path
) -> None:
    config = ALoRAConfig(**SHORT, score=score, lora_dropout=0.1)
    trainer(config, out=tmp_path / "whole", resume=True, eval_every=2).run()
    trainer(config, StopAt(step), out=tmp_path / "run", resume=True, eval_every=2).run()
    (result,) = trainer(config, out=tmp_path / "run", resume=True, eval_every=2).run()
    assert result.status == "finished"
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    ledgers = [(tmp_path / run / "edits.json").read_bytes() for run in ("run", "whole")]
    assert ledgers[0] == ledgers[1]


def test_a_resumed_run_knows_the_ranks_of_its_best_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The best validation lies before the first round, the stop behind it."""
    monkeypatch.setattr(JobRunner, "_validation_means", lambda runner: [float(runner.state.step)])
    settings: dict[str, Any] = {"resume": True, "eval_every": 2}
    whole = trainer(ALoRAConfig(**SHORT), out=tmp_path / "whole", **settings)
    (want,) = whole.run()
    trainer(ALoRAConfig(**SHORT), StopAt(4), out=tmp_path / "run", **settings).run()
    resumed = trainer(ALoRAConfig(**SHORT), out=tmp_path / "run", **settings)
    (got,) = resumed.run()
    assert want.best_step == got.best_step == 2
    assert set(ranks(adapter_under(resumed)).values()) == {RANK}
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_edits_that_the_best_weights_undo_are_marked_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []

    class Watch(Listener):
        def edited(self, trainer: Trainer, job: str, rows: Any) -> None:
            seen.extend(rows)

    monkeypatch.setattr(
        JobRunner, "_validation_means", lambda runner: [abs(runner.state.step - 4.0)]
    )
    run = trainer(ALoRAConfig(**SHORT), Watch(), out=tmp_path, eval_every=2)
    run.run()
    edits = json.loads((tmp_path / "edits.json").read_text())
    last = edits[-1]
    assert seen[-1] == last == edits_of(run)[-1]
    assert (last["what"], last["step"], last["best_step"]) == ("restore", 8, 4)
    assert last["ranks"] == ranks(adapter_under(run))
    rounds = [edit["ranks"] for edit in edits if edit["what"] == "round"]
    assert len(rounds) == 2 and last["ranks"] == rounds[0] != rounds[1]
    assert "keeps the weights of step 4, its best validation" in caplog.text
    history = rank_history(edits)
    assert set(history[0].values()) == {RANK} and history[8] == last["ranks"]
    saved = read_adapter_record(tmp_path / "adapter")
    section = rank_section(JobRecord("run", edits=edits, adapter=saved))
    assert isinstance(section, Section)
    assert "weights of step 4, the best validation, were kept" in section.text


def test_edits_before_the_best_weights_need_no_word(tmp_path: Path, caplog: Any) -> None:
    run = trainer(ALoRAConfig(**SHORT), eval_every=2)
    run.runners[0]._validation_means = lambda: [-float(run.runners[0].state.step)]  # type: ignore[method-assign]
    run.run()
    assert {edit["what"] for edit in edits_of(run)} == {"round", "prune", "add"}
    assert "best validation" not in caplog.text


def test_a_state_of_other_rounds_is_refused(tmp_path: Path) -> None:
    trainer(ALoRAConfig(**SHORT), StopAt(4), out=tmp_path).run()
    other = ALoRAConfig(**{**SHORT, "rounds": 3})
    with pytest.raises(CheckpointError, match="rounds: 2 there, 3 here"):
        trainer(other, out=tmp_path, resume=True)


def test_a_task_in_one_linear_draws_ranks_there() -> None:
    """The labels follow from one linear's update; ALoRA moves its budget to the layer that can learn it."""
    path = "model.layers.1.mlp.down_proj"
    handle, batch = planted({(path, row): 3.0 for row in range(RANK)})
    controller = Allocation(ALoRAConfig(r=RANK, ranks_per_round=10, rounds=1, grace_rounds=0))
    adapter = handle.adapters["default"]
    parameters = handle.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters.values())
    draw = torch.Generator().manual_seed(0)
    moment = Moment(
        step=8, num_steps=20, steps_per_epoch=8.0, peak_lr=1e-3, adapter=adapter, handle=handle,
        optimizer=optimizer, parameters=parameters, generator=draw,
        edit=Editor(adapter, optimizer, parameters, draw), samples=lambda num, generator: [batch],
    )  # fmt: skip
    controller.before_training(moment)
    edits = controller.after_step(moment)
    assert ranks(adapter)[path] == max(ranks(adapter).values()) > RANK
    assert not [e for e in edits if e["what"] == "prune" and e["site"] == path]
