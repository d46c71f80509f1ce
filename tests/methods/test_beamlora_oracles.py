"""BeamLoRA against the dense restatement: forward, gradients, schedule, what is pruned, and whole events."""

import math

import pytest
import torch

import loramux
from loramux.core.bank import Rows
from loramux.methods.beamlora import merged, top_p_at, weakest
from methods.beamlora_case import IDS, MASK, TAU, Training, attached, gate_at, shared_layers
from methods.bridge import adapter_of, build_double, close, finite_differences
from oracles import beamlora
from oracles.surgery import base_weight

FAMILIES = ["llama", "gpt2", "phi3"]
WIDE = torch.float64


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_the_oracles(family: str) -> None:
    model, handle, _ = attached(family)
    got = model(input_ids=IDS, attention_mask=MASK).logits
    bare = build_double(family).requires_grad_(False)
    expected = beamlora.oracle_logits(bare, IDS, MASK, shared_layers(handle))
    close(got, expected)
    parameters = list(handle.trainable_parameters().values())
    own = torch.autograd.grad(got[MASK.bool()].square().mean(), parameters)
    theirs = torch.autograd.grad(expected[MASK.bool()].square().mean(), parameters)
    for mine, other in zip(own, theirs, strict=True):
        close(mine, other)


def test_gradients_are_those_of_finite_differences() -> None:
    model, handle, _ = attached()
    path = "model.layers.1.self_attn.q_proj"
    rows = adapter_of(handle).rows[path]
    leaves = {"a": rows.a, "logits": gate_at(handle, path).logits}
    finite_differences(
        lambda: model(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()].square().mean(),
        leaves,
    )


