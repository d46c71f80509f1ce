"""MOELoRA: tasks from the row of a file to the gate, unknown ones, and the oracles of its own.

Oracles: one task merged equals the forward; one expert is a LoRA (in test_site_mixtures.py); samples of one task share
their weights; a batch of mixed tasks equals runs of one task each.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from loramux.data import Example, collate
from loramux.recipe import TrainingConfig
from loramux.train.job import Job
from loramux.train.trainer import Trainer
from methods.bridge import adapter_of, close
from methods.site_mixture_case import IDS, MASK, REAL, TASKS, attached, config_of, run
from oracles.surgery import base_weight
from pico import build_pico


@torch.no_grad()
def test_the_experts_of_a_task_merge_into_the_weights():
    model, handle = attached("moelora")
    adapter = adapter_of(handle)
    method: Any = adapter.method
    for task in TASKS:
        merged = build_pico("llama")
        for path, weight_E in method.expert_weights(adapter.routers, task).items():
            rows = adapter.rows[path]
            weight_R = weight_E[rows.spans.row_slot_R] * rows.spans.row_scale_R
            base_weight(merged.get_submodule(path))[0].data += (rows.b.T * weight_R) @ rows.a
        expected = merged(input_ids=IDS, attention_mask=MASK).logits
        close(run(model, handle, (task, task))[REAL], expected[REAL])


def test_samples_of_one_task_share_their_weights_and_others_do_not():
    model, handle = attached("moelora")
    run(model, handle, ("tell", "tell"))
    records = handle.routing()
    assert len(records) == 14
    assert all(torch.equal(r.gates[0], r.gates[1]) for r in records)
    run(model, handle, ("tell", "sing"))
    assert all(not torch.allclose(r.gates[0], r.gates[1]) for r in handle.routing())


def test_a_batch_of_mixed_tasks_equals_runs_of_one_task_each():
    model, handle = attached("moelora")
    mixed = run(model, handle, ("tell", "sing"))
    for row, task in enumerate(("tell", "sing")):
        alone = run(model, handle, (task, task))
        torch.testing.assert_close(mixed[row][REAL[row]], alone[row][REAL[row]])


@pytest.mark.parametrize("tasks", [None, ("ask", None), ("ask", "dance")])
def test_a_task_it_does_not_know_is_an_error_that_names_the_others(tasks: Any):
    model, handle = attached("moelora")
    with pytest.raises(ValueError, match=r"one of \['ask', 'tell', 'sing'\].*pass tasks"):
        run(model, handle, tasks)


def test_the_fallbacks_are_even_weights_and_those_of_the_mean_embedding():
    for fallback in ("uniform", "mean"):
        model, handle = attached("moelora", fallback=fallback)
        run(model, handle, ("dance", "ask"))
        routers: Any = adapter_of(handle).routers
        for record in handle.routing():
            router = routers[record.path]
            expected = torch.full((2,), 0.5)
            if fallback == "mean":
                expected = (router.weight @ router.embedding.mean(0)).softmax(-1)
            torch.testing.assert_close(record.gates[0], expected)
            known = (router.weight @ router.embedding[0]).softmax(-1)
            torch.testing.assert_close(record.gates[1], known)


def test_tasks_of_other_adapters_requests_are_their_own_business():
    model, handle = attached("moelora")
    alone = run(model, handle, ("ask", "tell"))
    with handle.batch(adapters=["default", None], tasks=["ask", "dance"]):
        mixed = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(mixed[0], alone[0])
    base = build_pico("llama")(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(mixed[1][REAL[1]], base[1][REAL[1]])


def test_a_model_call_may_name_the_tasks_itself():
    model, handle = attached("moelora")
    named = model(input_ids=IDS, attention_mask=MASK, tasks=["tell", "sing"]).logits
    assert torch.equal(named, run(model, handle, ("tell", "sing")))


def test_an_answer_keeps_the_task_of_its_prompt():
    """With and without a cache, and for beams: every step names the task once, with the prompt."""
    model, handle = attached("moelora")
    ids = IDS[:, :4]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with handle.batch(tasks=["tell", "sing"]):
        cached = model.generate(ids, **options)
        bare = model.generate(ids, use_cache=False, **options)
        model.generate(ids, num_beams=3, **options)
        first = model(input_ids=ids, use_cache=True)
    assert torch.equal(cached, bare)
    step = cached[:, 4:5]
    next_step = model(input_ids=step, past_key_values=first.past_key_values).logits[:, 0]
    whole = run_whole(model, handle, torch.cat([ids, step], 1))
    torch.testing.assert_close(next_step, whole[:, -1], atol=1e-5, rtol=1e-5)


def run_whole(model: Any, handle: loramux.Handle, ids: torch.Tensor) -> torch.Tensor:
    with handle.batch(tasks=["tell", "sing"]):
        return model(input_ids=ids).logits


def test_rows_without_any_prompt_train_too():
    model, handle = attached("moelora")
    model.train()
    with handle.batch(tasks=["ask", "ask"]):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in handle.trainable_parameters().values())


# -- where tasks come from -------------------------------------------------------------------------


def example(task: str, *ids: int) -> Example:
    return Example.build(task, ids, [i > 1 for i in range(len(ids))])


EXAMPLES = [example("ask", 5, 6, 7, 8, 9), example("tell", 15, 16, 17), example("ask", 25, 26, 27)]


@pytest.mark.parametrize("packing", [False, True])
def test_training_and_validation_tell_the_gate_the_task_of_every_row(packing: bool):
    """Only the embeddings of tasks that were seen move, and a task that is not listed stops the run."""
    model, handle = attached("moelora", fresh=True)
    before = {n: p.detach().clone() for n, p in handle.trainable_parameters().items()}
    training = TrainingConfig(steps=2, micro_batch_size=3, learning_rate=1e-2, warmup_ratio=0)
    job = Job("default", EXAMPLES, training, validation=EXAMPLES, packing=packing)
    Trainer(model, handle, [job]).run()
    for name, parameter in handle.trainable_parameters().items():
        if name.endswith("embedding"):
            moved = (parameter - before[name]).abs().amax(1) > 0
            assert moved.tolist() == [True, True, False], name
    model, handle = attached("moelora", fresh=True)
    strange = [example("dance", 5, 6, 7, 8), *EXAMPLES]
    with pytest.raises(ValueError, match="'dance' is none of them"):
        Trainer(model, handle, [Job("default", strange, training, packing=packing)]).run()


@pytest.mark.parametrize("part", ["training", "validation"])
def test_a_row_of_an_unknown_task_is_refused_before_any_job_trains(part: str, tmp_path: Path):
    model = build_pico("llama")
    handle = loramux.attach(model, loramux.LoraConfig(r=2), name="good")
    handle.add(config_of("moelora"), name="tasks")
    training = TrainingConfig(steps=2, micro_batch_size=2)
    strange = [*EXAMPLES, example("dance", 5, 6, 7, 8)]
    rows = (strange, EXAMPLES) if part == "training" else (EXAMPLES, strange)
    jobs = [Job(name, rows[0], training, validation=rows[1]) for name in ("good", "tasks")]
    with pytest.raises(ValueError, match=f"job 'tasks', {part} rows of task 'dance': .*none of"):
        Trainer(model, handle, jobs, out=tmp_path / "run")
    Trainer(model, handle, jobs[:1], out=tmp_path / "run").run()


def test_a_training_step_without_labels_says_nothing_of_prompts(caplog: pytest.LogCaptureFixture):
    """The gate looks up tasks: there is no prompt that it could read too far."""
    model, handle = attached("moelora")
    with handle.batch(tasks=["ask", "tell"]):
        model.train()(input_ids=IDS)
    assert "without labels" not in caplog.text
    handle.add(loramux.MiLoRAConfig(r=2), name="reader")
    handle.use("reader")
    model(input_ids=IDS)
    assert "training ['reader'] without labels" in caplog.text


def test_a_packed_row_is_the_rows_it_holds():
    model, _ = attached("moelora")
    packed = collate(EXAMPLES, 0, packing=True, max_len=8)
    assert packed["input_ids"].shape[0] == 2
    assert packed["tasks"] == ("ask", "tell", "ask", None)
    packed.pop("labels")
    got = model(**packed).logits
    for row, (start, one) in enumerate([(0, EXAMPLES[0]), (0, EXAMPLES[2])]):
        alone = model(input_ids=torch.tensor([one.input_ids]), tasks=[one.task]).logits[0]
        torch.testing.assert_close(got[row, start : start + len(one)], alone, atol=2e-5, rtol=1e-5)
    behind = model(input_ids=torch.tensor([EXAMPLES[1].input_ids]), tasks=["tell"]).logits[0]
    torch.testing.assert_close(got[0, 5:8], behind, atol=2e-5, rtol=1e-5)


# -- what it refuses -------------------------------------------------------------------------------


def test_experts_must_share_the_rank_and_tasks_must_be_named(tmp_path: Path):
    with pytest.raises(ValueError, match="must divide the rank: 3 experts do not share rank 4"):
        loramux.attach(build_pico("llama"), config_of("moelora", num_experts=3))
    with pytest.raises(ValueError, match="list the names of the tasks"):
        loramux.attach(build_pico("llama"), config_of("moelora", tasks=()))
    with pytest.raises(ValueError, match="tasks must differ"):
        config_of("moelora", tasks=("a", "a"))
    with pytest.raises(ValueError, match="tasks must be a list of names"):
        config_of("moelora", tasks="ask")


def test_the_scale_is_that_of_the_total_rank_and_a_starts_small():
    _, handle = attached("moelora", fresh=True)
    rows = next(iter(adapter_of(handle).rows.values()))
    assert rows.spans.rank == (2, 2) and set(rows.spans.scale) == {6.0 / 4}
    stacked = torch.cat([r.a.detach().reshape(-1) for r in adapter_of(handle).rows.values()])
    assert float(stacked.std()) == pytest.approx(0.01, rel=0.1)
