"""Engines over pico models with every variant of every method, and a recorder of the logits they sample from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loramux
from conformance.cases import Maker, Variant, nudge
from loramux.engine.engine import Engine
from loramux.engine.request import Request, SamplingParams
from pico import build_pico

Logits = dict[tuple[str, int], Tensor]  # (request, tokens before it) -> [V]


def save_variants(
    make: Maker, root: Path, variants: Sequence[Variant], family: str
) -> dict[str, Path]:
    """One folder per variant, moved off its start as training would."""
    folders = {}
    for seed, variant in enumerate(variants):
        torch.manual_seed(seed)
        handle = loramux.attach(build_pico(family), make.config(variant, family))
        nudge(handle.adapters["default"], seed)
        folders[variant.name] = handle.save(root / family / variant.name)
    return folders


def build_engine(family: str = "llama", model: nn.Module | None = None, **options: Any) -> Engine:
    given = {
        "kv_memory": "1MiB",
        "max_slots": 256,
        "max_batch": 64,
        "block_size": 4,
        "fuse": True,
        **options,
    }
    return Engine(build_pico(family) if model is None else model, **given)


def record(engine: Engine) -> Logits:
    """Every row of logits that the engine samples from, from now on."""
    seen: Logits = {}
    run = engine._parts.runner.run

    def recorded(plan: Any) -> Any:
        logits, samplers = run(plan)
        for row, sequence in zip(logits, samplers, strict=True):
            seen[sequence.request_id, sequence.num_tokens] = row.clone()
        return logits, samplers

    engine._parts.runner.run = recorded  # type: ignore[method-assign]
    return seen


def greedy(prompt: Sequence[int], adapter: Any = None, tokens: int = 6, **fields: Any) -> Request:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return Request(prompt=list(prompt), adapter=adapter, params=params, **fields)


def random_prompt(draw: random.Random, least: int = 2, most: int = 20) -> list[int]:
    return [draw.randrange(4, 96) for _ in range(draw.randint(least, most))]


def drive(engine: Engine, requests: Sequence[Request], draw: random.Random) -> dict[str, Any]:
    """Run requests that arrive at random steps; returns their first samples by id."""
    waiting, ids, done = list(requests), set(), {}
    while waiting or ids:
        while waiting and (not ids or draw.random() < 0.5):
            ids.add(engine.add_request(waiting.pop(0)))
        engine.step()
        engine.check_integrity()
        for request_id in list(ids):
            found = engine.completion(request_id)
            if found is not None:
                done[request_id] = found[0]
                ids.discard(request_id)
    return done


def dense_logits(
    handle: loramux.Handle, name: str | None, tokens: Sequence[int], first: int
) -> Tensor:
    """Rows [first-1..] of one plain forward over the whole text: what the engine should have sampled from."""
    with torch.no_grad(), handle.batch(adapters=[name], prompt_mask=_prompt(len(tokens), first)):
        return handle.model(input_ids=torch.tensor([list(tokens)])).logits[0, first - 1 :]


def _prompt(total: int, first: int) -> Tensor:
    return (torch.arange(total) < first).unsqueeze(0)


def assert_close(got: Tensor, wanted: Tensor, what: object, tolerance: float = 1e-5) -> None:
    """`tolerance` counts in the largest logit of the row."""
    limit = tolerance * max(1.0, float(wanted.abs().max()))
    off = float((got - wanted).abs().max())
    assert off <= limit, f"{what}: off by {off:.2e}, allowed {limit:.2e}"


def load_all(model: nn.Module, folders: dict[str, Path], check_base: bool = True) -> loramux.Handle:
    """The same adapters on the core, each under its name."""
    (first, folder), *others = folders.items()
    options = {"backend": "reference", "check_base": check_base}
    handle = loramux.load(model, folder, name=first, **options)
    for name, path in others:
        handle.load(path, name=name, check_base=check_base)
    return handle


def assert_like_core(
    handle: loramux.Handle, requests: Sequence[Request], done: dict[str, Any], seen: Logits
) -> None:
    """Every row that was sampled from is that of one plain forward over all of its text."""
    for request in requests:
        completion, prompt = done[str(request.id)], list(request.prompt)
        assert completion.error is None, completion.error
        tokens = completion.token_ids
        wanted = dense_logits(handle, request.adapter, [*prompt, *tokens], len(prompt))
        for place in range(len(tokens)):
            got = seen[str(request.id), len(prompt) + place]
            assert_close(got, wanted[place], (request.adapter, request.id, place))
