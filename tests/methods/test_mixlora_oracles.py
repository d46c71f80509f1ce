"""The twelve oracles of MixLoRA's specification, by number."""

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import loramux
from loramux.core.bank import dora_gain
from loramux.core.linear import LoraLinear
from loramux.methods.mixlora import TokenRouter, selected_balance
from methods.bridge import (
    adapter_of,
    build_double,
    close,
    copy_mixlora,
    finite_differences,
    mixlora_params,
    same_gradients,
)
from methods.mixlora_case import EXPERTS, IDS, MASK, RANK, REAL, attached, run
from oracles.lora import LowRank
from oracles.mixlora import ffn_naive, read_ffn, route_top_k, router_logits
from oracles.random_params import mixlora_params as random_params
from oracles.surgery import model_logits
from pico import FAMILIES, build_pico

LABELS = torch.where((torch.arange(6) < 2) | ~REAL, torch.full_like(IDS, -100), IDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_1_a_fresh_mixture_is_the_dense_ffn(family: str):
    model = build_pico(family)
    base = model_logits(model, IDS, MASK)
    handle = loramux.attach(model, loramux.MixLoRAConfig(r=4, num_experts=4), backend="reference")
    for router in adapter_of(handle).routers.values():
        nn.init.normal_(router.weight)  # type: ignore[arg-type]
    torch.testing.assert_close(run(model)[REAL], base[REAL], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_2_one_base_product_per_token_is_the_naive_loop_in_output_and_every_gradient(
    family: str, dora: bool
):
    """A single block: entries once per token, rows folded before the exit, against one FFN pass per expert."""
    model, handle, _ = attached(family, double=True, dora=dora)
    path = next(iter(adapter_of(handle).routers))
    seen: list[tuple[Tensor, Tensor]] = []
    model.get_submodule(path).register_forward_hook(
        lambda module, args, output: seen.append((args[0], output))
    )
    run(model)
    x, got = seen[0]
    params = mixlora_params(handle)
    bare = build_double(family).requires_grad_(False)
    rows = x.reshape(-1, x.shape[-1])
    route = route_top_k(router_logits(rows, params.routers[path]), 2)
    expected = ffn_naive(rows, read_ffn(bare.get_submodule(path)), params.experts[path], route)
    close(got.reshape(-1, got.shape[-1]), expected)
    draw = torch.randn(expected.shape, dtype=torch.float64)
    same_gradients(handle, (got.reshape(expected.shape) * draw).mean(), (expected * draw).mean())
    # x carries a gradient from the attention before it.
    slopes = [torch.autograd.grad((y * draw).sum(), x, retain_graph=True)[0] for y in (
        got.reshape(expected.shape), expected
    )]  # fmt: skip
    close(slopes[0], slopes[1])


def test_2_the_base_projections_run_once_per_token_not_once_per_expert():
    model, _, _ = attached()
    counted: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear) and ".mlp." in name:
            module.base_layer.register_forward_hook(
                lambda m, args, out, name=name: counted.update(
                    {name: args[0].reshape(-1, args[0].shape[-1]).shape[0]}
                )
            )
    run(model)
    assert len(counted) == 6
    assert set(counted.values()) == {IDS.numel()}


def test_3_identical_experts_are_one_lora_whatever_the_router_and_give_it_no_gradient():
    model, handle, _ = attached(double=True)
    adapter = adapter_of(handle)
    for path, rows in adapter.rows.items():
        if path.rpartition(".")[0] in adapter.routers:
            for slot in range(1, EXPERTS):
                rows.a.data[rows.slot_rows(slot)] = rows.a.data[rows.slot_rows(0)]
                rows.b.data[rows.slot_rows(slot)] = rows.b.data[rows.slot_rows(0)]
    got = run(model)
    routers = [r.weight for r in adapter.routers.values()]
    gradients = torch.autograd.grad(got[REAL].square().mean(), routers)
    assert max(float(g.abs().max()) for g in gradients) < 1e-12
    one = [r.weight for r in adapter.routers.values()]
    for weight in one:
        weight.data.normal_()
    close(run(model).detach()[REAL], got.detach()[REAL])
    handle.detach()
    single = loramux.attach(model, loramux.LoraConfig(r=RANK, lora_alpha=1.5 * RANK))
    for path, rows in adapter_of(single).rows.items():
        source = adapter.rows[path]
        rows.a.data = source.a.data[source.slot_rows(0)]
        rows.b.data = source.b.data[source.slot_rows(0)]
    close(run(model).detach()[REAL], got.detach()[REAL])


def test_4_one_expert_is_pefts_lora_on_the_seven_projections():
    model = build_pico("llama")
    params = random_params(model, 1, RANK, scale=1.5)
    config = loramux.MixLoRAConfig(
        r=RANK, lora_alpha=1.5 * RANK, num_experts=1, top_k=1, lora_dropout=0.0
    )
    handle = loramux.attach(model, config, backend="reference")
    copy_mixlora(handle, params)
    got = run(model).detach()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(
        build_pico("llama"),
        peft.LoraConfig(r=RANK, lora_alpha=1.5 * RANK, target_modules=targets),
    ).eval()
    for path, rows in adapter_of(handle).rows.items():
        layer: Any = theirs.base_model.model.get_submodule(path)
        layer.lora_A["default"].weight.data = rows.a.data.clone()
        layer.lora_B["default"].weight.data = rows.b.data.T.clone()
    close(got[REAL], model_logits(theirs, IDS, MASK).detach()[REAL])


def test_5_the_loss_is_k_when_uniform_and_n_when_collapsed():
    everyone = torch.ones(EXPERTS * 3, dtype=torch.bool)
    uniform = torch.full((EXPERTS * 3, EXPERTS), 1 / EXPERTS)
    # Token t takes experts t and t+1: every expert is taken equally often.
    taken = torch.eye(EXPERTS) + torch.eye(EXPERTS).roll(1, dims=1)
    gates = 0.5 * taken.repeat(3, 1)
    assert selected_balance(gates, uniform, everyone).item() == pytest.approx(2)
    certain = torch.zeros(EXPERTS * 3, EXPERTS)
    certain[:, :2] = 0.5
    assert selected_balance(certain, certain, everyone).item() == pytest.approx(EXPERTS)


@pytest.mark.parametrize("dora", [False, True])
def test_6_two_evaluations_are_bit_identical_under_any_seed_in_spite_of_dropout(dora: bool):
    model, _, _ = attached(dora=dora, lora_dropout=0.05, jitter_noise=0.1)
    torch.manual_seed(1)
    once = run(model)
    torch.manual_seed(2)
    assert torch.equal(run(model), once)
    model.train()
    assert not torch.equal(run(model), once)


@pytest.mark.parametrize("strategy", ["mixlora", "mixlora-dynamic", "mixlora-switch"])
def test_7_extra_padding_and_another_request_change_neither_loss_nor_gradients(strategy: str):
    model, handle, _ = attached(
        double=True, routing_strategy=strategy, router_aux_loss_coef=0.5, expert_capacity=2
    )
    model.train()
    alone = {"input_ids": IDS[1:, :4], "labels": LABELS[1:, :4]}
    pad = nn.functional.pad
    padded = {
        "input_ids": pad(IDS[1:, :4], (0, 5), value=7),
        "attention_mask": pad(torch.ones(1, 4, dtype=torch.long), (0, 5)),
        "labels": pad(LABELS[1:, :4], (0, 5), value=-100),
    }
    ours = model(**alone).loss
    same_gradients(handle, model(**padded).loss, ours)
    torch.testing.assert_close(model(**padded).loss, ours, atol=1e-12, rtol=1e-12)
    # Another request, of nobody's adapter: this one's auxiliary loss and gradients stay what they were.
    ours_aux = sum(_aux(model, handle, alone).values())
    both = {key: torch.cat([value, value]) for key, value in padded.items()}
    both["input_ids"][1] = 50
    both["attention_mask"][1] = 1
    with handle.batch(adapters=["default", None]):
        beside = sum(_aux(model, handle, both).values())
    same_gradients(handle, beside, ours_aux)


def _aux(model: nn.Module, handle: loramux.Handle, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model(**batch)
    return handle.aux_losses()


def test_8_gradients_are_those_of_finite_differences_with_a_fixed_dropout_mask():
    model, handle, _ = attached("gpt2", double=True, lora_dropout=0.3)
    model.train()
    leaves = {
        name: p
        for name, p in handle.trainable_parameters().items()
        if "h/1" in name and ("mlp" in name or "c_attn" in name)
    }

    def value() -> Tensor:
        torch.manual_seed(3)
        return run(model)[REAL].square().mean()

    finite_differences(value, leaves, samples=2)


def test_8_and_with_respect_to_the_input():
    model, _, _ = attached("gpt2", double=True)
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    finite_differences(
        lambda: model(inputs_embeds=x, attention_mask=MASK).logits[REAL].square().mean(),
        {"x": x},
    )


# -- 10, 11, 12 ----------------------------------------------------------------------------------


def test_10_adapters_in_one_batch_have_the_loss_terms_and_gradients_they_have_alone():
    """The routing side of isolation; the joint trainer has its own tests."""
    model = build_double()
    handle = loramux.attach(
        model, loramux.MixLoRAConfig(r=RANK, num_experts=4, lora_dropout=0.0), backend="reference"
    )
    handle.add(loramux.MixLoRAConfig(r=2, num_experts=3, top_k=1, lora_dropout=0.0), name="other")
    for adapter in handle.adapters.values():
        adapter.double()
        for p in adapter.trainable().values():
            p.data += 0.15 * torch.randn_like(p)
    names = ["default", "other"]
    with handle.batch(adapters=names):
        together = run(model)
        aux = handle.aux_losses()
    for row, name in enumerate(names):
        num = int(MASK[row].sum())
        with handle.batch(adapters=[name]):
            alone = model(IDS[row : row + 1, :num]).logits
            own = handle.aux_losses()
        close(together[row, :num], alone[0])
        torch.testing.assert_close(own[f"{name}/balance"], aux[f"{name}/balance"])
        parameters = list(handle.trainable_parameters(name).values())
        totals = [
            logits.square().mean() + losses[f"{name}/balance"]
            for logits, losses in ((together[row, :num], aux), (alone, own))
        ]
        got, expected = (torch.autograd.grad(t, parameters, retain_graph=True) for t in totals)
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def test_11_dora_experts_start_as_the_base_and_their_gain_is_never_stale(tmp_path: Path):
    model = build_pico("llama")
    base = run(model).detach()
    config = loramux.MixLoRAConfig(r=4, num_experts=4, use_dora=True, lora_dropout=0.0)
    handle = loramux.attach(model, config, backend="reference")
    close(run(model).detach()[REAL], base[REAL])
    for p in handle.trainable_parameters().values():
        p.data += 0.1 * torch.randn_like(p)
    folder = handle.save(tmp_path / "mixdora")
    loaded = loramux.load(build_pico("llama"), folder, backend="reference")
    assert torch.equal(run(loaded.model), run(model))
    # A step changes B: the next forward must see the new norm.
    before = run(model).detach()
    for rows in adapter_of(handle).rows.values():
        rows.b.data *= 3
    for path, rows in adapter_of(handle).rows.items():
        weight = handle.linears[path].weight_OI()
        dense = torch.stack(
            [
                (weight + e.scale * (e.B @ e.A)).norm(dim=1)
                for e in (_expert(rows, slot) for slot in range(rows.spans.num_slots))
            ]
        )
        torch.testing.assert_close(dora_gain(rows, weight), rows.magnitude / dense)
    assert (run(model) - before).abs().max() > 0.1


def _expert(rows: Any, slot: int) -> LowRank:
    at = rows.slot_rows(slot)
    return LowRank(rows.a[at], rows.b[at].T, rows.spans.scale[slot])


def chosen(p: list[float], **settings: Any) -> tuple[list[int], list[float]]:
    """Experts and weights of one token whose probabilities are `p`."""
    config = loramux.MixLoRAConfig(
        num_experts=len(p), routing_strategy="mixlora-dynamic", **settings
    )
    router = TokenRouter(config, 8)
    logits = torch.tensor([p], dtype=torch.float64).log()
    slot, weight, _ = router._dynamic(logits)
    kept = slot[0] >= 0
    return slot[0][kept].tolist(), [round(w, 12) for w in weight[0][kept].tolist()]


def test_12_top_p_keeps_those_up_to_the_threshold_and_the_first_that_crosses():
    p = [0.5, 0.3, 0.15, 0.05]
    assert chosen(p, top_p=0.79) == ([0, 1], [0.5, 0.3])
    # Sixteenths are exact in binary, so the sum meets the threshold exactly: it stays within.
    sixteenths = [8 / 16, 4 / 16, 3 / 16, 1 / 16]
    assert chosen(sixteenths, top_p=12 / 16)[0] == [0, 1, 2]
    assert chosen(sixteenths, top_p=11.9 / 16)[0] == [0, 1]
    assert chosen(sixteenths, top_p=7.9 / 16)[0] == [0]
    assert chosen(sixteenths, top_p=1.0)[0] == [0, 1, 2, 3]
    assert chosen([0.1, 0.6, 0.3], top_p=0.5) == ([1], [0.6])
    assert chosen(p, top_p=0.79, renormalise_top_p=True)[1] == [0.625, 0.375]


def test_unknown_strategies_are_refused():
    with pytest.raises(ValueError, match="routing_strategy"):
        loramux.MixLoRAConfig(routing_strategy="mixtral-of-mine")  # type: ignore[arg-type]


def test_the_config_is_plain_data_and_frozen():
    config = loramux.MixLoRAConfig(num_experts=4)
    again = loramux.config_from_dict({"name": "mixlora", **config.to_dict()})
    assert again == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3  # type: ignore[misc]
