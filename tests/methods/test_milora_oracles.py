"""The twelve oracles of MiLoRA's specification, by number."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import loramux
from loramux.core.router import RouteView, switch_balance
from loramux.core.types import Site
from loramux.methods.milora import MiLoRAMethod, PromptRouter, Rational
from methods.bridge import adapter_of, by_layer, close
from methods.milora_case import IDS, PROMPT, RANK, attached, routers_of, run
from oracles import milora
from oracles.random_params import layer_modules
from oracles.surgery import decoder_layers
from pico import build_pico

# 1 (routers run once per layer and prompt) and the generation half of 12 are claims of the conformance suite.


@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_2_a_fresh_adapter_has_the_logits_of_the_base_for_any_k(top_k: int):
    model = build_pico("llama")
    base = model(IDS).logits.detach()
    handle = loramux.attach(model, loramux.MiLoRAConfig(r=RANK, top_k=top_k))
    for _, router in adapter_of(handle).routers.items():
        nn.init.normal_(router.weight)  # type: ignore[arg-type]
    torch.testing.assert_close(run(model).detach(), base, atol=1e-6, rtol=1e-6)


def as_peft(params: milora.Params, only: str = "") -> nn.Module:
    """PEFT's LoRA with the oracle's rows, alpha = r, at the modules whose name ends in `only`."""
    sites = [path for path in params.experts if path.endswith(only)]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=sites)
    model = peft.get_peft_model(build_pico("llama"), config).eval()
    for path in sites:
        layer: Any = model.base_model.model.get_submodule(path)
        layer.lora_A["default"].weight.data = params.experts[path].A.clone()
        layer.lora_B["default"].weight.data = params.experts[path].B.clone()
    return model


def test_3_all_modules_with_unit_gates_are_pefts_lora():
    model, _, params, _ = attached(top_k=7)
    close(run(model).detach(), as_peft(params)(IDS).logits.detach())


@pytest.mark.parametrize("chosen", layer_modules(build_pico("llama")))
def test_4_a_router_forced_to_one_module_is_pefts_lora_on_that_module(chosen: str):
    model, handle, params, _ = attached(top_k=1)
    for router in routers_of(handle):
        # A constant activation and one positive column: every prompt picks that module.
        router.activation.numerator.data = torch.tensor([1.0, 0, 0, 0, 0, 0, 0])
        router.activation.denominator.data.zero_()
        router.weight.data.zero_()
        router.weight.data[:, router.names.index(chosen)] = 1
    close(run(model).detach(), as_peft(params, chosen)(IDS).logits.detach())
    gates = torch.stack([record.gates for record in handle.routing()])
    assert gates.sum(-1).eq(1).all()


@pytest.mark.parametrize("pooler", ["attention", "mean", "last", "max"])
def test_5_answers_leave_the_routing_bit_identical_and_prompts_do_not(pooler: str):
    model, handle, _, _ = attached(pooler=pooler)
    model.train()

    def routed(ids: Tensor) -> list[Tensor]:
        model(input_ids=ids, labels=ids.masked_fill(PROMPT, -100))
        return [record.probs.detach() for record in handle.routing()]

    before = routed(IDS)
    answer, prompt = IDS.clone(), IDS.clone()
    answer[~PROMPT] = 77
    prompt[:, 3] = 77
    assert all(torch.equal(a, b) for a, b in zip(routed(answer), before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(routed(prompt), before, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_6_padding_and_neighbours_change_neither_routing_nor_logits(side: str):
    model, handle, _, _ = attached()
    short = IDS[1:, :5]
    alone = run(model, short, torch.ones_like(short).bool()).detach()
    routed = [record.probs.detach() for record in handle.routing()]
    before, after = (2, 0) if side == "left" else (0, 2)
    padded = nn.functional.pad(short, (before, after))
    mask = nn.functional.pad(torch.ones_like(short), (before, after))
    ids, both = torch.cat([IDS[:1], padded]), torch.cat([torch.ones_like(IDS[:1]), mask])
    positions = (both.cumsum(1) - 1).clamp_min(0)
    logits = model(input_ids=ids, attention_mask=both, position_ids=positions).logits.detach()
    close(logits[1, before : before + 5], alone[0])
    for record, expected in zip(handle.routing(), routed, strict=True):
        close(record.probs.detach()[1:], expected)


def test_7_teacher_forced_logits_are_those_of_cached_decoding():
    model, _, _, _ = attached()
    with torch.no_grad():
        whole = run(model, prompt=torch.arange(7).expand(2, 7) < 4)
        out = model(IDS[:, :4], use_cache=True)
        logits = [out.logits]
        for step in range(4, 7):
            out = model(IDS[:, step : step + 1], past_key_values=out.past_key_values)
            logits.append(out.logits)
    close(torch.cat(logits, dim=1), whole, 1e-4)


@pytest.mark.parametrize("num", [2, 7])
def test_8_the_balance_loss_is_one_when_uniform_and_n_when_collapsed(num: int):
    everyone = torch.ones(5, dtype=torch.bool)
    assert switch_balance(torch.full((5, num), 1 / num), everyone).item() == pytest.approx(1)
    collapsed = torch.eye(num)[torch.full((5,), num - 1)]
    assert switch_balance(collapsed, everyone).item() == num


def test_8_the_gradient_of_the_balance_loss_reaches_the_router_only_through_the_mean():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [9.0, 9.0, 9.0]], requires_grad=True)
    loss = switch_balance(p, torch.tensor([True, True, False]))
    assert loss.item() == pytest.approx(3 * (0.5 * 0.3 + 0.5 * 0.45))
    (gradient,) = torch.autograd.grad(loss, p)
    expected = torch.tensor([[0.75, 0.75, 0.0], [0.75, 0.75, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(gradient, expected)


def test_8_the_loss_of_the_layers_is_summed_or_averaged():
    values = []
    for reduction in ("sum", "mean"):
        model, handle, _, _ = attached(aux_reduction=reduction, router_aux_loss_coef=0.5)
        run(model)
        values.append(handle.aux_losses()["default/balance"].detach())
    torch.testing.assert_close(values[0], 2 * values[1])


def test_9_parameter_counts_of_llama_2_7b_at_rank_32():
    d, f = 4096, 11008
    shapes = [(d, d)] * 4 + [(d, f), (d, f), (f, d)]
    sites = [
        Site(f"l.0.{i}", str(i), 0, "l.0", "l.0", "other", "plain", d_in, d_out, d)
        for i, (d_in, d_out) in enumerate(shapes)
    ]
    method = MiLoRAMethod(loramux.MiLoRAConfig())
    assert method.config.r == 32
    lora = sum(e.rank * (s.d_in + s.d_out) for s in sites for e in method.experts(s))
    (router,) = method.routers(sites).values()
    counts = {name: p.numel() for name, p in router.named_parameters()}
    assert 32 * lora == 79_953_920
    assert 32 * counts["weight"] == 917_504
    assert 32 * counts["query"] == 131_072
    assert 32 * (counts["activation.numerator"] + counts["activation.denominator"]) == 384
    assert all(e.scale == 1 for e in method.experts(sites[0]))


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("gate", ["ste", "prob", "renorm"])
def test_9_exactly_k_gates_are_non_zero_per_sample_and_layer(top_k: int, gate: str):
    model, handle, _, _ = attached(top_k=top_k, gate=gate)
    run(model)
    for record in handle.routing():
        assert record.gates.count_nonzero(-1).eq(top_k).all()
        if gate == "ste":
            assert record.gates.detach().eq(1).sum(-1).eq(top_k).all()


def test_10_the_rational_unit_starts_as_gelu_and_stays_finite():
    unit = Rational()
    x = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    with torch.no_grad():
        assert (unit(x) - nn.functional.gelu(x)).abs().max() < 2e-4
        far = torch.tensor([-6.0, -10.0, 10.0], dtype=torch.float64)
        expected = torch.tensor([0.25, 1.95, 11.95], dtype=torch.float64)
        torch.testing.assert_close(unit(far), expected, atol=0.01, rtol=0)
        wide = torch.linspace(-1e4, 1e4, 2001)
        assert unit(wide).isfinite().all()


def test_10_its_denominator_is_never_below_one_whatever_the_coefficients():
    unit = Rational()
    x = torch.cat([torch.linspace(-1e4, 1e4, 401), torch.randn(200)])
    with torch.no_grad():
        unit.numerator.copy_(torch.tensor([1.0, 0, 0, 0, 0, 0, 0]))
        for _ in range(20):
            nn.init.normal_(unit.denominator, std=10)
            # 1 / (1 + |..|) is at most 1 and never negative.
            assert (unit(x) <= 1).all() and (unit(x) >= 0).all()
            expected = milora.rational(x, unit.numerator, unit.denominator)
            torch.testing.assert_close(unit(x), expected)


def test_11_the_pooler_with_a_zero_query_is_the_masked_mean():
    H = torch.randn(2, 7, 32)
    expected = (H * PROMPT[..., None]).sum(1) / PROMPT.sum(1, keepdim=True)
    for pooler in ("attention", "mean"):
        router = routers_of(attached(pooler=pooler)[1])[0]
        if pooler == "attention":
            router.query.data.zero_()  # type: ignore[union-attr]
        torch.testing.assert_close(_pooled(router, H), expected)


@pytest.mark.parametrize("pooler", ["attention", "mean", "last", "max"])
def test_11_the_pooler_reads_the_prompt_with_weights_that_sum_to_one(pooler: str):
    _, handle, params, _ = attached(pooler=pooler)
    router, path = routers_of(handle)[0], next(iter(params.routers))
    H = torch.randn(2, 7, 32)
    got = _pooled(router, H)
    torch.testing.assert_close(got, milora.pool(H, PROMPT, pooler, params.routers[path].W_sa))
    torch.testing.assert_close(_pooled(router, H.clone().masked_fill(~PROMPT[..., None], 1e4)), got)
    constant = torch.ones(2, 7, 32)
    torch.testing.assert_close(_pooled(router, constant), torch.ones(2, 32))


def _pooled(router: PromptRouter, H: Tensor) -> Tensor:
    view = RouteView(
        x_ND=H.reshape(-1, 32),
        request_N=torch.arange(2).repeat_interleave(7),
        prompt_N=PROMPT.reshape(-1),
        valid_N=torch.ones(14, dtype=torch.bool),
        num_requests=2,
        training=False,
        record=lambda **_: None,
    )
    with torch.no_grad():
        return router._pool(view, torch.float32)


class CountMatmuls(TorchDispatchMode):
    """Products with a factor of the experts: one side has exactly RANK rows or columns."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_") and any(
            torch.is_tensor(a) and a.dim() == 2 and RANK in a.shape for a in args
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("top_k", [1, 3])
def test_12_modules_that_were_not_selected_run_no_matmul(top_k: int):
    model, _, _, _ = attached(top_k=top_k)
    with torch.no_grad():
        out = model(IDS[:1], use_cache=True)
        for token in (9, 10):
            with CountMatmuls() as counted:
                out = model(torch.tensor([[token]]), past_key_values=out.past_key_values)
            assert counted.count == 2 * top_k * len(decoder_layers(model))


def test_12_routing_survives_saving_and_loading(tmp_path: Path):
    model, handle, _, modules = attached()
    run(model)
    expected = by_layer(handle.routing(), modules, "probs").detach()
    folder = handle.save(tmp_path / "milora")
    loaded = loramux.load(build_pico("llama"), folder, backend="reference")
    run(loaded.model)
    assert torch.equal(by_layer(loaded.routing(), modules, "probs").detach(), expected)
