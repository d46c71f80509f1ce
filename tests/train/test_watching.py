"""Those who watch a run: TensorBoard files, plain lines, live bars, router numbers."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import loramux
from loramux.core.types import RouteRecord
from loramux.train import Job, Listener, StepEvent, Trainer, TrainingConfig
from loramux.train.board import TensorBoard
from loramux.train.edits import edit_metrics
from loramux.train.logs import ROUTING, RoutingLog, log_period
from loramux.train.metrics import router_metrics, router_stats
from loramux.train.progress import LiveProgress, PlainProgress, make_progress
from pico import PAD, build_pico
from train.toys import examples


def train(*listeners: Listener, steps: int = 12, config: Any = None) -> loramux.Handle:
    base = build_pico("llama")
    torch.manual_seed(0)
    config = config or loramux.MixLoRAConfig(r=4, num_experts=4)
    handle = loramux.attach(base, config, name="mix")
    job = Job(
        "mix",
        train=examples(20),
        validation=examples(4, seed=1),
        training=TrainingConfig(steps=steps, learning_rate=1e-2, micro_batch_size=4, eval_every=6),
        pad_token_id=PAD,
    )
    Trainer(base, handle, [job], listeners=listeners).run()
    return handle


def test_tensorboard_holds_losses_speed_and_what_the_router_did(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(TensorBoard(tmp_path))
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {
        "train/loss",
        "train/aux",
        "train/learning_rate",
        "train/tokens_per_second",
        "validation/loss",
        "router/mix/entropy",
    } <= tags
    assert {f"router/mix/{layer}/{e}" for layer in ("00", "01") for e in range(4)} <= tags
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 13))
    assert [event.step for event in board.Scalars("validation/loss")] == [6, 12]
    assert [event.step for event in board.Scalars("router/mix/01/3")] == [1, 10, 12]


def test_plain_lines_tell_step_loss_rate_speed_and_time_left() -> None:
    stream = io.StringIO()
    train(PlainProgress(stream), steps=40)
    lines = stream.getvalue().splitlines()
    steps = [line for line in lines if "/40" in line]
    assert 10 <= len(steps) <= 12
    for word in ("step 1/40", "loss", "aux", "lr", "tok/s", "left"):
        assert word in steps[0]
    assert "step 40/40" in steps[-1]
    assert sum("validation loss" in line for line in lines) == 7
    assert lines[-1] == "mix: finished"


def test_the_live_display_ends_at_all_steps_with_the_validation_loss() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    train(LiveProgress(console))
    text = stream.getvalue()
    assert "12/12" in text
    assert "val " in text


def test_a_pipe_gets_plain_lines() -> None:
    assert isinstance(make_progress(), PlainProgress)  # under pytest standard error is no terminal


def record(gates: list[list[float]], probs: list[list[float]] | None = None) -> RouteRecord:
    return RouteRecord(
        adapter="a",
        path="model.layers.3",
        layer=3,
        when="token",
        columns=("0", "1"),
        weight=torch.tensor(gates),
        probs=None if probs is None else torch.tensor(probs),
        valid=torch.tensor([True, True, False]),
    )


def test_shares_count_selections_of_real_tokens_and_entropy_reads_the_probabilities() -> None:
    made = record([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
    found = router_metrics([made])
    assert found["router/a/03/0"] == 1.0
    assert found["router/a/03/1"] == 0.0
    assert found["router/a/entropy"] == pytest.approx(0.5)
    assert found["router/a/dead"] == 1
    assert found["router/a/max_violation"] == pytest.approx(1.0)
    assert found["router/a/entropy/03"] == found["router/a/entropy"]
    assert set(router_metrics([made], shares=False)) == {
        *("router/a/entropy", "router/a/dead", "router/a/max_violation")
    }


def test_a_router_that_selects_everything_is_measured_by_weight() -> None:
    found = router_metrics([record([[0.9, 0.1], [0.7, 0.3], [0.1, 0.9]])])
    assert found["router/a/03/0"] == pytest.approx(0.8)
    entropies = [-sum(p * math.log2(p) for p in row) for row in ((0.9, 0.1), (0.7, 0.3))]
    assert found["router/a/entropy"] == pytest.approx(sum(entropies) / 2)


def test_no_records_give_no_numbers() -> None:
    assert router_metrics([]) == {}


def site_record(place: str, gates: list[list[float]]) -> RouteRecord:
    return RouteRecord(
        adapter="a",
        path=f"model.layers.3.{place}",
        layer=3,
        when="token",
        columns=("0", "1", "2"),
        weight=torch.tensor(gates),
    )


def test_routers_of_one_layer_keep_their_shares_apart() -> None:
    one = site_record("self_attn.q_proj", [[1.0, 0.5, 0.0], [1.0, 0.0, 0.5]])
    two = site_record("mlp.up_proj", [[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    found = router_metrics([one, two])
    assert found["router/a/03/self_attn.q_proj/0"] == 0.5
    assert found["router/a/03/mlp.up_proj/0"] == 0.0
    assert found["router/a/dead"] == 1
    assert found["router/a/max_violation"] == pytest.approx(0.5)
    # q: pairs (0, 1) and (0, 2) half the time each, (1, 2) never; up: (1, 2) always.
    assert found["router/a/coactivation"] == pytest.approx((1.5 + 3.0) / 2)


def test_weights_below_zero_count_by_their_size() -> None:
    found = router_metrics([record([[0.5, -0.5], [0.5, -0.5], [1.0, 1.0]])])
    assert found["router/a/03/1"] == pytest.approx(0.5)
    assert found["router/a/entropy"] == pytest.approx(1.0)
    assert found["router/a/dead"] == 0


def test_edits_become_curves_of_ranks_importance_and_scores() -> None:
    rows = [
        {
            "step": 4,
            "what": "round",
            "site": "",
            "ranks": {"q": 3, "v": [1, 1]},
            "importance": {"q": 0.5},
        },
        {"step": 4, "what": "prune", "site": "q", "rank": 7},
        {"step": 4, "what": "prune", "site": "v", "rank": 1},
        {"step": 4, "what": "expand", "site": "v", "pruned": [0, 2], "scores": [0.5, 1.5]},
    ]
    assert edit_metrics(rows) == {
        "rank/q": 3.0,
        "rank/v": 2.0,
        "importance/q": 0.5,
        "edits/prune": 2.0,
        "edits/expand": 2.0,
        "score/v/lowest": 0.5,
        "score/v/highest": 1.5,
        "score/v/mean": 1.0,
    }


def test_tensorboard_shows_the_ranks_that_a_controller_moves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = loramux.config_from_dict(
        {
            "name": "alora",
            "r": 2,
            "rounds": 1,
            "first_round": 3,
            "round_unit": "steps",
            "score": "taylor",
        }
    )
    handle = train(TensorBoard(tmp_path), steps=5, config=config)
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    tags = board.Tags()["scalars"]
    ranks = {
        tag.removeprefix("rank/"): board.Scalars(tag) for tag in tags if tag.startswith("rank/")
    }
    assert ranks.keys() == handle.adapters["mix"].rows.keys()
    for path, rows in handle.adapters["mix"].rows.items():
        assert [(event.step, event.value) for event in ranks[path]] == [(3, rows.spans.num_rows)]
    assert any(tag.startswith("importance/") for tag in tags)


class Killed(Exception):
    """Stands in for a process that is gone."""


class KillAt(Listener):
    """Ends a run in the middle, without any farewell."""

    def __init__(self, step: int):
        self.step = step

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        if event.step == self.step:
            raise Killed


def logged_run(out: Path, *listeners: Listener, resume: bool = False) -> None:
    base = build_pico("llama")
    torch.manual_seed(0)
    handle = loramux.attach(base, loramux.MixLoRAConfig(r=2, num_experts=4), name="mix")
    settings = {"steps": 8, "learning_rate": 1e-2, "micro_batch_size": 4, "save_every": 3}
    job = Job("mix", train=examples(20), training=TrainingConfig(**settings), pad_token_id=PAD)
    Trainer(base, handle, [job], out=out, resume=resume, listeners=[RoutingLog(), *listeners]).run()


def test_a_killed_run_logs_the_same_routing_as_one_that_was_left_alone(tmp_path: Path) -> None:
    logged_run(tmp_path / "whole")
    with pytest.raises(Killed):
        logged_run(tmp_path / "killed", KillAt(5))
    logged_run(tmp_path / "killed", resume=True)
    whole, again = ((tmp_path / name / ROUTING).read_text() for name in ("whole", "killed"))
    assert again == whole
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(
        sum(router["share"]) == pytest.approx(1.0, abs=1e-4) for router in rows[0]["routers"]
    )


def test_the_routing_log_is_thinned_for_long_runs_and_wide_routers() -> None:
    wide = RouteRecord(
        adapter="a", path="model.layers.0.mlp", layer=0, when="token",
        columns=tuple(map(str, range(128))), weight=torch.eye(128),
    )  # fmt: skip
    (stat,) = router_stats([wide])
    assert log_period([stat], 6000) == 100
    assert log_period([stat] * 700, 6000) == 750
    assert log_period([], 6000) == 0
