"""BeamLoRA in training: when it acts and when not, what it keeps, what it finds, and what a saved one is."""

import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import loramux
from loramux.methods.beamlora import BeamLoRAConfig, shuffled
from loramux.train import Job, Trainer, TrainingConfig
from loramux.train.control import Control, Schedule
from loramux.train.optim import lr_factor, make_optimizer, set_lr
from methods.beamlora_case import Training
from pico import PAD, build_pico
from train.toys import examples

NUM_STEPS, PEAK_LR = 120, 3e-3


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- When -------------------------------------------------------------------------------------


def steps_that_change(run: Training) -> list[int]:
    found = []
    for _ in range(run.num_steps):
        run.learn()
        before = run.everything()
        run.control()
        if not same(before, run.everything()):
            found.append(run.step)
    return found


def test_events_come_at_intervals_while_ranks_may_still_go_and_never_else() -> None:
    """Oracle 5: with p = 1, between intervals, and near the end everything is bitwise as before."""
    run = Training(num_steps=24, interval=4, end_step=13)
    assert steps_that_change(run) == [4, 8, 12]
    assert sorted({e["step"] for e in run.edits if e["what"] == "expand"}) == [4, 8, 12]
    assert run.edits[0]["num_events"] == 3


def test_the_last_interval_belongs_to_the_survivors() -> None:
    run = Training(num_steps=19, interval=4, end_step=1000)
    assert steps_that_change(run) == [4, 8, 12]


def test_equal_scores_prune_nobody() -> None:
    run = Training()
    for gate in run.gates().values():
        gate.logits.requires_grad_(False)
        run.parameters = {n: p for n, p in run.parameters.items() if not n.endswith("logits")}
    run.optimizer = torch.optim.AdamW(run.parameters.values(), lr=1e-2)
    run.editor.optimizer, run.editor.parameters = run.optimizer, run.parameters
    run.advance(3)
    run.learn()
    before = run.everything()
    assert run.control() == []
    assert same(before, run.everything())


def test_without_a_snapshot_there_is_no_event() -> None:
    run = Training()
    run.advance(3)
    run.controller.snapshot = None  # type: ignore[union-attr]
    run.learn()
    before = run.everything()
    assert not run.control()
    assert same(before, run.everything())


def test_lengths_and_temperature_follow_from_the_run_where_they_are_not_given() -> None:
    config = BeamLoRAConfig()
    assert (config.interval_of(37_031), config.end_of(37_031)) == (3086, 24_687)
    assert (config.interval_of(80), config.interval_of(3)) == (6, 2)
    assert (config.temperature_at(3e-4), config.temperature_at(9e-5)) == (0.05, 0.03)
    assert BeamLoRAConfig(temperature=0.1, interval=10, end_step=7).end_of(100) == 7
    for lr, want in ((1e-3, 0.05), (5e-5, 0.03)):
        gates = Training(peak_lr=lr).gates().values()
        assert all(float(gate.temperature) == pytest.approx(want) for gate in gates)


def test_a_run_too_short_for_an_event_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Training(num_steps=6, interval=4)
    assert "too few for an event" in caplog.text


# --- What -------------------------------------------------------------------------------------


def test_a_copied_rank_is_the_source_of_half_an_interval_ago_with_its_moments() -> None:
    """Oracle 7, in the optimizer's own tensors."""
    run = Training()
    run.advance(2)
    then = run.ranks()
    run.advance(1)
    run.learn()
    now = run.ranks()
    edits = run.control()
    after = run.ranks()
    assert edits
    for edit in edits:
        site = edit["site"]
        for source, target in zip(edit["copied"], edit["pruned"], strict=True):
            assert after[site][target] == then[site][source] != now[site][source]
            assert after[site][source] == now[site][source]
            logits = run.gates()[site].logits
            assert logits[source] == logits[target]
    for gate in run.gates().values():
        state = run.optimizer.state[gate.logits]
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()
        assert int(state["step"]) == run.step


@pytest.mark.parametrize("moments", ["keep", "zero"])
def test_moments_of_a_copied_rank_may_be_the_pruned_ones_or_none(moments: str) -> None:
    run = Training(moments=moments)
    run.advance(3)
    run.learn()
    now = run.ranks()
    (edit, *_) = run.control()
    target = edit["pruned"][0]
    _, *of_a, _, b1, b2 = run.ranks()[edit["site"]][target]
    _, *before, _, c1, c2 = now[edit["site"]][target]
    if moments == "keep":
        assert (of_a, b1, b2) == (before, c1, c2)
    else:
        assert not any(any(column) for column in (*of_a, b1, b2))


