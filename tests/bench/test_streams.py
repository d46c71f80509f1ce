"""An engine's batch is measured in the state that its row claims, and leaves nothing behind."""

import pytest

from bench.fake_engine import FakeEngine
from loramux.bench.residency import Rotating
from loramux.bench.streams import Batch, Decoding, Prompting, drain, kv_mib
from pico import pico_config

BATCH = Batch(("a", "b", None), length=40, vocab=50)


def test_the_same_draw_gives_the_same_prompts_and_another_one_others():
    first = BATCH.prompts()
    assert first == BATCH.prompts() != BATCH.prompts(1)
    assert [len(prompt) for prompt in first] == [40] * 3
    assert len({tuple(prompt) for prompt in first}) == 3
    assert all(0 <= token < 50 for prompt in first for token in prompt)


def test_only_the_wanted_steps_are_timed_and_the_batch_starts_again_in_time():
    engine = FakeEngine()
    measure = Decoding(engine, BATCH, steps=3, warm=2, restart_every=2)
    for call in range(1, 6):
        assert measure() >= 0
        restarts = (call + 1) // 2
        assert engine.added == 3 * restarts
        assert engine.steps == 5 * call + restarts  # each restart: one step until all decode
    assert len(engine.running) == 3 and not engine.done


def test_the_context_is_on_average_that_of_a_cache_which_is_cut_back_to_the_prompt():
    engine = FakeEngine()
    measure = Decoding(engine, BATCH, steps=3, warm=2, restart_every=4)
    contexts = []
    for _ in range(8):
        measure()
        prompt = len(engine.requests[measure.ids[0]].prompt)
        generated = engine.running[0][1]
        contexts += [
            prompt + generated - back for back in (3, 2, 1)
        ]  # when the last three were drawn
    cut_back = [40 + i + 1 for i in (2, 3, 4)]  # two steps warm up, three are timed
    assert sum(contexts) / len(contexts) == pytest.approx(sum(cut_back) / 3, abs=1)


def test_every_request_names_its_adapter_and_belongs_to_a_tenant_of_its_own():
    engine = FakeEngine()
    Decoding(engine, BATCH, steps=1)()
    assert [r.adapter for r in engine.requests.values()] == ["a", "b", None]
    assert len({r.tenant for r in engine.requests.values()}) == 3
    assert all(r.params.ignore_eos and r.params.is_greedy for r in engine.requests.values())


def test_a_step_that_left_a_request_out_is_not_a_measurement():
    measure = Decoding(FakeEngine(loses=4), BATCH, steps=3, warm=1)
    with pytest.raises(RuntimeError, match="gave 8 tokens, not 9"):
        measure()


def test_a_request_that_fails_ends_the_measurement_with_its_error():
    measure = Decoding(FakeEngine(fails={"r1"}), BATCH, steps=2)
    with pytest.raises(RuntimeError, match="r1.*not numbers"):
        measure()


def test_stopping_aborts_what_runs_and_takes_the_completions():
    engine = FakeEngine()
    measure = Decoding(engine, BATCH, steps=1)
    measure()
    measure.stop()
    assert engine.aborted == ["r0", "r1", "r2"]
    assert not engine.has_work() and not engine.done


def test_prompts_are_other_ones_in_every_round_and_bring_one_token_each():
    engine = FakeEngine(max_batch=2)
    measure = Prompting(engine, BATCH)
    measure()
    measure()
    prompts = [tuple(request.prompt) for request in engine.requests.values()]
    assert len(set(prompts)) == 6
    assert {request.params.max_tokens for request in engine.requests.values()} == {1}
    assert engine.steps == 4 and not engine.done  # two steps a round: three prompts, two at a time


def test_resident_adapters_take_turns_and_the_engine_is_left_empty():
    engine = FakeEngine()
    batch = Batch((None,) * 4, 20, 50)
    measure = Rotating(engine, ["a", "b", "c"], 2, batch, steps=1)
    for _ in range(3):
        measure()
        assert not engine.has_work() and not engine.done
    asked = [request.adapter for request in engine.requests.values()]
    assert asked == ["a", "b", "a", "b", "c", "a", "c", "a", "b", "c", "b", "c"]


def test_draining_gives_up_on_an_engine_that_never_ends(monkeypatch):
    monkeypatch.setattr("loramux.bench.streams.ENDLESS", 10)
    engine = FakeEngine()
    Decoding(engine, BATCH, steps=1)()
    with pytest.raises(RuntimeError, match="still had work after 10 steps"):
        drain(engine)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_kv_budget_covers_what_is_asked_for(family):
    config = pico_config(family)
    tokens = 1_000_000
    needed = tokens * config.num_hidden_layers * config.num_key_value_heads * 8 * 2 * 2
    assert kv_mib(config, tokens) * 2**20 > 1.4 * needed
