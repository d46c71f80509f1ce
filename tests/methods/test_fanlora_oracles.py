"""The ten test oracles of FanLoRA's page. The scores are a reconstruction, so the tests say what ours are."""

from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import loramux
from conformance.cases import nudge
from loramux.core.linear import LoraLinear
from loramux.core.placement import MODULE_SCORERS, Setting, choose, make_setting
from loramux.methods.fanlora import FanLoRAConfig, read_setting
from methods.alora_case import logits_of
from methods.bridge import adapter_of, close, copy_lora
from methods.fanlora_case import (
    LLAMA,
    RANK,
    batches_of,
    dense,
    handmade,
    in_peft,
    placed,
    planted,
    probe,
    setting_file,
)
from oracles import fanlora
from oracles.lora import oracle_logits
from pico import build_pico

CHOICES = [
    [["self_attn.v_proj", "mlp.down_proj"], ["self_attn.q_proj", "mlp.gate_proj"]],
    [["mlp.up_proj", "mlp.down_proj"], ["self_attn.o_proj", "self_attn.k_proj"]],
]


def paths_of(choice: list[list[str]]) -> list[str]:
    return [f"model.layers.{n}.{name}" for n, names in enumerate(choice) for name in names]


def test_oracle_1_keeping_every_linear_is_pefts_lora_on_all(tmp_path: Path) -> None:
    setting = handmade(tmp_path / "setting.json", [LLAMA, LLAMA], n_keep=7)
    model, handle = placed(setting)
    assert all(all(layer.values()) for layer in read_setting(str(setting)).mask())
    batch = batches_of(3)[0]
    close(logits_of(model, batch), logits_of(in_peft(handle, LLAMA), batch))


