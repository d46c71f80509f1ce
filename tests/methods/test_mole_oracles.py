"""The eleven oracles of MoLE's specification, by number."""

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import loramux
from loramux.core.types import RouteRecord
from loramux.methods.mole import MoLEConfig, balance
from methods.bridge import adapter_of, close, copy_mole, write_experts
from methods.mole_case import IDS, MASK, NAMES, POOLS, PROMPT, REAL, UNITS, Gated
from oracles import lora, mole, mole_model
from oracles.surgery import model_logits
from pico import build_pico


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("granularity", UNITS)
def test_1_adapters_with_zero_b_are_the_base_exactly(
    tmp_path: Path, granularity: mole.Granularity, pool: mole.Pool
):
    gated = Gated(tmp_path, granularity=granularity, pool=pool, double=False)
    for rows in adapter_of(gated.handle).rows.values():
        rows.b.data.zero_()
    assert torch.equal(gated.run(), model_logits(gated.base(), IDS, MASK))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("granularity", UNITS)
def test_2_a_single_adapter_counts_fully_whatever_its_gate(
    tmp_path: Path, granularity: mole.Granularity, pool: mole.Pool
):
    gated = Gated(tmp_path, granularity=granularity, pool=pool, num_experts=1)
    alone = lora.oracle_logits(gated.base(), IDS, MASK, mole_model.single_expert(gated.params, 0))
    close(gated.run().detach()[REAL], alone.detach()[REAL])
    assert all(record.gates.eq(1).all() for record in gated.records().values())


@pytest.mark.parametrize("granularity", UNITS)
def test_3_fresh_gates_are_one_over_n_and_the_model_is_the_merged_one(
    tmp_path: Path, granularity: mole.Granularity
):
    gated = Gated(tmp_path, granularity=granularity, num_experts=4, gate_std=0.0)
    got = gated.run().detach()
    assert all(record.gates.eq(0.25).all() for record in gated.records().values())
    merged = gated.base()
    for site, experts in gated.params.experts.items():
        module: Any = merged.get_submodule(site)
        module.weight.data = lora.merged_weight(module.weight.data, experts, [0.25] * 4)
    close(got[REAL], model_logits(merged, IDS, MASK).detach()[REAL])
    close(
        gated.handle.aux_losses()["default/balance"].detach(), torch.zeros((), dtype=torch.float64)
    )


def test_3_fresh_gates_start_so_without_being_told(tmp_path: Path):
    gated = Gated(tmp_path, double=False, gate_std=0.0)
    config = gated.handle.adapters["default"].method.config
    handle = loramux.attach(gated.base(), config, backend="reference")
    assert torch.equal(handle.model(IDS, attention_mask=MASK).logits, gated.run())


def test_3_fresh_gates_are_pefts_cat_adapter_with_weights_one_over_n(tmp_path: Path):
    gated = Gated(tmp_path, double=False, gate_std=0.0)
    config = gated.handle.adapters["default"].method.config
    theirs: Any = None
    for name, folder in zip(NAMES, config.adapters, strict=False):  # type: ignore[attr-defined]
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(gated.base(), folder, adapter_name=name)
        else:
            theirs.load_adapter(folder, adapter_name=name)
    theirs.add_weighted_adapter(list(NAMES[:3]), [1 / 3] * 3, "mix", combination_type="cat")
    theirs.set_adapter("mix")
    close(gated.run().detach()[REAL], model_logits(theirs.eval(), IDS, MASK).detach()[REAL])


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("granularity", UNITS)
def test_4_masking_all_but_one_is_that_adapter_alone(
    tmp_path: Path, granularity: mole.Granularity, pool: mole.Pool
):
    gated = Gated(tmp_path, granularity=granularity, pool=pool)
    for number, name in enumerate(NAMES[:3]):
        gated.handle.mask_experts({other: other == name for other in NAMES[:3]})
        alone = lora.oracle_logits(
            gated.base(), IDS, MASK, mole_model.single_expert(gated.params, number)
        )
        close(gated.run().detach()[REAL], alone.detach()[REAL])


@pytest.mark.parametrize("mask", [(True, False, True), (False, True, True), (True, True, True)])
@pytest.mark.parametrize("pool", POOLS)
def test_5_masking_is_the_oracles_renormalisation(
    tmp_path: Path, pool: mole.Pool, mask: tuple[bool, ...]
):
    gated = Gated(tmp_path, pool=pool)
    whole = gated.run().detach()
    free = {path: record.gates for path, record in gated.records().items()}
    gated.handle.mask_experts(dict(zip(NAMES, mask, strict=False)))
    assert_is_oracle_masked(gated, mask)
    first = next(
        iter(gated.records())
    )  # later units read what the masked ones before them computed
    expected = mole.mask_and_renormalise(free[first], torch.tensor(mask))
    torch.testing.assert_close(gated.records()[first].gates, expected, atol=1e-6, rtol=0)
    if all(mask):
        assert torch.equal(gated.run(), whole)
    gated.handle.mask_experts(None)
    assert torch.equal(gated.run(), whole)


