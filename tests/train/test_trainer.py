"""What the loop promises: seeds decide everything, jobs do not touch each other, stop rules hold."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loramux
from loramux.train import Job, JobResult, Listener, StepEvent, Trainer, TrainingConfig
from pico import PAD, build_pico
from train.toys import examples

METHODS = {
    "lora": loramux.LoraConfig(r=4, lora_dropout=0.1),
    "milora": loramux.MiLoRAConfig(r=4, lora_alpha=16),
    "mixlora": loramux.MixLoRAConfig(r=4, num_experts=4),
}


def job(name: str = "default", **changes: Any) -> Job:
    options = {
        "train": examples(40),
        "validation": (),
        "seed": 0,
        "packing": False,
        "sequence_len": None,
    }
    options |= {key: changes.pop(key) for key in list(changes) if key in options}
    training = {"steps": 12, "learning_rate": 1e-2, "micro_batch_size": 4, **changes}
    return Job(name, training=TrainingConfig(**training), pad_token_id=PAD, **options)


def train(
    jobs: list[Job], methods: list[str], listeners: tuple[Listener, ...] = (), **model: Any
) -> tuple[loramux.Handle, list[JobResult]]:
    base = build_pico("llama", **model)
    handle = None
    for each, method in zip(jobs, methods, strict=True):
        torch.manual_seed(0)
        if handle is None:
            handle = loramux.attach(base, METHODS[method], name=each.name)
        else:
            handle.add(METHODS[method], name=each.name)
    assert handle is not None
    return handle, Trainer(base, handle, jobs, listeners=listeners).run()


def weights(handle: loramux.Handle, name: str = "default") -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in handle.trainable_parameters(name).items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


class Losses(Listener):
    def __init__(self) -> None:
        self.of: dict[str, list[float]] = {}

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        self.of.setdefault(event.job, []).append(event.loss)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_leaves_the_base_alone(method: str) -> None:
    before = {name: p.clone() for name, p in build_pico("llama").named_parameters()}
    losses = Losses()
    handle, (result,) = train([job(steps=30)], [method], (losses,))
    assert losses.of["default"][-1] < losses.of["default"][0] - 1.0
    assert result.status == "finished"
    assert result.steps == 30
    handle.detach()
    for name, parameter in handle.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_every_bit(method: str) -> None:
    first = weights(train([job(seed=3)], [method])[0])
    torch.rand(17)  # the global generator stands elsewhere now
    assert same(first, weights(train([job(seed=3)], [method])[0]))
    assert not same(first, weights(train([job(seed=4)], [method])[0]))


def test_training_leaves_the_callers_generator_mode_and_adapter_as_they_were() -> None:
    base = build_pico("llama")
    handle = loramux.attach(base, METHODS["lora"], name="a")
    handle.add(METHODS["lora"], name="b")
    trainer = Trainer(base, handle, [job("b", steps=2)])
    state = torch.get_rng_state()
    trainer.run()
    assert torch.equal(torch.get_rng_state(), state)
    assert not base.training
    assert handle.dispatch.active == "a"


def test_jobs_train_the_same_together_and_alone() -> None:
    one = job("one", seed=1, steps=7, eval_every=3, validation=examples(6, seed=9))
    two = job("two", seed=2, steps=12, gradient_accumulation_steps=2)
    three = job("three", seed=3, steps=9)
    methods = {"one": "milora", "two": "lora", "three": "mixlora"}
    jobs = [one, two, three]
    handle, results = train(jobs, [methods[each.name] for each in jobs])
    assert [result.steps for result in results] == [7, 12, 9]
    for each in jobs:
        alone, _ = train([each], [methods[each.name]])
        assert same(weights(handle, each.name), weights(alone, each.name)), each.name


def test_a_job_that_diverges_stops_with_its_reason_and_the_others_go_on() -> None:
    bad = job("bad", learning_rate=1e25, max_grad_norm=1e9, warmup_ratio=0.0)
    good = job("good")
    handle, (failed, fine) = train([bad, good], ["lora", "milora"])
    assert failed.status == "failed"
    assert "not finite" in failed.reason
    assert failed.steps < 12
    assert all(torch.isfinite(w).all() for w in weights(handle, "bad").values())
    assert fine.status == "finished"
    assert same(weights(handle, "good"), weights(train([good], ["milora"])[0], "good"))


def test_accumulated_steps_have_the_gradient_of_the_whole_batch(monkeypatch: Any) -> None:
    monkeypatch.setitem(METHODS, "plain", loramux.LoraConfig(r=4))
    whole, split = Losses(), Losses()
    train([job(micro_batch_size=8, group_by_length=False)], ["plain"], (whole,))
    parts = job(micro_batch_size=2, gradient_accumulation_steps=4, group_by_length=False)
    train([parts], ["plain"], (split,))
    assert split.of["default"] == pytest.approx(whole.of["default"], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_gives_the_same_bits(method: str) -> None:
    plain, _ = train([job(steps=5)], [method])
    saved, _ = train([job(steps=5, gradient_checkpointing=True)], [method])
    assert same(weights(plain), weights(saved))
    assert not saved.model.is_gradient_checkpointing


def test_packing_trains_on_every_token_once() -> None:
    rows = examples(40)
    packed = job(
        train=rows, packing=True, sequence_len=32, steps=None, epochs=1, micro_batch_size=8
    )
    _, (result,) = train([packed], ["milora"])
    assert result.tokens == sum(map(len, rows))


def test_a_half_precision_base_trains_in_fp32_and_learns() -> None:
    losses = Losses()
    handle, _ = train([job(steps=30)], ["milora"], (losses,), dtype=torch.bfloat16)
    assert {p.dtype for p in handle.trainable_parameters().values()} == {torch.float32}
    assert losses.of["default"][-1] < losses.of["default"][0] - 1.0


def test_validation_keeps_the_best_weights_and_patience_ends_the_job() -> None:
    class Seen(Listener):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.kept: dict[str, Tensor] = {}

        def validated(
            self, trainer: Trainer, job: str, step: int, loss: float, is_best: bool
        ) -> None:
            self.losses.append(loss)
            if is_best:
                self.kept = weights(trainer.handle)

    seen = Seen()
    # Four rows learnt by heart: the loss on other rows soon rises.
    over = job(
        train=examples(4),
        validation=examples(16, seed=5),
        steps=200,
        learning_rate=3e-2,
        eval_every=4,
        early_stopping_patience=3,
    )
    handle, (result,) = train([over], ["lora"], (seen,))
    assert result.status == "stopped_early"
    assert result.steps < 200
    assert result.val_loss == min(seen.losses)
    assert result.best_step == 4 * (seen.losses.index(min(seen.losses)) + 1)
    assert result.steps == result.best_step + 3 * 4
    assert same(weights(handle), seen.kept)


def test_the_method_names_the_learning_rate_where_the_job_does_not() -> None:
    class Rates(Listener):
        rates: list[float]

        def started(self, trainer: Trainer) -> None:
            self.rates = []

        def stepped(self, trainer: Trainer, event: StepEvent) -> None:
            self.rates.append(event.lr)

    rates = Rates()
    train([job(learning_rate=None, scheduler="constant", warmup_ratio=0)], ["mixlora"], (rates,))
    assert rates.rates == [pytest.approx(2e-4)] * 12


def test_history_rows_cover_the_steps_between_them() -> None:
    losses = Losses()
    base = build_pico("llama")
    torch.manual_seed(0)
    handle = loramux.attach(base, METHODS["milora"])
    asked = job(steps=7, log_every=3, eval_every=4, validation=examples(5, seed=2))
    trainer = Trainer(base, handle, [asked], listeners=(losses,))
    trainer.run()
    history = trainer.runners[0].state.history
    assert [row["step"] for row in history] == [3, 4, 6, 7]
    assert history[0]["loss"] == pytest.approx(sum(losses.of["default"][:3]) / 3)
    assert [row["step"] for row in history if "val_loss" in row] == [4, 7]
    assert history[-1]["tokens"] == trainer.runners[0].state.tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ()}, "no training examples"),
        ({"early_stopping_patience": 2}, "eval_every"),
        ({"eval_every": 2}, "validation data"),
        ({"epochs": 1}, "exactly one"),
    ],
)
def test_jobs_that_cannot_run_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(**changes)


def test_a_job_without_an_adapter_is_refused_by_name() -> None:
    base = build_pico("llama")
    handle = loramux.attach(base, METHODS["lora"])
    with pytest.raises(ValueError, match=r"\['other'\]"):
        Trainer(base, handle, [job("other")])


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    _, (result,) = train([job(steps=2)], ["lora"])
    assert result.adapter is None
    assert not list(tmp_path.iterdir())