def test_an_event_keeps_all_scores_but_those_of_the_pairs() -> None:
    run = Training()
    run.advance(3)
    run.learn()
    before = run.scores()
    for edit in run.control():
        own, was = run.scores()[edit["site"]], before[edit["site"]]
        paired = {*edit["copied"], *edit["pruned"]}
        assert sum(own) == pytest.approx(len(own), abs=1e-5)
        for i in set(range(len(own))) - paired:
            assert own[i] == pytest.approx(was[i], abs=1e-5)
        for source, target in zip(edit["copied"], edit["pruned"], strict=True):
            mean = (was[source] + was[target]) / 2
            assert own[source] == pytest.approx(mean, abs=1e-5)
            assert own[target] == pytest.approx(mean, abs=1e-5)
        assert edit["scores"] == pytest.approx(was, abs=1e-5)


def test_no_event_changes_a_shape_a_parameter_object_or_a_group_of_the_optimizer() -> None:
    """Oracle 9."""
    run = Training(num_steps=24, top_p=0.7)

    def known() -> Any:
        objects = {name: (id(p), p.shape) for name, p in run.adapter.named_parameters()}
        groups = [[id(p) for p in group["params"]] for group in run.optimizer.param_groups]
        return objects, groups, set(run.optimizer.state)

    run.advance(1)
    before = known()
    run.advance(23)
    assert sum(len(e["pruned"]) for e in run.edits if e["what"] == "expand") > 5
    assert known() == before


def test_workers_with_other_random_states_make_the_same_edits() -> None:
    """Oracle 10: the permutation depends on step and site only."""
    runs = []
    for seed in (1, 2):
        run = Training(num_steps=24)
        run.generator.manual_seed(seed)
        torch.manual_seed(seed)
        run.advance(24)
        runs.append(run)
    assert runs[0].edits == runs[1].edits
    assert same(runs[0].everything(), runs[1].everything())
    targets = list(range(12))
    assert shuffled(targets, 4, "a") == shuffled(targets, 4, "a") != shuffled(targets, 4, "b")
    assert sorted(shuffled(targets, 8, "a")) == targets


# --- What it finds ------------------------------------------------------------------------------


def planted(rank: int) -> tuple[Training, Any, str]:
    """A teacher whose signal needs one direction that row `rank` of the student reads, and no other row does."""
    site = "model.layers.1.self_attn.q_proj"
    run = Training(num_steps=48, interval=4, target_modules=("layers.1.self_attn.q_proj",))
    rows = run.adapter.rows[site]
    with torch.no_grad():
        directions = torch.linalg.qr(torch.randn(32, 4, generator=run.noise))[0].T
        rows.a.copy_(0.3 * directions)
    teacher: Any = build_pico("llama")
    delta = torch.outer(torch.randn(32, generator=run.noise), directions[rank])
    teacher.get_submodule(site).weight.data += 0.6 * delta
    return run, teacher, site


@pytest.mark.parametrize("rank", range(4))
def test_a_task_whose_signal_sits_in_a_known_rank_is_found(rank: int) -> None:
    run, teacher, site = planted(rank)
    model: Any = run.handle.model
    gate = run.gates()[site]
    draw = torch.Generator().manual_seed(5)
    for _ in range(run.num_steps):
        ids = torch.randint(4, 96, (8, 12), generator=draw)
        with torch.no_grad():
            want = teacher(input_ids=ids).logits
        run.optimizer.zero_grad()
        (model(input_ids=ids).logits - want).square().mean().backward()
        run.optimizer.step()
        run.step += 1
        if run.step == 4:
            best = int(gate().argmax())
        run.control()
    first = next(e for e in run.edits if e["what"] == "expand")
    assert best == rank
    assert first["copied"][0] == rank and rank not in first["pruned"]


