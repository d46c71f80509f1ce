"""Those who watch a run: TensorBoard files, plain lines, live bars, router numbers."""

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

import loramux
from loramux.core.types import RouteRecord
from loramux.train import Job, Listener, Trainer, TrainingConfig
from loramux.train.board import TensorBoard
from loramux.train.metrics import router_metrics
from loramux.train.progress import LiveProgress, PlainProgress, make_progress
from pico import PAD, build_pico
from train.toys import examples


def train(*listeners: Listener, steps: int = 12) -> None:
    base = build_pico("llama")
    torch.manual_seed(0)
    handle = loramux.attach(base, loramux.MixLoRAConfig(r=4, num_experts=4), name="mix")
    job = Job(
        "mix",
        train=examples(20),
        validation=examples(4, seed=1),
        training=TrainingConfig(steps=steps, learning_rate=1e-2, micro_batch_size=4, eval_every=6),
        pad_token_id=PAD,
    )
    Trainer(base, handle, [job], listeners=listeners).run()


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
    assert list(router_metrics([made], shares=False)) == ["router/a/entropy"]


def test_a_router_that_selects_everything_is_measured_by_weight() -> None:
    found = router_metrics([record([[0.9, 0.1], [0.7, 0.3], [0.1, 0.9]])])
    assert found["router/a/03/0"] == pytest.approx(0.8)
    entropies = [-sum(p * math.log2(p) for p in row) for row in ((0.9, 0.1), (0.7, 0.3))]
    assert found["router/a/entropy"] == pytest.approx(sum(entropies) / 2)


def test_no_records_give_no_numbers() -> None:
    assert router_metrics([]) == {}
