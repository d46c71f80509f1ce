"""Preference training: the loss is what the papers say, against the right reference, in every way it can be run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from joint.jobs import METHODS, attached, tiny, weights
from loramux.data import Example, collate
from loramux.errors import LoramuxError
from loramux.recipe import DpoConfig, parse_recipe
from loramux.train import Job, Listener, StepEvent, Trainer, TrainingConfig, train_recipe
from loramux.train.loss import SupervisedForward
from loramux.train.objective import objective_of
from pico import PAD, build_pico, pico_tokenizer
from train.toys import examples, pairs

PLAIN = {"lora": loramux.LoraConfig(r=4), "dora": loramux.LoraConfig(r=3, use_dora=True)}
PLAIN["mixlora"] = loramux.MixLoRAConfig(r=2, num_experts=4)


def dpo(**fields: Any) -> DpoConfig:
    return DpoConfig(name="dpo", **fields)


def job(objective: DpoConfig, *, name: str = "lora", num: int = 6, **changes: Any) -> Job:
    training = {"learning_rate": 1e-2, "warmup_ratio": 0.0, "steps": 6, "micro_batch_size": 2}
    options = {k: changes.pop(k) for k in list(changes) if k in Job.__dataclass_fields__}
    options = {"train": pairs(num), "pad_token_id": PAD, **options}
    return Job(name, training=TrainingConfig(**training | changes), objective=objective, **options)


def plain(method: str, *, moved: bool = True) -> tuple[Any, Any]:
    """(base, handle) in fp64 with an adapter of this method, without dropout, and a frozen other one."""
    base = tiny(dtype=torch.float64)
    torch.manual_seed(0)
    handle = loramux.attach(base, PLAIN[method], name=method)
    handle.add(loramux.LoraConfig(r=2), name="other")
    for adapter in handle.adapters.values():
        adapter.double()
        for parameter in adapter.trainable().values() if moved else ():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    handle.adapters["other"].set_trainable(False)
    return base, handle


def loss_of(each: Job, base: Any, handle: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean loss, figures) of all rows of the job in one micro-batch."""
    from loramux.data import collate

    forward = SupervisedForward(base)
    objective = objective_of(each, handle, forward)
    handle.use(each.name)
    rows = list(each.train)
    with forward.hooked():
        batch = objective.complete(collate(rows, PAD), rows)
        loss, figures = objective.loss(batch, *forward.predictions(batch))
    return loss / objective.weight(rows), figures / objective.weight(rows)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_fresh_adapter_starts_at_the_logarithm_of_two_also_when_smoothed(
    smoothing: float,
) -> None:
    base, handle = plain("lora", moved=False)
    loss, figures = loss_of(job(dpo(beta=0.3, label_smoothing=smoothing)), base, handle)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert figures[1:].abs().max().item() < 1e-12  # margin and rewards


def test_a_fresh_adapter_starts_at_the_squared_half_of_one_over_beta_under_ipo() -> None:
    base, handle = plain("lora", moved=False)
    loss, _ = loss_of(job(dpo(beta=0.25, loss_type="ipo")), base, handle)
    assert loss.item() == pytest.approx((1 / (2 * 0.25)) ** 2, abs=1e-11)


def dense(each: Job, base: Any, handle: Any, reference: str | None) -> torch.Tensor:
    """The papers' formulas row by row: no padding, no hook, no cache."""

    def log_prob(row: Any, name: str | None) -> torch.Tensor:
        handle.use(name)
        prompt = torch.tensor([row.prompt_mask])
        logits = base(input_ids=torch.tensor([row.input_ids]), prompt_mask=prompt).logits[0]
        log = logits.log_softmax(-1)
        places = [i for i, flag in enumerate(row.loss_mask) if flag]
        return sum(log[i - 1, row.input_ids[i]] for i in places)  # type: ignore[return-value]

    objective = each.objective
    assert objective is not None
    total = torch.zeros((), dtype=torch.float64)
    for i in range(0, len(each.train), 2):
        policy = [log_prob(row, each.name) for row in each.train[i : i + 2]]
        with torch.no_grad():
            held = [log_prob(row, reference) for row in each.train[i : i + 2]]
        delta = (policy[0] - policy[1]) - (held[0] - held[1])
        if objective.loss_type == "ipo":
            total = total + (delta - 1 / (2 * objective.beta)) ** 2
            continue
        right = 1 / (1 + torch.exp(-objective.beta * delta))
        e = objective.label_smoothing
        total = total - (1 - e) * right.log() - e * (1 - right).log()
    return total / (len(each.train) // 2)


@pytest.mark.parametrize("method", list(PLAIN))
@pytest.mark.parametrize(
    "fields",
    [{"label_smoothing": 0.1}, {"loss_type": "ipo", "beta": 0.4}, {"reference": "other"}],
    ids=["sigmoid", "ipo", "adapter"],
)
def test_loss_and_gradients_are_those_of_the_formula_row_by_row(
    method: str, fields: dict[str, Any]
) -> None:
    base, handle = plain(method)
    each = job(dpo(**fields), name=method, num=4)
    loss, _ = loss_of(each, base, handle)
    parameters = list(handle.trainable_parameters(method).values())
    have = torch.autograd.grad(loss, parameters, allow_unused=True)
    want_loss = dense(each, base, handle, fields.get("reference"))
    want = torch.autograd.grad(want_loss, parameters, allow_unused=True)
    assert loss.item() == pytest.approx(want_loss.item(), abs=1e-9)
    for mine, other in zip(have, want, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)


def test_accumulated_micro_batches_are_the_batch_and_pairs_stay_together() -> None:
    def run(**training: Any) -> dict[str, torch.Tensor]:
        base, handle = plain("lora")
        each = job(dpo(), num=8, steps=2, group_by_length=False, **training)
        for batch in each.plan():
            assert all(
                b == a + 1 and a % 2 == 0 for a, b in zip(batch[::2], batch[1::2], strict=True)
            )
        Trainer(base, handle, [each]).run()
        return weights(handle, "lora")

    whole = run(micro_batch_size=4)
    parts = run(micro_batch_size=1, gradient_accumulation_steps=4)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=0, atol=1e-9)


