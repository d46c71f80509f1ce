"""Controllers in the training loop: when they are called, what they may see, and that nothing of it leaks."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from loramux.core.controller import Controller, Edit, Moment
from loramux.core.edits import ranks_of
from loramux.train import Job, Listener, StepEvent, Trainer, TrainingConfig
from pico import PAD, build_pico
from train.editing import Moving
from train.toys import examples


class Watching(Controller):
    """Changes nothing; notes when it was asked, and does what could leak."""

    def __init__(self) -> None:
        self.seen: list[Moment] = []

    def before_training(self, moment: Moment) -> Sequence[Edit]:
        self.seen.append(moment)
        return [{"step": 0, "what": "look", "site": ""}]

    def after_step(self, moment: Moment) -> Sequence[Edit]:
        self.seen.append(moment)
        assert moment.samples is not None
        torch.rand(3)
        moment.handle.model.eval()
        with torch.no_grad():
            moment.handle.model(input_ids=moment.samples(2, moment.generator)[0]["input_ids"])
        return ()


def trainer(
    controllers: Mapping[str, Controller],
    *listeners: Listener,
    out: Path | None = None,
    validation: bool = True,
    **training: Any,
) -> Trainer:
    """One job per name, with the controllers that are given."""
    base = build_pico("llama")
    torch.manual_seed(0)
    handle: loramux.Handle | None = None
    for name in ("one", "two"):
        config = loramux.MixLoRAConfig(r=2, lora_dropout=0.1, jitter_noise=0.1)
        if name in controllers:
            config = loramux.LoraConfig(r=2, lora_dropout=0.1)  # type: ignore[assignment]
        if handle is None:
            handle = loramux.attach(base, config, name=name)
        else:
            handle.add(config, name=name)
        if name in controllers:
            own = controllers[name]
            handle.adapters[name].method.controller = lambda c=own: c  # type: ignore[method-assign, misc]
    assert handle is not None
    settings = {"steps": 9, "learning_rate": 1e-2, "micro_batch_size": 4, "eval_every": 3}
    jobs = [
        Job(
            name,
            train=examples(20, seed=seed),
            validation=examples(6, seed=9) if validation else (),
            training=TrainingConfig(**{**settings, **training}),
            seed=seed,
            pad_token_id=PAD,
        )
        for name, seed in (("one", 1), ("two", 2))
    ]
    return Trainer(base, handle, jobs, out=out, listeners=listeners)


def weights(trained: Trainer, name: str) -> dict[str, torch.Tensor]:
    return dict(trained.handle.adapters[name].state_dict())


def test_a_controller_is_asked_once_before_training_and_after_every_step() -> None:
    watching = Watching()
    runs = trainer({"one": watching}, gradient_accumulation_steps=2)
    runs.run()
    first = watching.seen[0]
    assert [moment.step for moment in watching.seen] == [0, *range(1, 10)]
    assert (first.num_steps, first.steps_per_epoch, first.peak_lr) == (9, 2.5, 1e-2)
    assert first.adapter is runs.handle.adapters["one"]
    assert dict(first.parameters) == runs.handle.trainable_parameters("one")
    assert first.optimizer is runs.runners[0].optimizer


def test_what_a_controller_draws_and_calls_leaves_no_trace_in_the_training() -> None:
    plain = trainer({"one": Controller()})
    plain.run()
    watched = trainer({"one": Watching()})
    watched.run()
    for name in ("one", "two"):
        want = weights(plain, name)
        got = weights(watched, name)
        assert all(torch.equal(want[key], got[key]) for key in want)
    assert plain.runners[0].state.history == watched.runners[0].state.history


def test_listeners_see_the_steps_routing_and_then_the_edits() -> None:
    seen: list[tuple[str, str, Any]] = []

    class Watch(Listener):
        def stepped(self, trainer: Trainer, event: StepEvent) -> None:
            seen.append(("step", event.job, len(trainer.handle.routing(event.job))))

        def edited(self, trainer: Trainer, job: str, rows: Sequence[Mapping[str, Any]]) -> None:
            seen.append(("edit", job, [row["what"] for row in rows]))

    trainer({"one": Moving()}, Watch()).run()
    of_one = [(what, details) for what, job, details in seen if job == "one"]
    assert of_one[:4] == [("step", 0), ("edit", ["probe"]), ("step", 0), ("edit", ["move"])]
    assert all(details > 0 for what, job, details in seen if job == "two")
    assert not any(what == "edit" for what, job, _ in seen if job == "two")


def test_every_job_has_its_own_controller_and_neighbours_do_not_matter() -> None:
    alone = trainer({"one": Moving()})
    alone.run()
    both = trainer({"one": Moving(), "two": Moving()})
    both.run()
    want, got = weights(alone, "one"), weights(both, "one")
    assert all(torch.equal(want[key], got[key]) for key in want)
    ledgers = [runner.control.controller.ledger for runner in both.runners]  # type: ignore[union-attr]
    assert ledgers[0] and ledgers[0] != ledgers[1]


def test_the_best_weights_come_back_in_the_shapes_they_had(tmp_path: Path) -> None:
    shapes: dict[int, Any] = {}

    class Watch(Listener):
        def validated(self, trainer: Trainer, job: str, step: int, *_: Any) -> None:
            if job == "one":
                shapes[step] = ranks_of(trainer.handle.adapters["one"])

    runs = trainer({"one": Moving()}, Watch(), out=tmp_path)
    one = runs.runners[0]
    one._validation_means = lambda: [float(one.state.step != 3)]  # type: ignore[method-assign]
    result, _ = runs.run()
    assert result.best_step == 3 and shapes[3] != shapes[9]
    assert ranks_of(runs.handle.adapters["one"]) == shapes[3]
    ours = runs.handle.adapters["one"]
    other = build_pico("llama")
    for folder in ("adapter", "best"):
        handle = loramux.load(other, tmp_path / "one" / folder)
        loaded = handle.adapters["default"].rows
        handle.detach()
        for path, rows in ours.rows.items():
            if rows.spans.num_rows:
                assert torch.equal(loaded[path].a, rows.a) and torch.equal(loaded[path].b, rows.b)


def test_edits_are_written_beside_the_history_of_their_job(tmp_path: Path) -> None:
    trainer({"one": Moving()}, out=tmp_path).run()
    rows = json.loads((tmp_path / "one" / "edits.json").read_text())
    assert [row["step"] for row in rows if row["what"] != "restore"] == [0, 2, 4, 6, 8]
    assert not (tmp_path / "two" / "edits.json").exists()


@pytest.mark.parametrize("validation", [True, False])
def test_samples_are_held_out_where_there_are_any(validation: bool) -> None:
    settings: dict[str, Any] = {} if validation else {"eval_every": None}
    runs = trainer({"one": Controller()}, validation=validation, **settings)
    samples = runs.runners[0].control.samples
    assert samples is not None
    parts = samples(5, torch.Generator().manual_seed(0))
    again = samples(5, torch.Generator().manual_seed(0))
    assert [len(part["input_ids"]) for part in parts] == [4, 1]
    assert torch.equal(parts[0]["input_ids"], again[0]["input_ids"])
    job = runs.runners[0].job
    pool = job.validation if validation else job.train
    known = {tuple(example.input_ids) for example in pool}
    for part in parts:
        for ids, mask in zip(part["input_ids"], part["attention_mask"], strict=True):
            assert tuple(ids[mask.bool()].tolist()) in known
