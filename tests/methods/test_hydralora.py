"""HydraLoRA: one A for all heads, computed once, with the gradient of all of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loramux
from methods.bridge import adapter_of, build_double
from methods.site_mixture_case import (
    IDS,
    LABELS,
    MASK,
    RANK,
    REAL,
    attached,
    config_of,
    params_of,
    run,
)
from oracles import site_mixture
from pico import build_pico


def test_a_is_kept_once_and_belongs_to_all_heads():
    _, handle = attached("hydralora", fresh=True)
    for rows in adapter_of(handle).rows.values():
        assert rows.tied == 3
        assert rows.a.shape[0] == RANK and rows.b.shape[0] == 3 * RANK


@pytest.mark.parametrize("training", [False, True])
def test_a_meets_the_input_once_per_call(training: bool, monkeypatch: pytest.MonkeyPatch):
    model, handle = attached("hydralora")
    shapes: list[tuple[int, ...]] = []
    linear = nn.functional.linear

    def counted(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        if weight.shape[0] in (RANK, 3 * RANK):
            shapes.append(tuple(weight.shape))
        return linear(x, weight, *rest)

    monkeypatch.setattr(nn.functional, "linear", counted)
    with torch.set_grad_enabled(training):
        model.train(training)(input_ids=IDS)
    widths = [rows.a.shape[1] for rows in adapter_of(handle).rows.values()]
    assert len(shapes) == len(widths)
    if training:
        assert sorted(shapes) == sorted((RANK, width) for width in widths)


def test_the_gradient_of_a_is_the_sum_over_the_heads():
    model, handle = attached("hydralora", double=True)
    run(model, handle)[REAL].square().mean().backward()
    params, apart = params_of(handle), {}
    for path, mixture in params.items():
        heads = [
            head._replace(A=head.A.detach().clone().requires_grad_()) for head in mixture.experts
        ]
        apart[path] = mixture._replace(experts=heads)
    base = build_double("llama").requires_grad_(False)
    logits, _ = site_mixture.oracle_logits(base, IDS, MASK, apart, site_mixture.soft)
    logits[REAL].square().mean().backward()
    for path, rows in adapter_of(handle).rows.items():
        heads = apart[path].experts
        total = torch.stack([head.A.grad for head in heads]).sum(0)
        assert float(total.abs().max()) > 0
        torch.testing.assert_close(rows.a.grad, total, atol=1e-9, rtol=1e-9)


def test_dropout_draws_one_mask_for_all_heads():
    """Equal heads under dropout are one head: each head with a mask of its own would average their noise."""
    model, handle = attached("hydralora", lora_dropout=0.5)
    for rows in adapter_of(handle).rows.values():
        rows.b.data = rows.b.data[:RANK].repeat(3, 1)
    single, handle_of_single = attached("hydralora", lora_dropout=0.5, num_experts=1)
    for path, rows in adapter_of(handle_of_single).rows.items():
        rows.a.data = adapter_of(handle).rows[path].a.data.clone()
        rows.b.data = adapter_of(handle).rows[path].b.data[:RANK].clone()
    found = []
    for some in (model, single):
        torch.manual_seed(3)
        found.append(some.train()(input_ids=IDS, labels=LABELS).loss)
    torch.testing.assert_close(found[0], found[1])


def test_it_sits_at_the_ffn_unless_told_otherwise():
    _, handle = attached("hydralora", fresh=True)
    assert {path.split(".")[-2] for path in adapter_of(handle).rows} == {"mlp"}
    told = loramux.attach(
        build_pico("llama"), config_of("hydralora", target_modules=("q_proj", "v_proj"))
    )
    assert {path.split(".")[-1] for path in adapter_of(told).rows} == {"q_proj", "v_proj"}