class StopAfter(Listener):
    def __init__(self, step: int):
        self.step = step

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        if event.step == self.step:
            trainer.stop()


def test_a_resumed_run_ends_in_the_bits_of_an_unbroken_one(tmp_path: Path) -> None:
    known: list[dict[bytes, float]] = []

    def run(out: Path, *listeners: Listener, resume: bool = False) -> tuple[Any, Any]:
        base = tiny()
        handle = attached(base, ["lora"])
        each = job(
            dpo(), steps=None, epochs=2, validation=pairs(3, seed=5), eval_every=2, save_every=2
        )
        trainer = Trainer(base, handle, [each], out=out, resume=resume, listeners=listeners)
        known.append(dict(trainer.runners[0].objective.references.known))  # type: ignore[attr-defined]
        trainer.run()
        return trainer.runners[0], weights(handle, "lora")

    first, _ = run(tmp_path / "a", StopAfter(4))
    again, have = run(tmp_path / "a", resume=True)
    whole, want = run(tmp_path / "b")
    assert first.state.step == 4
    # Computed anew, in batches of other widths, they would round otherwise.
    assert known[1] == first.objective.references.known != {}
    assert again.state.history == whole.state.history
    assert {"accuracy", "margin", "reward_chosen", "val_accuracy"} <= set(whole.state.history[3])
    assert all(torch.equal(have[key], value) for key, value in want.items())


def test_rows_seen_before_cost_no_further_call_of_the_reference() -> None:
    base, handle = plain("lora")
    trainer = Trainer(base, handle, [job(dpo(), num=4, steps=6)])
    calls: list[str | None] = []
    base.register_forward_pre_hook(lambda *_: calls.append(handle.dispatch.active))
    trainer.run()
    assert [name for name in calls if name is None] == [None] * 2  # two batches, three epochs
    assert calls.count("lora") == 6


def test_rows_of_the_same_tokens_with_other_answers_have_references_of_their_own() -> None:
    base, handle = plain("lora")
    ids = [7, 8, 9, 10, 11]
    rows = [
        Example.build("toy", ids, [place >= first for place in range(len(ids))]) for first in (2, 4)
    ]

    def seen(some: list[Example]) -> list[float]:
        objective = objective_of(job(dpo()), handle, SupervisedForward(base))
        return list(objective.complete(collate(some, PAD), some)["reference"].tolist())

    assert seen(rows) == pytest.approx([seen([row])[0] for row in rows])
    assert seen(rows)[0] < seen(rows)[1] < 0  # of three tokens, and of one


def test_it_learns_what_is_preferred() -> None:
    base = tiny()
    handle = attached(base, ["lora"])
    each = job(
        dpo(), num=12, steps=16, learning_rate=2e-2, micro_batch_size=4, validation=pairs(8, seed=3)
    )
    trainer = Trainer(base, handle, [each])
    (result,) = trainer.run()
    history = trainer.runners[0].state.history
    assert history[-1]["accuracy"] == 1.0
    assert history[-1]["margin"] > 1.0
    assert history[-1]["val_accuracy"] == 1.0
    assert result.val_loss is not None and result.val_loss < 0.6


@pytest.mark.parametrize(
    ("reference", "says"),
    [("lora", "is being trained"), ("nobody", "no adapter named 'nobody'")],
)
def test_a_reference_must_be_there_and_frozen(reference: str, says: str) -> None:
    base, handle = plain("lora")
    with pytest.raises(LoramuxError, match=says):
        Trainer(base, handle, [job(dpo(reference=reference))])


