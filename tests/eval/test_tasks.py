"""The task of a row reaches a router that goes by tasks, whatever is measured; another one may be named instead."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import loramux
from loramux.data.tasks import TaskRow
from loramux.eval.generate import generate, generate_model
from loramux.eval.generation import greedy
from loramux.eval.ranking import ChoiceRow, choice_scores
from loramux.eval.run import evaluate, evaluate_model
from loramux.report.routing import observe
from pico import build_pico, pico_tokenizer

TASKS = ("ask", "tell")
CHOICES = ("yes", "no", "maybe so")
RANKED = [TaskRow(task, f"{task}-{i}", f"is {i}?", CHOICES, "no") for task in TASKS for i in (1, 2)]
OPEN = [TaskRow(task, f"{task}-{i}", f"say {i}", None, "no") for task in TASKS for i in (1, 2)]


@pytest.fixture
def attached():
    """A MOELoRA whose tasks answer differently; it refuses a request that names none."""
    model = build_pico("llama")
    config = loramux.MOELoRAConfig(r=4, num_experts=2, tasks=TASKS, lora_dropout=0.0)
    handle = loramux.attach(model, config)
    randomise(handle)
    return model, handle


def randomise(handle):
    draw = torch.Generator().manual_seed(0)
    for parameter in handle.trainable_parameters().values():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_ranking_scores_every_row_under_its_own_task(attached, layout):
    model, _ = attached
    rows = [ChoiceRow((5, 9, 11), ((3,), (8, 2, 6)), (2, 9), task) for task in TASKS]
    together = choice_scores(model, rows, layout=layout)
    for row, scores in zip(rows, together, strict=True):
        for choice, value in zip(row.choices, scores.sums, strict=True):
            mask = torch.tensor([[True] * 3 + [False] * len(choice)])
            ids = torch.tensor([[*row.prompt, *choice]])
            with torch.inference_mode():
                logits = model(ids, prompt_mask=mask, tasks=[row.task]).logits[0].log_softmax(-1)
            expected = sum(float(logits[2 + i, token]) for i, token in enumerate(choice))
            assert value == pytest.approx(expected, abs=1e-4)
    assert together[0].sums != pytest.approx(together[1].sums, abs=1e-3)


def test_generation_answers_every_prompt_under_its_own_task(attached):
    model, _ = attached
    tokenizer = pico_tokenizer()
    prompts = [[5, 6, 7, 8], [5, 6, 7]]
    made = greedy(model, tokenizer, prompts, max_new_tokens=6, tasks=TASKS)
    for prompt, task, tokens in zip(prompts, TASKS, made, strict=True):
        assert greedy(model, tokenizer, [prompt], max_new_tokens=6, tasks=[task]) == [tokens]
    with pytest.raises(ValueError, match="no task was named"):
        greedy(model, tokenizer, prompts, max_new_tokens=6)


@pytest.mark.parametrize("rows", [RANKED, OPEN], ids=["ranked", "generated"])
def test_an_evaluation_tells_each_rows_task(attached, rows, monkeypatch):
    model, handle = attached
    told = []
    router = next(iter(handle.adapters["default"].routers.values()))
    forward = router.forward

    def watched(view, incoming):
        told.extend(view.tasks)
        return forward(view, incoming)

    monkeypatch.setattr(router, "forward", watched)
    by_task = {task: [row for row in rows if row.task == task] for task in TASKS}
    evaluate_model(model, pico_tokenizer(), by_task, progress=False)
    assert sorted(set(told)) == ["ask", "tell"] and told == sorted(told)


def test_observing_the_routing_tells_each_rows_task(attached):
    model, _ = attached
    routing = observe(model, pico_tokenizer(), {"ask": RANKED[:2], "tell": RANKED[2:]})
    assert routing.tasks == TASKS and dict(routing.counts) == {"ask": 2, "tell": 2}


def test_a_task_may_be_named_for_all_rows_and_for_prompts(attached, tmp_path):
    base = tmp_path / "base"
    build_pico("llama").save_pretrained(base)
    pico_tokenizer().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    handle = loramux.attach(model, attached[1].adapters["default"].method.config)
    randomise(handle)
    handle.save(tmp_path / "adapter")
    row = {"task": "dance", "id": "1", "prompt": "is 1?", "choices": CHOICES, "answer": "no"}
    path = tmp_path / "dance.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ValueError, match="'dance' is none of them"):
        evaluate(base, tmp_path / "adapter", [path], progress=False)
    result = evaluate(base, tmp_path / "adapter", [path], progress=False, task="tell")
    assert {entry["task"] for entry in result["results"]} == {"dance"}, "reported by its own name"
    told = generate(base, tmp_path / "adapter", ["say 1"], 4, task="tell")["results"]
    assert told == generate_model(model, pico_tokenizer(), ["say 1"], max_tokens=4, task="tell")
