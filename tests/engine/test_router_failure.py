"""A router that fails ends its own request, with its reason; whoever shares the step is answered as ever."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest

import loramux
from conformance.cases import Maker, every_variant
from engine.crowd import (
    assert_like_core,
    build_engine,
    greedy,
    load_all,
    random_prompt,
    record,
    save_variants,
)
from engine.helpers import assert_idle, run_all
from loramux.core.router import Router
from pico import build_pico

# A layer's router, a late gate, one of FFN rows and one of single linears: all of them run in torch.
KINDS = ["milora-ste", "mole-prompt", "mixlora-dynamic", "molora-default"]
BAD_LENGTH = 13  # of the prompt that routers stumble over


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("failing")
    chosen = [v for v in every_variant() if v.name in KINDS]
    return save_variants(Maker(root / "experts"), root, chosen, "llama")


@pytest.fixture(scope="module")
def core(folders: dict[str, Path]) -> loramux.Handle:
    return load_all(build_pico("llama"), folders)


@pytest.fixture
def stumbling(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "loramux.engine.latecalls")
    original = Router.__call__

    def call(router: Router, view: Any, *args: Any) -> Any:
        if view.x_ND.shape[0] == BAD_LENGTH:
            raise RuntimeError("thirteen tokens")
        return original(router, view, *args)

    monkeypatch.setattr(Router, "__call__", call)


@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_its_own_request_and_no_other(
    kind: str, folders: dict[str, Path], core: loramux.Handle, stumbling: None
) -> None:
    draw = random.Random(0)
    others = [greedy(random_prompt(draw, 4, 9), name, 4, id=name) for name in folders]
    others.append(greedy(random_prompt(draw, 4, 9), None, 4, id="plain"))
    bad = greedy(random_prompt(draw, BAD_LENGTH, BAD_LENGTH), kind, 4, id="bad")
    with build_engine() as engine:
        for name, folder in folders.items():
            engine.add_adapter(name, folder)
        seen = record(engine)
        done = run_all(engine, [*others[:2], bad, *others[2:]])
        assert_idle(engine)
        (ended,) = done["bad"]
        assert ended.finish_reason == "error" and not ended.token_ids
        assert "failed: thirteen tokens" in str(ended.error)
        assert_like_core(core, others[:-1], {k: v[0] for k, v in done.items()}, seen)
        assert len(done["plain"][0].token_ids) == 4
        # Nothing of it stays: the same prompt, one token longer, is answered.
        again = greedy([*bad.prompt, 7], kind, 3, id="again")
        answers = run_all(engine, [again])
        assert_like_core(core, [again], {"again": answers["again"][0]}, seen)


def test_every_sample_of_the_request_ends(folders: dict[str, Path], stumbling: None) -> None:
    params = loramux.SamplingParams(max_tokens=3, n=3, temperature=1.0, seed=1)
    prompt = random_prompt(random.Random(0), BAD_LENGTH, BAD_LENGTH)
    request = loramux.Request(prompt=prompt, adapter="milora-ste", params=params, id="bad")
    with build_engine() as engine:
        engine.add_adapter("milora-ste", folders["milora-ste"])
        done = run_all(engine, [request])
        assert [ended.finish_reason for ended in done["bad"]] == ["error"] * 3
        assert_idle(engine)