def test_rows_that_are_no_pairs_are_refused_before_anything_is_trained() -> None:
    rows = pairs(2)
    for wrong, says in (
        (rows[:3], "two examples each"),
        ([rows[0], rows[3]], "other prompts"),
        ([rows[0], rows[0]], "are the same"),
        (examples(4), "other prompts"),
    ):
        with pytest.raises(ValueError, match=says):
            job(dpo(), train=wrong)


# --- From a recipe --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_pico("llama", num_hidden_layers=1).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


def recipe(base: Path, file: Path, **changes: Any) -> Any:
    raw = {
        "base": str(base),
        "dtype": "float32",
        "method": {"name": "lora", "r": 2},
        "data": {"train": [{"path": str(file)}], "sequence_len": 64},
        "training": {"steps": 3, "micro_batch_size": 2, "learning_rate": 1e-2},
        **changes,
    }
    return parse_recipe(raw)


def rows_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_recipe_trains_against_an_adapter_and_may_begin_as_its_copy(
    base: Path, tmp_path: Path
) -> None:
    sft = rows_file(
        tmp_path / "sft.jsonl", [{"prompt": f"is it {i}?", "completion": " yes"} for i in range(4)]
    )
    dpo_rows = [{"prompt": f"is it {i}?", "chosen": " yes", "rejected": " no"} for i in range(4)]
    data = rows_file(tmp_path / "dpo.jsonl", dpo_rows)
    first = train_recipe(recipe(base, sft), tmp_path / "sft", progress=False, board=False)
    objective = {"name": "dpo", "reference": first["adapter"], "start": "reference"}
    made = train_recipe(
        recipe(base, data, objective=objective), tmp_path / "dpo", progress=False, board=False
    )
    history = json.loads((tmp_path / "dpo" / "history.json").read_text())
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # it is its reference
    assert history[-1]["margin"] > 0
    model = build_pico("llama", num_hidden_layers=1)
    handle = loramux.load(model, made["adapter"])
    assert list(handle.adapters) == ["default"]  # the reference is no part of it

    fresh = {"name": "dpo", "reference": first["adapter"]}
    train_recipe(recipe(base, data, objective=fresh), tmp_path / "own", progress=False, board=False)
    history = json.loads((tmp_path / "own" / "history.json").read_text())
    assert history[0]["loss"] != pytest.approx(math.log(2), abs=1e-5)  # it is the base

    wider = recipe(base, data, objective=objective, method={"name": "lora", "r": 4})
    with pytest.raises(LoramuxError, match="make them equal"):
        train_recipe(wider, tmp_path / "wide", progress=False, board=False)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objective": {"name": "dpo", "beta": 0}}, "beta"),
        ({"objective": {"name": "dpo", "loss_type": "ipo", "label_smoothing": 0.1}}, "label_smoothing"),
        ({"objective": {"name": "dpo", "start": "reference"}}, "start"),
        ({"objective": {"name": "ppo"}}, "objective"),
        ({"objective": {"name": "dpo"}, "data": {"train": [{"path": "x"}], "packing": True}}, "packing"),
        ({"objective": {"name": "dpo", "reference": "no/such/folder"}}, "no adapter folder"),
    ],
)  # fmt: skip
def test_what_an_objective_cannot_be_is_said(
    base: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    data = rows_file(tmp_path / "rows.jsonl", [row])
    with pytest.raises(LoramuxError, match=says):
        train_recipe(recipe(base, data, **changes), tmp_path / "out", progress=False, board=False)
    assert not (tmp_path / "out" / "adapter").exists()


def test_jobs_take_the_objective_of_the_top_level_change_it_or_do_without() -> None:
    jobs = parse_recipe(
        {
            "base": "x",
            "method": {"name": "lora", "r": 2},
            "data": {"train": [{"path": "x.jsonl"}]},
            "training": {"steps": 1},
            "objective": {"name": "dpo", "beta": 0.3},
            "jobs": [
                {"name": "a"},
                {"name": "b", "objective": {"loss_type": "ipo"}},
                {"name": "c", "objective": {"name": "sft"}},
            ],
        }
    ).jobs_resolved()
    assert [each.objective for each in jobs] == [
        dpo(beta=0.3),
        dpo(beta=0.3, loss_type="ipo"),
        None,
    ]


def test_the_other_methods_of_the_joint_tests_take_preferences_too() -> None:
    for name in [name for name in METHODS if name not in PLAIN]:
        base = tiny()
        handle = attached(base, [name])
        (result,) = Trainer(base, handle, [job(dpo(), name=name, steps=2)]).run()
        assert result.status == "finished", (name, result.reason)
