"""What an item really does: equal tokens, scores of every row, parameters that act, a process of its own."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import loramux
from compare.small import raw_suite, suite
from loramux.compare.measure import Usage, active_parameters, decode_cost
from loramux.compare.plan import Item, make_plan
from loramux.compare.processes import ItemError, Processes
from loramux.compare.run import run_suite
from loramux.compare.tables import markdown
from loramux.compare.ways import ways
from loramux.compare.work import carry_out
from loramux.data import encode, load_examples
from loramux.recipe import DataSource
from pico import build_pico, pico_tokenizer

LEARNED = ("mole", "loraflow", "xlora")


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
    chosen: dict[str, Any] = {name: {} for name in ways()}
    chosen["lorahub"] = {"budget": 3}
    chosen["task_arithmetic"] = {"lam": 0.5}
    chosen["loraflow"] = {"init": "anchor:two", "training": {"learning_rate": 0.02}}
    fusion = {"adapters": "lora", "methods": chosen, "rows": 4, "steps": 1, "learning_rate": 0.01}
    result = fused(tmp_path, fusion, seeds=[0, 1])
    assert result["failed"] == []
    entries = {entry["method"]: entry for entry in result["parts"]["fusion"]["methods"]}
    assert list(entries) == ["base", "only-one", "only-two", *list(ways())[2:]]
    assert {"mean", "lorahub", "arrow", "dare_ties", *LEARNED} < set(entries)
    assert len({entries[name]["tokens"] for name in LEARNED}) == 1
    (alone,) = result["parts"]["single"]["methods"]
    assert entries["oracle"]["mean"] == alone["mean"]
    assert entries["linear"]["servability"] == "static"
    assert entries["mole"]["servability"] == "per_token"
    assert entries["cat"]["parameters"] == 2 * entries["only-one"]["parameters"]
    assert result["parts"]["fusion"]["reference"] == "oracle"
    for entry in entries.values():  # of the bare base too, which has one row
        assert entry["seeds"] == [0, 1]
    assert entries["base"]["difference"]["seeds"] == 2
    for measure in ("train_seconds", "peak_mb", "active", "parameters"):
        assert entries["oracle"][measure] == alone[measure]
    assert entries["lorahub"]["search_tokens"] == 3 * tokens_of_rows(tmp_path, 4)
    assert f"lorahub read {entries['lorahub']['search_tokens']:,.0f} tokens" in markdown(result)
    rows = (json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines())
    (flow, _) = [row for row in rows if row["method"] == "loraflow"]
    saved = tmp_path / "out" / "work" / flow["id"] / "run" / "adapter"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    (adapter,) = loramux.load(model, saved).adapters.values()
    assert adapter.method.config.names == ("one", "two")


def tokens_of_rows(folder: Path, num: int) -> int:
    tokenizer = pico_tokenizer()
    sources = [DataSource(path=str(folder / t / "train.jsonl"), rows=num) for t in ("one", "two")]
    return sum(len(one) for source in sources for one in load_examples(source, tokenizer))


def fused(folder: Path, fusion: dict[str, Any], **changes: Any) -> dict[str, Any]:
    methods = {"lora": {"method": {"name": "lora", "r": 2}}}
    changes = {"methods": methods, "multi": None, "single": {"steps": 1}} | changes
    checked = suite(folder, fusion=fusion, **changes)
    return run_suite(checked, folder / "out", progress=False, carry_out=here)


def test_a_search_that_finds_nothing_is_scored_as_the_base(tmp_path: Path) -> None:
    fusion = {"adapters": "lora", "methods": {"base": {}, "lorahub": {"budget": 1}}}
    result = fused(tmp_path, fusion)
    assert result["failed"] == []
    base, _, found = result["parts"]["fusion"]["methods"]
    assert (base["tasks"], base["mean"]) == (found["tasks"], found["mean"])
    assert "lorahub: scored as the base: the search over 1 evaluations" in markdown(result)


def test_a_search_reads_no_row_that_training_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_suite(tmp_path)
    for task in ("one", "two"):  # one file, split by row numbers: test rows first
        (tmp_path / f"{task}.jsonl").write_text((tmp_path / task / "train.jsonl").read_text())
    tasks = {
        task: {
            "train": {"path": str(tmp_path / f"{task}.jsonl"), "skip": 6, "rows": 2},
            "test": {"path": str(tmp_path / f"{task}.jsonl"), "rows": 6},
        }
        for task in ("one", "two")
    }
    read: list[DataSource] = []
    load = encode.load_examples

    def noted(source: DataSource, *rest: Any) -> Any:
        read.append(source)
        return load(source, *rest)

    monkeypatch.setattr("loramux.data.load_examples", noted)
    fusion = {"adapters": "lora", "methods": {"lorahub": {"budget": 2}}, "rows": 50}
    assert fused(tmp_path, fusion, tasks=tasks)["failed"] == []
    assert len(read) >= 6  # two trainings, the count, the search
    assert {(source.skip, source.rows) for source in read} == {(6, 2)}


def active(config: Any, model: Any = None) -> tuple[float, Any]:
    model = build_pico("llama") if model is None else model
    handle = loramux.attach(model, config)
    (adapter,) = handle.adapters.values()
    with torch.no_grad():
        model(torch.arange(4, 20)[None])
    usage = Usage()
    usage.add(handle.routing())
    return active_parameters(adapter, usage), adapter


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


def test_all_passes_count_and_not_the_last_one(tmp_path: Path) -> None:
    model = build_pico("llama")
    handle = loramux.attach(model, loramux.MixLoRAConfig(r=4, num_experts=4, top_k=1))
    (adapter,) = handle.adapters.values()
    usage, nums = Usage(), [16, 4]
    chosen: dict[str, torch.Tensor] = {}
    with torch.no_grad(), usage.watching(model, handle):
        for num in nums:
            model(torch.arange(4, 4 + num)[None])
            for record in handle.routing():
                sums = (record.gates != 0).sum(0).double()
                chosen[record.path] = chosen.get(record.path, 0) + sums
    model(torch.arange(4, 30)[None])  # nobody watches
    assert set(usage.by_path) == set(chosen)
    for path, used in usage.by_path.items():
        assert used.num == sum(nums)
        assert used.shares == (chosen[path] / sum(nums)).tolist()
    total = active_parameters(adapter, usage)
    assert total < sum(p.numel() for p in adapter.parameters())


def test_a_router_elsewhere_counts_for_the_sites_it_governs(tmp_path: Path) -> None:
    model = build_pico("llama")
    folders = []
    for at in range(3):
        handle = loramux.attach(model, loramux.LoraConfig(r=2), name="a")
        for rows in handle.adapters["a"].rows.values():
            torch.nn.init.normal_(rows.b)
        handle.save(tmp_path / str(at))
        folders.append(str(tmp_path / str(at)))
        handle.detach()
    config = {"name": "xlora", "adapters": folders, "top_k_lora": 1}
    found, adapter = active(loramux.config_from_dict(config), model)
    routers = sum(p.numel() for p in adapter.routers_by_key.parameters())
    assert found == pytest.approx(
        routers + sum(2 * (s.d_in + s.d_out) for s in adapter.sites.values())
    )


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
