"""A request's task reaches routers that go by tasks: alone, in a crowd, and never through a shared prefix."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import loramux
from engine.crowd import assert_close, build_engine, drive, greedy, random_prompt, record
from loramux.engine.offline import read_jobs
from loramux.engine.request import Request
from methods.site_mixture_case import TASKS, attached


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> tuple[loramux.Handle, Path]:
    _, handle = attached("moelora")
    return handle, handle.save(tmp_path_factory.mktemp("moelora") / "adapter")


@pytest.mark.parametrize("seed", range(2))
def test_requests_of_any_task_are_answered_as_the_core_answers_them(
    seed: int, gated: tuple[loramux.Handle, Path]
):
    """Prompts repeat under other tasks, with a prefix cache and room for few: nothing leaks and preemption keeps it."""
    handle, folder = gated
    draw = random.Random(seed)
    prompts = [random_prompt(draw, 8, 14) for _ in range(3)]
    requests = [
        greedy(
            draw.choice(prompts), "gated", draw.randint(1, 6), id=f"r{i}", task=draw.choice(TASKS)
        )
        for i in range(24)
    ]
    with build_engine(max_chunk=7, kv_memory="100KiB", prefix_cache=True) as engine:
        engine.add_adapter("gated", folder)
        seen = record(engine)
        done = drive(engine, requests, draw)
    for request in requests:
        completion, prompt = done[str(request.id)], list(request.prompt)
        assert completion.error is None, completion.error
        with torch.no_grad(), handle.batch(tasks=[request.task]):
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            wanted = handle.model(input_ids=ids).logits[0, len(prompt) - 1 :]
        for place in range(len(completion.token_ids)):
            assert_close(seen[str(request.id), len(prompt) + place], wanted[place], request.id)


def test_a_request_without_a_task_fails_alone(gated: tuple[loramux.Handle, Path]):
    _, folder = gated
    with build_engine() as engine:
        engine.add_adapter("gated", folder)
        good = greedy([5, 6, 7], "gated", 3, id="good", task="ask")
        bad = greedy([5, 6, 7], "gated", 3, id="bad")
        done = drive(engine, [good, bad], random.Random(0))
    assert done["good"].finish_reason == "length"
    assert done["bad"].finish_reason == "error" and "no task was named" in done["bad"].error


def test_a_task_is_a_text():
    with pytest.raises(ValueError, match="task must be a text, got 3"):
        Request(prompt="x", task=3)  # type: ignore[arg-type]


def test_a_line_of_a_file_may_name_its_task(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    rows = [{"prompt": "x", "adapter": "a"}, {"prompt": "x", "adapter": "a", "task": "ask"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    bare, named = read_jobs(path, {"a": tmp_path})
    assert bare.task is None and named.request(None).task == "ask"
    assert bare.key != named.key, "its answer depends on it"
