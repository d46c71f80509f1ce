"""Ablation scores: the naive double loop's numbers, for fewer layers, and nothing of the model is changed."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import loramux
from conformance.cases import nudge
from loramux.core.ablation import (
    Scores,
    Unit,
    ablation_scores,
    can_reuse_prefix,
    module_units,
    rank_units,
)
from loramux.core.estimates import output_norm_scores, sensitivity_scores, taylor_scores
from methods.alora_case import attached, base_of, batch_of, oracle_batch
from methods.bridge import adapter_of
from oracles import alora
from pico import build_pico, pico_config
from train.toys import examples

FAMILIES = ("llama", "gemma3", "phi3", "gpt2")
SHARED = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
SHARING: dict[str, dict[str, Any]] = {
    "gemma3n": {
        "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2, "altup_active_idx": 0,
    },
    "gemma4": {"global_head_dim": 8},
}  # fmt: skip
SCORERS = {
    "ablation": ablation_scores,
    "taylor": taylor_scores,
    "sensitivity": sensitivity_scores,
    "output_norm": output_norm_scores,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [1, 10_000])
def test_scores_are_those_of_the_naive_double_loop(family: str, budget: int) -> None:
    _, handle, params = attached(family)
    batch = batch_of(examples(3, seed=2))
    units = rank_units(adapter_of(handle))
    scores = ablation_scores(handle, batch, units, tokens_per_forward=budget)
    naive = alora.importance(base_of(family), oracle_batch(batch), params)
    for u, unit in enumerate(units):
        removal, alone = naive[unit.path, unit.rows[0]]
        assert abs(float(scores.removal[u]) - removal) < 1e-5
        assert abs(float(scores.alone[u]) - alone) < 1e-5
    assert scores.importance.std() > 1e-2, "equal scores would be compared with equal scores"


def test_a_unit_may_be_a_whole_linear() -> None:
    _, handle, params = attached()
    batch = batch_of(examples(3, seed=2))
    units = module_units(adapter_of(handle))
    scores = ablation_scores(handle, batch, units)
    base, rows = base_of(), oracle_batch(batch)
    for u, unit in enumerate(units):
        off, on = alora.all_gates(params, 1.0), alora.all_gates(params, 0.0)
        off[unit.path][:], on[unit.path][:] = 0.0, 1.0
        assert abs(float(scores.without[u]) - alora.score(base, rows, params, off)) < 1e-5
        assert abs(float(scores.alone[u]) - alora.score(base, rows, params, on)) < 1e-5


def test_several_batches_weigh_by_their_tokens() -> None:
    _, handle, _ = attached()
    rows = examples(7, seed=3)
    units = rank_units(adapter_of(handle))[::5]
    whole = ablation_scores(handle, batch_of(rows), units)
    parts = [ablation_scores(handle, batch_of(some), units) for some in (rows[:2], rows[2:])]
    mean = Scores.mean(parts)
    assert mean.num_tokens == whole.num_tokens
    torch.testing.assert_close(mean.importance, whole.importance, atol=1e-5, rtol=0)
    assert abs(mean.full - whole.full) < 1e-5
    assert abs(mean.base - whole.base) < 1e-5


def sharing(family: str) -> nn.Module:
    """Four layers, the last two of which take keys and values from the ones below."""
    base = pico_config("gemma3")
    same = {
        name: getattr(base, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim",
            "num_key_value_heads", "sliding_window", "pad_token_id", "eos_token_id", "bos_token_id",
        )
    }  # fmt: skip
    config = AutoConfig.for_model(f"{family}_text", **same, **SHARED, **SHARING[family])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_a_model_that_hands_on_more_than_hidden_states_is_run_whole(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = sharing(family)
    handle = loramux.attach(model, loramux.LoraConfig(r=2), backend="reference")
    adapter = adapter_of(handle)
    nudge(adapter, 1)
    batch = batch_of(examples(3, seed=2))
    units = rank_units(adapter)[::9]
    before = everything(handle)
    scores = ablation_scores(handle, batch, units)
    assert caplog.text.count("cannot go on from recorded hidden states") == 1
    for name, value in everything(handle).items():
        assert equal(before[name], value), name
    for u, unit in enumerate(units):
        off = {p: torch.ones(3, r.spans.num_rows) for p, r in adapter.rows.items()}
        on = {p: torch.zeros(3, r.spans.num_rows) for p, r in adapter.rows.items()}
        off[unit.path][:, list(unit.rows)], on[unit.path][:, list(unit.rows)] = 0.0, 1.0
        for masks, found in ((off, scores.without[u]), (on, scores.alone[u])):
            with torch.no_grad(), handle.masking(masks):
                loss = model(**batch).loss
            assert abs(float(loss) + float(found)) < 1e-5
    assert scores.importance.std() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_of_one_residual_stream_go_on_from_it(family: str) -> None:
    _, handle, _ = attached(family)
    assert can_reuse_prefix(handle, batch_of(examples(3, seed=2)))


@pytest.mark.parametrize("budget", [1, 10_000])
def test_fewer_layers_run_than_in_the_naive_loop(budget: int) -> None:
    layers = 12
    _, handle, _ = attached(num_hidden_layers=layers)
    batch = batch_of(examples(2, seed=2))
    units = rank_units(adapter_of(handle))[:: 1 if budget > 1 else 5]
    ran: Counter[int] = Counter()
    for place, layer in enumerate(handle.model.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda _, args, place=place: ran.update({place: args[0].shape[0] // 2})
        )
    scores = ablation_scores(handle, batch, units, tokens_per_forward=budget)
    naive = layers * (2 * len(units) + 1)
    assert scores.naive_layer_runs == naive
    assert scores.layer_runs == sum(ran.values())
    assert sum(ran.values()) < 0.58 * naive
    assert ran[0] < ran[layers - 1]


def test_a_unit_without_effect_is_not_run_and_scores_the_base_exactly() -> None:
    _, handle, _ = attached()
    adapter = adapter_of(handle)
    batch = batch_of(examples(3))
    with torch.no_grad():
        for rows in adapter.rows.values():
            rows.b.zero_()
    units = rank_units(adapter)
    scores = ablation_scores(handle, batch, units)
    assert scores.layer_runs == 2 * 2
    assert set(scores.importance.tolist()) == {scores.base}


def everything(handle: loramux.Handle) -> dict[str, Any]:
    return {
        "weights": {n: p.detach().clone() for n, p in handle.model.named_parameters()},
        "grads": [p.grad for p in handle.model.parameters()],
        "flags": [p.requires_grad for p in handle.model.parameters()],
        "ids": [id(p) for p in handle.model.parameters()],
        "modes": {n: m.training for n, m in handle.model.named_modules()},
        "forwards": [n for n, m in handle.model.named_modules() if "forward" in vars(m)],
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in handle.model.modules()
        ],
        "rng": torch.get_rng_state(),
        "active": handle.dispatch.active,
        "last": handle.dispatch.last,
    }


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    return bool(one is two or one == two)


@pytest.mark.parametrize("scorer", SCORERS)
def test_scoring_changes_nothing_and_repeats(scorer: str) -> None:
    _, handle, _ = attached()
    handle.model.train()
    handle.model.model.layers[1].eval()
    batch = batch_of(examples(3))
    handle.model(input_ids=batch["input_ids"])
    units = rank_units(adapter_of(handle))
    before = everything(handle)
    first = SCORERS[scorer](handle, batch, units)
    for name, value in everything(handle).items():
        assert equal(before[name], value), name
    second = SCORERS[scorer](handle, batch, units)
    assert torch.equal(first.importance, second.importance)


def test_a_scorer_that_breaks_off_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    _, handle, _ = attached()
    batch = batch_of(examples(3))
    units = rank_units(adapter_of(handle))
    before = everything(handle)
    head = handle.model.lm_head
    calls = 0

    def fail(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("out of memory")
        return nn.functional.linear(x, head.weight)

    monkeypatch.setattr(head, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        ablation_scores(handle, batch, units, tokens_per_forward=1)
    monkeypatch.undo()
    for name, value in everything(handle).items():
        assert equal(before[name], value), name


def test_only_the_named_adapter_is_scored() -> None:
    _, handle, _ = attached()
    batch = batch_of(examples(3))
    units = rank_units(adapter_of(handle))
    alone = ablation_scores(handle, batch, units)
    handle.add(loramux.LoraConfig(r=2), name="other")
    handle.use("other")
    assert torch.equal(
        ablation_scores(handle, batch, units, "default").importance, alone.importance
    )
    assert handle.dispatch.active == "other"


def test_what_cannot_be_scored_is_refused() -> None:
    batch = batch_of(examples(2))
    for config, message in (
        (loramux.MiLoRAConfig(r=2), "has routers"),
        (loramux.LoraConfig(r=2, use_dora=True), "DoRA"),
    ):
        handle = loramux.attach(build_pico("llama"), config)
        units = [Unit(next(iter(handle.sites)), (0,))]
        for scorer in SCORERS.values():
            with pytest.raises(ValueError, match=message):
                scorer(handle, batch, units)
    _, handle, _ = attached()
    packed = {**batch, "segment_ids": torch.zeros_like(batch["input_ids"])}
    with pytest.raises(ValueError, match="without packing"):
        ablation_scores(handle, packed, rank_units(adapter_of(handle)))


# -- estimates -------------------------------------------------------------------------------------


def slope(handle: loramux.Handle, batch: dict[str, Tensor], unit: Unit, at: float) -> float:
    """dS/dc by central differences, all other gates at `at` too."""
    step, found = 1e-3, []
    num = batch["input_ids"].shape[0]
    rows = adapter_of(handle).rows
    for c in (at + step, at - step):
        masks = {p: torch.full((num, r.spans.num_rows), at) for p, r in rows.items()}
        masks[unit.path][:, list(unit.rows)] = c
        with torch.no_grad(), handle.masking(masks):
            logits = handle.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        log_probs = logits[:, :-1].double().log_softmax(-1)
        target = batch["labels"][:, 1:]
        chosen = log_probs.gather(-1, target.clamp_min(0).unsqueeze(-1))[..., 0]
        found.append(float(chosen[target != -100].mean()))
    return (found[0] - found[1]) / (2 * step)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_taylor_is_the_slope_at_all_gates_one_and_at_all_gates_zero(family: str) -> None:
    _, handle, _ = attached(family)
    batch = batch_of(examples(3, seed=4))
    adapter = adapter_of(handle)
    units = [*rank_units(adapter)[::7], *module_units(adapter)[::3]]
    scores = taylor_scores(handle, batch, units)
    exact = ablation_scores(handle, batch, units[:1])
    assert abs(scores.full - exact.full) < 1e-6
    assert abs(scores.base - exact.base) < 1e-6
    for u, unit in enumerate(units):
        assert abs(float(scores.removal[u]) - slope(handle, batch, unit, 1.0)) < 2e-3
        assert abs(float(scores.alone[u]) - scores.base - slope(handle, batch, unit, 0.0)) < 2e-3


def test_sensitivity_and_output_norm_are_their_definitions() -> None:
    _, handle, params = attached()
    batch = batch_of(examples(3, seed=4))
    adapter = adapter_of(handle)
    units = module_units(adapter)
    sensitivity = sensitivity_scores(handle, batch, units).importance
    norms = output_norm_scores(handle, batch, units).importance
    relative = output_norm_scores(handle, batch, units, relative=True).importance
    seen: dict[str, Tensor] = {}
    for path, linear in handle.linears.items():
        linear.register_forward_pre_hook(lambda _, args, p=path: seen.update({p: args[0]}))
    labels = batch["labels"]
    call = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = handle.model(**call).logits[:, :-1]
    target = labels[:, 1:]
    nn.functional.cross_entropy(logits[target != -100], target[target != -100]).backward()
    real = batch["attention_mask"].bool()
    for u, unit in enumerate(units):
        rows, expert = adapter.rows[unit.path], params[unit.path]
        total = sum(float((w.detach() * w.grad).abs().double().sum()) for w in (rows.a, rows.b))
        assert abs(float(sensitivity[u]) - total) < 1e-4
        x = seen[unit.path][real].detach()
        change = (x @ expert.A.T @ expert.B.T).double().square().sum(-1)
        base = (x @ handle.linears[unit.path].weight_OI().T).double().square().sum(-1)
        torch.testing.assert_close(norms[u], change.mean(), atol=0, rtol=1e-5)
        torch.testing.assert_close(relative[u], (change / base).mean(), atol=0, rtol=1e-5)