def final_loss(config: loramux.MethodConfig, teacher: Any, seed: int) -> float:
    """Mean squared error of the logits over the last steps of a short training."""
    model: Any = build_pico("llama")
    torch.manual_seed(seed)
    handle = loramux.attach(model, config, name="a")
    parameters = handle.trainable_parameters()
    optimizer = make_optimizer(parameters, TrainingConfig(steps=NUM_STEPS))
    schedule = Schedule(NUM_STEPS, 10.0, PEAK_LR)
    control = Control(handle, handle.adapters["a"], optimizer, parameters, schedule)
    control.begin()
    draw = torch.Generator().manual_seed(5)
    losses: list[float] = []
    for step in range(NUM_STEPS):
        set_lr(optimizer, PEAK_LR * lr_factor(step, NUM_STEPS, "cosine", 0.03))
        ids = torch.randint(4, 96, (8, 12), generator=draw)
        with torch.no_grad():
            want = teacher(input_ids=ids).logits
        loss = (model(input_ids=ids).logits - want).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        control.after_step(step + 1)
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def test_a_teacher_of_half_the_rank_is_learnt_about_as_well_as_by_a_lora() -> None:
    """Oracle 11, a sanity check: singular values 4, 2, 1, 0.5 at two linears, rank 8."""
    targets = ("layers.0.mlp.up_proj", "layers.1.self_attn.q_proj")
    draw = torch.Generator().manual_seed(0)
    teacher: Any = build_pico("llama")
    for target in targets:
        weight = teacher.get_submodule(f"model.{target}").weight.data
        left, _, right = torch.linalg.svd(
            torch.randn(weight.shape, generator=draw), full_matrices=False
        )
        weight += left[:, :4] @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5])) @ right[:4]
    shared: dict[str, Any] = {"r": 8, "lora_alpha": 16.0, "target_modules": targets}
    pairs = [
        (
            final_loss(BeamLoRAConfig(lora_dropout=0.0, **shared), teacher, seed),
            final_loss(loramux.LoraConfig(**shared), teacher, seed),
        )
        for seed in range(2)
    ]
    ours, theirs = (sum(column) for column in zip(*pairs, strict=True))
    assert theirs < 0.5, "both learn: they start at 0.96"
    assert ours < 1.25 * theirs


# --- What is saved ------------------------------------------------------------------------------


def test_a_trained_one_is_a_plain_lora_on_disk_that_computes_the_same(tmp_path: Path) -> None:
    model: Any = build_pico("llama")
    torch.manual_seed(0)
    handle = loramux.attach(model, BeamLoRAConfig(r=8, interval=4, top_p=0.8), name="a")
    job = Job(
        "a",
        train=examples(60),
        training=TrainingConfig(steps=24, learning_rate=1e-2, micro_batch_size=4),
        pad_token_id=PAD,
    )
    (result,) = Trainer(model, handle, [job], out=tmp_path).run()
    edits = json.loads((tmp_path / "edits.json").read_text())
    assert sum(row["what"] == "expand" for row in edits) > 3
    scores = [rows.gate().detach() for rows in handle.adapters["a"].rows.values()]  # type: ignore[misc]
    assert max(float(score.max() - score.min()) for score in scores) > 0.5
    ids = torch.tensor([[5, 17, 40, 61, 8]])
    want = model.eval()(input_ids=ids).logits
    other: Any = build_pico("llama")
    assert result.adapter is not None
    loaded = loramux.load(other, result.adapter, name="b")
    assert loaded.adapters["b"].method.name == "lora"
    torch.testing.assert_close(other(input_ids=ids).logits, want)
    loaded.detach()
    theirs: Any = peft.PeftModel.from_pretrained(other, result.adapter).eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)


def test_one_that_no_loop_let_act_is_saved_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handle = Training().handle
    handle.save(tmp_path / "bare")
    assert "train it with loramux.train.Trainer" in caplog.text
    caplog.clear()
    handle.remove("default")
    for config in (loramux.LoraConfig(), loramux.SMoRAConfig(r=4, activate_r=2)):
        handle.add(config, name="other")
        handle.save(tmp_path / config.method, name="other")
        handle.remove("other")
    assert "between optimizer steps" not in caplog.text


def test_row_gates_do_not_decay_under_weight_decay() -> None:
    run = Training()
    training = TrainingConfig(steps=1, weight_decay=0.5)
    optimizer = make_optimizer(run.parameters, training)
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    for name, parameter in run.parameters.items():
        assert decays[id(parameter)] == (0.0 if name.endswith("gate.logits") else 0.5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("interval", 3, "interval must be even"),
        ("interval", 0, "interval must be at least 2"),
        ("end_step", 0, "end_step"),
        ("top_p", 1.0, "top_p"),
        ("temperature", 0.0, "temperature"),
        ("score_merge", "mean", "score_merge must be one of"),
        ("use_dora", True, "leave use_dora off"),
    ],
)
def test_settings_that_make_no_sense_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BeamLoRAConfig(**{field: value})
