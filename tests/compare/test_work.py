"""What an item really does: equal tokens, scores of every row, parameters that act, a process of its own."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from compare.small import suite
from loramux.compare.measure import active_parameters, decode_cost
from loramux.compare.plan import Item, make_plan
from loramux.compare.processes import ItemError, Processes
from loramux.compare.run import run_suite
from loramux.compare.work import carry_out
from pico import build_pico

WAYS = ["base", "each", "oracle", "linear", "cat", "svd", "ties", "dare_linear", "loralego", "mole"]


def here(item: Item, folder: Path, needs: Any, limit: float | None) -> dict[str, Any]:
    """Does an item in this process."""
    folders = {need: path / "run" for need, path in needs.items()}
    return json.loads(json.dumps(carry_out(item.work, folder / "run", folders)))


def test_every_method_is_trained_on_the_planned_tokens_and_scored_row_by_row(
    tmp_path: Path,
) -> None:
    checked = suite(tmp_path)
    items = make_plan(checked).items
    assert len({item.tokens for item in items}) == 1
    result = run_suite(checked, tmp_path / "out", progress=False, carry_out=here)
    assert result["failed"] == []
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert {row["tokens"] for row in rows} == {items[0].tokens}
    for row in rows:
        assert row["steps"] == 2
        for one in row["scores"].values():
            assert len(one["rows"]) == 8
            assert one["value"] == pytest.approx(one["rows"].count("1") / 8)
        assert row["trainable"] == row["trainable_at_end"] >= row["active"]
        kept = tmp_path / "out" / "work" / row["id"] / "run"
        assert (kept / "adapter").is_dir()
        assert not (kept / "checkpoints").exists()


def test_a_training_that_saw_other_tokens_is_no_result(tmp_path: Path) -> None:
    item = make_plan(suite(tmp_path)).items[0]
    work = {**item.work, "tokens": item.tokens + 1}
    with pytest.raises(ValueError, match=r"after \d+ tokens and not after the \d+"):
        carry_out(work, tmp_path / "out", {})


def test_adapters_are_put_together_and_the_oracle_is_the_single_trainings(tmp_path: Path) -> None:
    fusion = {"adapters": "lora", "methods": WAYS, "rows": 4, "steps": 1, "learning_rate": 0.01}
    methods = {"lora": {"method": {"name": "lora", "r": 2}}}
    single = {"steps": 1}
    checked = suite(tmp_path, methods=methods, multi=None, single=single, fusion=fusion)
    result = run_suite(checked, tmp_path / "out", progress=False, carry_out=here)
    assert result["failed"] == []
    entries = {entry["method"]: entry for entry in result["parts"]["fusion"]["methods"]}
    assert list(entries) == [*WAYS[:1], "only-one", "only-two", *WAYS[2:]]
    (alone,) = result["parts"]["single"]["methods"]
    assert entries["oracle"]["mean"] == alone["mean"]
    assert entries["linear"]["servability"] == "static"
    assert entries["mole"]["servability"] == "per_token"
    assert entries["cat"]["parameters"] == 2 * entries["only-one"]["parameters"]
    assert result["parts"]["fusion"]["reference"] == "oracle"


def active(config: Any) -> tuple[float, Any]:
    model = build_pico("llama")
    handle = loramux.attach(model, config)
    (adapter,) = handle.adapters.values()
    with torch.no_grad():
        model(torch.arange(4, 20)[None])
    return active_parameters(adapter, handle.routing()), adapter


def test_without_a_router_every_parameter_acts() -> None:
    for config in (loramux.LoraConfig(r=4), loramux.LoraConfig(r=4, use_dora=True)):
        found, adapter = active(config)
        assert found == sum(p.numel() for p in adapter.parameters())


def test_of_a_mixture_the_chosen_experts_act_and_the_routers_always() -> None:
    config = loramux.MixLoRAConfig(r=4, num_experts=4, top_k=2)
    found, adapter = active(config)
    total = sum(p.numel() for p in adapter.routers_by_key.parameters())
    for path, site in adapter.sites.items():
        num = 2 if site.kind == "ffn" else 1
        total += num * 4 * (site.d_in + site.d_out)
        assert path in adapter.rows
    assert found == pytest.approx(total)


def test_of_gated_modules_those_that_are_on_act() -> None:
    found, adapter = active(loramux.MiLoRAConfig(r=4, top_k=3, router_init_range=1.0))
    routers = sum(p.numel() for p in adapter.routers_by_key.parameters())
    sizes = sorted(4 * (s.d_in + s.d_out) for s in adapter.sites.values() if s.layer == 0)
    assert routers + 2 * sum(sizes[:3]) <= found <= routers + 2 * sum(sizes[-3:])


def test_decoding_costs_about_as_much_as_itself() -> None:
    model = build_pico("llama")
    found = decode_cost(model, model, rounds=7)
    assert found is not None
    assert 0.3 < found["low"] <= found["value"] <= found["high"] < 3
    assert decode_cost(model, model, rounds=0) is None


def test_an_item_has_a_process_of_its_own_and_a_crash_costs_only_its_row(tmp_path: Path) -> None:
    item = make_plan(suite(tmp_path)).items[0]
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        folder.mkdir()
    with Processes() as processes:
        found = processes(item, good, {}, None)
        assert found["tokens"] == item.tokens
        assert found["peak_mb"] > 0
        other = {**item.work, "kind": "nonsense"}
        with pytest.raises(ItemError, match="KeyError: 'nonsense'"):
            processes(Item(**{**vars(item), "work": other}), bad, {}, None)
        with pytest.raises(ItemError, match="limit_minutes"):
            processes(item, bad, {}, 0.01)


def test_a_signal_is_named_as_the_reason(tmp_path: Path) -> None:
    from loramux.compare.processes import _reason

    assert "SIGKILL, perhaps for want of memory" in _reason(-signal.SIGKILL, tmp_path)