def assert_is_oracle_masked(gated: Gated, mask: tuple[bool, ...]) -> None:
    expected, _ = gated.oracle(expert_mask=mask)
    close(gated.run().detach()[REAL], expected.detach()[REAL])


def test_5_masks_that_leave_nothing_or_name_nobody_are_refused(tmp_path: Path):
    gated = Gated(tmp_path)
    with pytest.raises(ValueError, match="all experts would be masked"):
        gated.handle.mask_experts(dict.fromkeys(NAMES[:3], False))
    with pytest.raises(ValueError, match="no expert"):
        gated.handle.mask_experts({"purple": False})


def record_of(gates: Tensor, valid: Tensor | None = None) -> RouteRecord:
    everyone = torch.ones(gates.shape[0], dtype=torch.bool)
    return RouteRecord("a", "p", 0, "token", (), gates, valid=everyone if valid is None else valid)


@pytest.mark.parametrize("num", [2, 3, 8])
def test_6_the_balance_loss_is_zero_when_uniform_and_larger_otherwise(num: int):
    uniform = torch.full((4, num), 1 / num)
    assert balance([record_of(uniform)]).item() == pytest.approx(0, abs=1e-5)
    tilted = torch.softmax(torch.arange(num) / 10, 0).expand(4, num)
    loss = balance([record_of(tilted)])
    assert loss > 1e-4
    oracle = mole.balance_loss([tilted[None]], torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(loss + num * math.log(num), oracle)
    shuffled = tilted[:, torch.randperm(num)]
    torch.testing.assert_close(balance([record_of(shuffled)]), loss)


def test_6_opposite_gates_are_balanced_because_the_mean_comes_before_the_log():
    first, second = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[0.0, 1.0]] * 2)
    assert balance([record_of(first), record_of(second)]).item() == pytest.approx(0, abs=1e-6)
    assert balance([record_of(first)]).item() == pytest.approx(-math.log(1e-8) - 2 * math.log(2))
    padded = torch.cat([first, second])
    valid = torch.tensor([True, True, False, False])
    torch.testing.assert_close(balance([record_of(padded, valid)]), balance([record_of(first)]))


@pytest.mark.parametrize("pool", POOLS)
def test_7_a_high_temperature_is_uniform_and_a_low_one_picks_the_largest(
    tmp_path: Path, pool: mole.Pool
):
    gated = Gated(tmp_path, pool=pool, granularity="network")
    (router,) = adapter_of(gated.handle).routers.values()
    gated.run()
    (record,) = gated.records().values()
    best = record.logits.argmax(-1)
    router.log_tau.data.fill_(20.0)
    gated.run()
    torch.testing.assert_close(
        gated.records()[record.path].gates, torch.full_like(record.gates, 1 / 3), atol=1e-6, rtol=0
    )
    router.log_tau.data.fill_(-20.0)
    gated.run()
    one_hot = nn.functional.one_hot(best, 3).to(record.gates)
    torch.testing.assert_close(gated.records()[record.path].gates, one_hot)