def test_at_first_outputs_and_gradients_of_a_and_b_are_those_of_a_lora() -> None:
    """Oracle 1: all scores are 1."""
    found = []
    for config in (
        loramux.BeamLoRAConfig(r=4, lora_alpha=6.0, lora_dropout=0.0),
        loramux.LoraConfig(r=4, lora_alpha=6.0),
    ):
        model = build_double()
        torch.manual_seed(0)
        handle = loramux.attach(model, config, backend="reference")
        draw = torch.Generator().manual_seed(3)
        rows: list[Rows] = list(adapter_of(handle).rows.values())
        for entry in rows:
            entry.b.data = torch.randn(entry.b.shape, generator=draw)
        logits = model(input_ids=IDS, attention_mask=MASK).logits
        pairs = [p for entry in rows for p in (entry.a, entry.b)]
        found.append([logits, *torch.autograd.grad(logits.square().mean(), pairs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_scores_are_positive_sum_to_the_rank_and_know_differences_only() -> None:
    """Oracle 2."""
    _, handle, params = attached()
    for path, layer in params.items():
        gate = gate_at(handle, path)
        scores = gate().detach()
        close(scores, torch.tensor(beamlora.scores(layer.gamma.tolist(), TAU), dtype=WIDE))
        assert bool((scores > 0).all())
        assert float(scores.sum()) == pytest.approx(len(scores), abs=1e-12)
        gate.logits.data += 1.5
        close(gate().detach(), scores, 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_weight_and_the_folded_rows_compute_the_same(family: str) -> None:
    """Oracle 3: W0 + s B diag(g) A, and a LoRA whose A is diag(g) A."""
    model, handle, params = attached(family)
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=MASK).logits
        folded = {path: rows.folded() for path, rows in adapter_of(handle).rows.items()}
        handle.detach()
        for path, layer in params.items():
            module = model.get_submodule(path)
            weight, _ = base_weight(module)
            by_rows = layer.scale * folded[path].b.T @ folded[path].a
            dense = beamlora.merged_weight(weight, layer)
            close(weight + by_rows, dense)
            module.weight.data = dense if weight is module.weight else dense.T.contiguous()
        close(model(input_ids=IDS, attention_mask=MASK).logits, expected)


def test_the_threshold_rises_from_its_start_to_one() -> None:
    """Oracle 4, with the values of the published run."""
    end = 24_688
    known = {3000: 0.9518, 6000: 0.9569, 12_000: 0.9739, 18_000: 0.9915, 24_000: 0.9999}
    for step, value in known.items():
        assert round(top_p_at(step, 0.95, end), 4) == value
    values = [top_p_at(step, 0.95, end) for step in range(0, end + 500, 100)]
    assert values == sorted(values)
    assert values[0] == 0.95 and top_p_at(end, 0.95, end) == top_p_at(end + 1, 0.95, end) == 1
    for step in (0, 1, 77, 24_687, 24_688, 30_000):
        assert top_p_at(step, 0.9, end) == pytest.approx(beamlora.threshold(step, 0.9, end))


def test_ranks_are_chosen_over_all_sites_together() -> None:
    """Oracle 6, by hand."""
    scores = {
        "one": torch.tensor([1.9, 0.1], dtype=WIDE),
        "two": torch.tensor([1.2, 0.8], dtype=WIDE),
    }
    assert weakest(scores, 0.95, "global") == {"one": [1], "two": [1]}
    assert weakest(scores, 0.98, "global") == {"one": [1]}
    # Sums per site are 2: 1.9 reaches 1.9 but does not exceed it, 1.2 does not.
    assert weakest(scores, 0.95, "site") == {"one": [1], "two": [1]}
    assert weakest(scores, 0.94, "site") == {"one": [1], "two": [1]}


def test_a_site_keeps_at_least_half_of_its_ranks_the_best_of_those_that_would_go() -> None:
    scores = {"weak": torch.tensor([0.3, 0.1, 0.2, 0.25]), "strong": torch.tensor([3.0, 1.0, 2.0])}
    assert weakest(scores, 0.7, "global") == {"weak": [1, 2], "strong": [1]}


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_oracles_on_random_scores(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = {
        f"site {i}": torch.rand(2 + i % 5, generator=draw, dtype=torch.float64).exp()
        for i in range(7)
    }
    scores = {path: len(own) * own / own.sum() for path, own in scores.items()}
    lists = {path: own.tolist() for path, own in scores.items()}
    for p in (0.6, 0.9, 0.95, 0.99):
        want = {path: sorted(own) for path, own in beamlora.pruned(lists, p).items() if own}
        assert weakest(scores, p, "global") == want


def test_merging_by_score_keeps_the_sum_and_all_other_scores() -> None:
    """Oracle 8, with the page's example: 0.4 and 0.1 become 0.25 each."""
    tau = torch.tensor(0.05, dtype=WIDE)
    share = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=WIDE)
    logits = tau * share.log() + 0.7
    for how in ("prob", "logit"):
        both = merged(logits[:2], tau, how)  # type: ignore[arg-type]
        want = beamlora.merge(float(logits[0]), float(logits[1]), float(tau), how)
        assert float(both) == pytest.approx(want, abs=1e-12)
        after = torch.cat([both.repeat(2), logits[2:]])
        new = (after / tau).softmax(0)
        if how == "prob":
            torch.testing.assert_close(
                new[:2], torch.full((2,), 0.25, dtype=WIDE), rtol=0, atol=1e-12
            )
            torch.testing.assert_close(new[2:], share[2:], rtol=0, atol=1e-12)
        else:
            assert both == logits[:2].mean()
            assert not math.isclose(float(new[:2].sum()), 0.5, abs_tol=1e-3)


@pytest.mark.parametrize("how", ["prob", "logit"])
@pytest.mark.parametrize("step", [4, 8, 16])
def test_an_event_is_the_oracles(how: str, step: int) -> None:
    """Everything that belongs to a rank (A, B, four moments) moves as the page says, from half an interval ago."""
    run = Training(score_merge=how, top_p=0.8)
    run.advance(step - 2)
    before = run.ranks()
    run.advance(1)
    run.learn()
    logits = {path: gate.logits.tolist() for path, gate in run.gates().items()}
    now = run.ranks()
    edits = run.control()
    state = {path: beamlora.Ranks(logits[path], now[path], before[path]) for path in now}
    pairs = {e["site"]: list(zip(e["copied"], e["pruned"], strict=True)) for e in edits}
    assert sum(len(own) for own in pairs.values()) >= 3
    p = beamlora.threshold(step, 0.8, 32)
    want = beamlora.event(state, p, TAU, pairs, how)
    got = run.ranks()
    for path, ranks in want.items():
        assert got[path] == ranks.rank
        own = run.gates()[path].logits.tolist()
        assert own == pytest.approx(ranks.gamma, abs=1e-6)
    assert all(e["top_p"] == pytest.approx(p) for e in edits)