@pytest.mark.parametrize("choice", CHOICES)
def test_oracle_2_any_mask_is_pefts_lora_with_these_targets(
    choice: list[list[str]], tmp_path: Path
) -> None:
    model, handle = placed(handmade(tmp_path / "setting.json", choice))
    targets = paths_of(choice)
    assert sorted(adapter_of(handle).rows) == sorted(targets)
    batch = batches_of(3)[0]
    close(logits_of(model, batch), logits_of(in_peft(handle, targets), batch))
    folder = handle.save(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(build_pico("llama"), str(folder)).eval()
    close(logits_of(model, batch), logits_of(loaded, batch))
    shapes = {path: (site.d_in, site.d_out) for path, site in handle.sites.items()}
    count = sum(p.numel() for p in handle.trainable_parameters().values())
    assert count == fanlora.parameters(shapes, set(targets), RANK)


def test_oracle_2_matching_a_budget_takes_the_largest_rank_that_fits(tmp_path: Path) -> None:
    setting = handmade(tmp_path / "setting.json", CHOICES[0])
    _, handle = placed(setting, match_r=RANK)
    everywhere = loramux.attach(build_pico("llama"), FanLoRAConfig(r=RANK))
    budget = sum(p.numel() for p in everywhere.trainable_parameters().values())
    kept = [handle.sites[path] for path in adapter_of(handle).rows]
    (rank,) = {rows.spans.rank[0] for rows in adapter_of(handle).rows.values()}
    used = sum(rank * (site.d_in + site.d_out) for site in kept)
    assert used <= budget < used + sum(site.d_in + site.d_out for site in kept)
    assert {rows.spans.scale[0] for rows in adapter_of(handle).rows.values()} == {1.0}
    _, same = placed(setting, budget=budget)
    assert {rows.spans.rank[0] for rows in adapter_of(same).rows.values()} == {rank}


@pytest.mark.parametrize("scorer", MODULE_SCORERS)
@pytest.mark.parametrize("n_keep", [1, 2, 5])
def test_oracle_3_each_layer_keeps_its_n_best(scorer: str, n_keep: int) -> None:
    _, handle, _ = probe()
    setting = make_setting(handle, batches_of(3), n_keep=n_keep, scorer=scorer)
    for layer, kept in zip(setting.layers, setting.mask(), strict=True):
        assert sum(kept.values()) == n_keep
        scores = {name: module.score for name, module in layer.items()}
        worst = min(scores[name] for name in kept if kept[name])
        assert worst >= max(scores[name] for name in kept if not kept[name])


def test_oracle_3_the_scores_are_the_dense_ones() -> None:
    _, handle, params = probe()
    batches = batches_of(4, count=3)
    setting = make_setting(handle, batches, n_keep=2)
    whole = batches_of(12)[0]  # the same examples in one batch
    naive = fanlora.importance(build_pico("llama"), dense(whole), params)
    for number, layer in enumerate(setting.layers):
        for name, module in layer.items():
            removal, alone = naive[f"model.layers.{number}.{name}"]
            assert module.removal is not None and module.alone is not None
            assert abs(module.removal - removal) < 1e-5
            assert abs(module.alone - alone) < 1e-5
            assert module.score == pytest.approx(module.removal + module.alone)
    sums = {path: removal + alone for path, (removal, alone) in naive.items()}
    kept = {
        f"model.layers.{n}.{name}"
        for n, layer in enumerate(setting.mask())
        for name in layer
        if layer[name]
    }
    assert kept == fanlora.best_of_each_layer(sums, 2)
    base = build_pico("llama")
    assert setting.losses["base"] == pytest.approx(-fanlora.score(base, dense(whole), {}), abs=1e-5)
    assert setting.losses["probe"] == pytest.approx(
        -fanlora.score(base, dense(whole), params), abs=1e-5
    )
    only = {path: params[path] for path in kept}
    assert setting.losses["masked"] == pytest.approx(
        -fanlora.score(base, dense(whole), only), abs=1e-5
    )


@pytest.mark.parametrize("scorer", [s for s in MODULE_SCORERS if s != "sensitivity"])
def test_oracle_3_the_scores_do_not_depend_on_the_batches(scorer: str) -> None:
    _, handle, _ = probe()
    made = [
        make_setting(handle, batches, n_keep=2, scorer=scorer)
        for batches in (batches_of(4, count=3), batches_of(12))
    ]
    for one, two in zip(made[0].layers, made[1].layers, strict=True):
        for name in one:
            assert one[name].score == pytest.approx(two[name].score, rel=1e-3)


def test_oracle_3_every_batch_weighs_the_same_for_the_sensitivity() -> None:
    _, handle, _ = probe()
    batches = batches_of(4, count=2)
    whole = make_setting(handle, batches, n_keep=2, scorer="sensitivity")
    parts = [make_setting(handle, [b], n_keep=2, scorer="sensitivity") for b in batches]
    for number, layer in enumerate(whole.layers):
        for name, module in layer.items():
            mean = sum(part.layers[number][name].score for part in parts) / 2
            assert module.score == pytest.approx(mean)


def test_oracle_3_equal_scores_go_to_the_linear_that_runs_first() -> None:
    equal = dict.fromkeys(LLAMA, 0.5)
    assert [name for name, kept in choose([equal], 2, "layer")[0].items() if kept] == [*LLAMA[:2]]


def test_oracle_3_over_the_whole_model_the_best_may_all_lie_in_one_layer() -> None:
    low, high = dict.fromkeys(LLAMA, 0.0), dict.fromkeys(LLAMA, 1.0)
    masks = choose([low, high], 3, "model")
    assert [sum(mask.values()) for mask in masks] == [0, 6]
    assert [sum(mask.values()) for mask in choose([low, high], 3, "layer")] == [3, 3]


@pytest.mark.parametrize("scorer", MODULE_SCORERS)
def test_oracle_4_scoring_changes_nothing_and_repeats(scorer: str) -> None:
    model, handle, _ = probe()
    model.train()
    parameters = handle.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    batch = batches_of(3)[0]
    model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    grads = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    moments = [
        {key: value.clone() for key, value in optimizer.state[p].items()}
        for p in parameters.values()
    ]
    draw = torch.get_rng_state()
    one, two = (make_setting(handle, batches_of(3), n_keep=2, scorer=scorer) for _ in range(2))
    assert one == two
    assert torch.equal(torch.get_rng_state(), draw)
    assert all(module.training for module in model.modules())
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is not None and torch.equal(parameter.grad, grads[name])
    for parameter, kept in zip(parameters.values(), moments, strict=True):
        assert all(torch.equal(optimizer.state[parameter][key], kept[key]) for key in kept)


def test_oracle_5_a_module_whose_b_is_zero_scores_the_base_exactly() -> None:
    _, handle, _ = probe(strength={"q_proj": 1.0, "down_proj": 1.0})
    setting = make_setting(handle, batches_of(3), n_keep=2)
    for layer in setting.layers:
        for name, module in layer.items():
            if not name.endswith(("q_proj", "down_proj")):
                assert module.removal == 0.0
                assert module.alone == module.score == -setting.losses["base"]


@pytest.mark.parametrize("scorer", ["ablation", "taylor"])
def test_oracle_6_the_two_useful_linears_are_kept(scorer: str) -> None:
    handle, batches = planted({"v_proj": 1.5, "down_proj": 1.5})
    setting = make_setting(handle, batches, n_keep=2, scorer=scorer)
    for layer in setting.mask():
        assert [name for name, kept in layer.items() if kept] == [
            "self_attn.v_proj",
            "mlp.down_proj",
        ]
    assert setting.losses["masked"] < setting.losses["base"] - 0.5
    assert setting.agreement == (1.0, 1.0)


def test_oracle_7_other_linears_are_untouched_and_the_count_is_that_of_the_mask(
    tmp_path: Path,
) -> None:
    choice = CHOICES[0]
    model, handle = placed(handmade(tmp_path / "setting.json", choice))
    config = adapter_of(handle).method.config
    handle.add(config, name="second")
    nudge(handle.adapters["second"], 5)
    wrapped = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    assert sorted(wrapped) == sorted(paths_of(choice))
    bare = dict(build_pico("llama").named_modules())
    for name, module in model.named_modules():
        if name in bare and name not in wrapped and ".layers." in name and "_proj" in name:
            assert type(module) is type(bare[name])
            assert not module._forward_hooks and not module._forward_pre_hooks
    shrinks: Counter[int] = Counter()

    def ran(module: LoraLinear, args: Any, output: Any) -> None:
        state = handle.dispatch.state
        assert state is not None
        plan = state.plans[module.path]
        assert plan is not None
        shrinks.update({module.site.layer: len(plan.parts)})

    for path in wrapped:
        model.get_submodule(path).register_forward_hook(ran)
    batch = batches_of(4)[0]
    for adapters in (["default"] * 4, ["default", "second", None, "second"]):
        shrinks.clear()
        with handle.batch(adapters):
            logits_of(model, batch)
        members = len({name for name in adapters if name})
        # One shrink and one expand per kept linear and adapter: 2 * n_keep products for every token.
        assert shrinks == dict.fromkeys(range(2), 2 * members)


def test_oracle_8_the_setting_reads_back_and_belongs_to_its_backbone(tmp_path: Path) -> None:
    _, handle, _ = probe()
    path = setting_file(tmp_path / "setting.json", handle, batches_of(3, 3), n_keep=3)
    setting = read_setting(str(path))
    assert setting == Setting.from_json(setting.to_json(), "again")
    assert setting == make_setting(handle, batches_of(3, 3), n_keep=3)
    assert "reconstruction" in path.read_text()
    config = FanLoRAConfig(r=RANK, setting=str(path))
    with pytest.raises(ValueError, match="is for 2 layers, the model has 3"):
        loramux.attach(build_pico("llama", num_hidden_layers=3), config)
    for family in ("phi3", "gpt2"):
        model = build_pico(family)
        with pytest.raises(ValueError, match="the model's targeted linears there are"):
            loramux.attach(model, config)
        assert not hasattr(model, "loramux")


def test_oracle_9_a_merged_adapter_decodes_as_the_unmerged_one(tmp_path: Path) -> None:
    model, handle = placed(handmade(tmp_path / "setting.json", CHOICES[1]))
    folder = handle.save(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(build_pico("llama"), str(folder)).eval()
    merged = loaded.merge_and_unload()
    ids = torch.tensor([[5, 17, 40, 61, 8]])
    with torch.no_grad():
        said = [
            each.generate(
                input_ids=ids, max_new_tokens=8, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )
            for each in (model, merged)
        ]  # fmt: skip
    assert torch.equal(said[0].sequences, said[1].sequences)
    for one, two in zip(said[0].logits, said[1].logits, strict=True):
        close(one, two, 1e-4)


def test_oracle_10_two_tenants_in_a_batch_answer_as_each_alone(tmp_path: Path) -> None:
    model, handle = placed(handmade(tmp_path / "setting.json", CHOICES[0]))
    handle.add(adapter_of(handle).method.config, name="second")
    nudge(handle.adapters["second"], 7)
    ids = torch.tensor([[5, 17, 40, 61, 8], [5, 17, 40, 61, 8]])
    options: dict[str, Any] = {
        "max_new_tokens": 8, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    with torch.no_grad():
        with handle.batch(["default", "second"]):
            both = model.generate(input_ids=ids, **options)
        alone = []
        for name in ("default", "second"):
            handle.use(name)
            alone.append(model.generate(input_ids=ids[:1], **options))
    assert not torch.equal(both.sequences[0], both.sequences[1])
    for row, single in enumerate(alone):
        assert torch.equal(both.sequences[row], single.sequences[0])
        for one, two in zip(both.logits, single.logits, strict=True):
            close(one[row], two[0])


def test_the_probe_itself_is_lora_everywhere() -> None:
    model, handle, params = probe()
    batch = batches_of(3)[0]
    copy_lora(handle, params)
    close(
        logits_of(model, batch),
        oracle_logits(build_pico("llama"), *dense(batch)[:2], params).detach(),
    )