@pytest.mark.parametrize("granularity", UNITS)
def test_8_only_gates_and_temperatures_train_and_all_of_them_get_a_gradient(
    tmp_path: Path, granularity: mole.Granularity
):
    gated = Gated(tmp_path, granularity=granularity)
    trained = gated.handle.trainable_parameters()
    assert {name.rpartition(".")[2] for name in trained} == {"weight", "log_tau"}
    gated.run()[REAL].square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in trained.values())
    assert all(p.grad is None for p in gated.model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("granularity", ["matrix", "layer", "network"])
def test_8_identical_adapters_give_no_gradient_and_distinct_ones_do(
    tmp_path: Path, granularity: mole.Granularity
):
    gated = Gated(tmp_path, granularity=granularity, gate_std=0.0)
    weights = [r.weight for r in adapter_of(gated.handle).routers.values()]
    different = torch.autograd.grad(gated.run()[REAL].square().mean(), weights)
    assert max(float(g.abs().max()) for g in different) > 1e-4
    same = {site: [es[0]] * 3 for site, es in gated.params.experts.items()}
    params = gated.params._replace(experts=same)
    gated.handle.detach()
    folders = write_experts(lambda: build_pico("llama"), params, tmp_path / "same", NAMES[:3])
    config = MoLEConfig(adapters=folders, granularity=granularity)
    gated.handle = loramux.attach(gated.model, config, backend="reference")
    copy_mole(gated.handle, params, granularity)
    weights = [r.weight for r in adapter_of(gated.handle).routers.values()]
    equal = torch.autograd.grad(gated.run()[REAL].square().mean(), weights)
    assert max(float(g.abs().max()) for g in equal) < 1e-12


def test_9_permuting_adapters_and_gates_together_changes_nothing(tmp_path: Path):
    gated = Gated(tmp_path)
    expected = gated.run().detach()
    order = [2, 0, 1]
    config = adapter_of(gated.handle).method.config
    folders = [config.adapters[i] for i in order]  # type: ignore[attr-defined]
    routers = {p: r.weight.data.clone() for p, r in adapter_of(gated.handle).routers.items()}
    taus = {p: r.log_tau.data.clone() for p, r in adapter_of(gated.handle).routers.items()}
    gated.handle.detach()
    handle = loramux.attach(gated.model, MoLEConfig(adapters=tuple(folders)), backend="reference")
    permuted = {s: [es[i] for i in order] for s, es in gated.params.experts.items()}
    for path, rows in adapter_of(handle).rows.items():
        rows.a.data = torch.cat([e.A for e in permuted[path]])
        rows.b.data = torch.cat([e.B.T for e in permuted[path]]).contiguous()
    for path, router in adapter_of(handle).routers.items():
        router.weight.data = routers[path][order][:, :, order].contiguous()
        router.log_tau.data = taus[path]
    close(gated.run().detach()[REAL], expected[REAL])


def test_10_later_tokens_do_not_change_earlier_gates_and_padding_changes_nothing(tmp_path: Path):
    gated = Gated(tmp_path, double=False)
    before = gated.run().detach()
    gates = {p: r.gates.view(2, 6, 3) for p, r in gated.records().items()}
    changed = IDS.clone()
    changed[0, 4:] = 70
    after = gated.run(changed).detach()
    close(after[0, :4], before[0, :4])
    for path, record in gated.records().items():
        close(record.gates.view(2, 6, 3)[0, :4], gates[path][0, :4])
    alone = gated.run(IDS[1:, :4], MASK[1:, :4], None).detach()
    close(alone[0], before[1, :4])


def test_10_with_a_prompt_mean_answers_do_not_change_the_gates(tmp_path: Path):
    gated = Gated(tmp_path, pool="prompt_mean", double=False)
    gated.run()
    gates = {p: r.gates.detach() for p, r in gated.records().items()}
    changed = IDS.masked_fill(~PROMPT, 70)
    gated.run(changed)
    for path, record in gated.records().items():
        assert torch.equal(record.gates, gates[path])
    alone = gated.model(IDS[1:, :4], prompt_mask=PROMPT[1:, :4]).logits.detach()
    close(alone[0], gated.run().detach()[1, :4])


@pytest.mark.parametrize("granularity", UNITS)
def test_11_the_gates_have_m_times_n_squared_d_plus_one_parameters(
    tmp_path: Path, granularity: mole.Granularity
):
    gated = Gated(tmp_path, granularity=granularity)
    counted = sum(p.numel() for p in gated.handle.trainable_parameters().values())
    assert counted == sum(gate.e.numel() + 1 for gate in gated.params.gates.values())
    if granularity == "layer":
        # First linears: q_proj (32 out) and gate_proj (48 out) in each of two layers.
        assert counted == mole.parameter_count(2, 3, 32) + mole.parameter_count(2, 3, 48)


def test_11_one_temperature_may_be_shared_by_all_gates(tmp_path: Path):
    gated = Gated(tmp_path, granularity="matrix", share_tau=True)
    trained = gated.handle.trainable_parameters()
    assert sum(name.endswith("log_tau") for name in trained) == 1
    routers = list(adapter_of(gated.handle).routers.values())
    routers[0].log_tau.data.fill_(0.7)
    assert routers[-1].log_tau.item() == pytest.approx(0.7)
    gated.run()[REAL].square().mean().backward()
    assert routers[0].log_tau.grad.abs() > 0


@pytest.mark.parametrize("share_tau", [False, True])
def test_11_a_saved_mixture_reloads_to_identical_outputs_without_its_adapters(
    tmp_path: Path, share_tau: bool
):
    gated = Gated(tmp_path / "experts", double=False, share_tau=share_tau)
    expected = gated.run()
    folder = gated.handle.save(tmp_path / "mixture")
    (tmp_path / "experts").rename(tmp_path / "elsewhere")
    loaded = loramux.load(gated.base(), folder, backend="reference")
    got = loaded.model(input_ids=IDS, attention_mask=MASK, prompt_mask=PROMPT).logits
    assert torch.equal(got, expected)
    loaded.mask_experts({"green": False})
    gated.handle.mask_experts({"green": False})
    got = loaded.model(input_ids=IDS, attention_mask=MASK, prompt_mask=PROMPT).logits
    assert torch.equal(got, gated.run())


def test_11_loading_with_another_order_of_adapters_is_an_error(tmp_path: Path):
    gated = Gated(tmp_path / "experts", double=False)
    folder = gated.handle.save(tmp_path / "mixture")
    path = folder / "mixture_config.json"
    header = json.loads(path.read_text())
    header["experts"] = [header["experts"][i] for i in (2, 0, 1)]
    path.write_text(json.dumps(header))
    with pytest.raises(ValueError, match="order"):
        loramux.load(gated.base(), folder)
