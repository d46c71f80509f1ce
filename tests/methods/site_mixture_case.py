"""Mixtures with a gate at every linear with random numbers, the same for the oracle: what their tests share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import loramux
from loramux.core.bank import Rows
from methods.bridge import adapter_of, build_double, close
from oracles import site_mixture
from oracles.lora import LowRank
from oracles.site_mixture import Mixture, Weigh
from pico import build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29], [90, 33, 12, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
REAL = MASK.bool()
LABELS = torch.where((torch.arange(6) < 2) | (MASK == 0), torch.full_like(IDS, -100), IDS)
TASKS = ("ask", "tell", "sing")
ASKED = ("sing", "ask")  # of the two samples

# method -> (fields of the config, how the oracle weighs)
METHODS: dict[str, tuple[dict[str, Any], Weigh]] = {
    "hydralora": ({"num_experts": 3}, site_mixture.soft),
    "loramoe": ({"num_experts": 4}, site_mixture.soft),
    "moelora": ({"num_experts": 2, "tasks": TASKS}, site_mixture.by_task([2, 0])),
    "mola": ({"experts_per_layer": (2, 4)}, site_mixture.top_renormalised(2)),
    "molora": ({"num_experts": 3}, site_mixture.soft),
}
RANK, ALPHA = 4, 6.0


def build(family: str, double: bool) -> nn.Module:
    return build_double(family) if double else build_pico(family)


def config_of(method: str, **settings: Any) -> Any:
    own = {**METHODS[method][0], "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0}
    return loramux.config_from_dict({"name": method, **own, **settings})


def attached(
    method: str,
    family: str = "llama",
    *,
    double: bool = False,
    fresh: bool = False,
    **settings: Any,
) -> tuple[nn.Module, loramux.Handle]:
    """The method on a pico model; random rows and gates with an opinion, unless `fresh`."""
    model = build(family, double)
    torch.manual_seed(0)
    handle = loramux.attach(model, config_of(method, **settings), backend="reference")
    if not fresh:
        randomise(handle)
    return model, handle


def randomise(handle: loramux.Handle, seed: int = 1) -> None:
    draw = torch.Generator().manual_seed(seed)
    dtype = next(handle.model.parameters()).dtype
    for name, parameter in adapter_of(handle).named_parameters():
        std = 0.5 if name.startswith("routers_by_key") else 0.2
        parameter.data = std * torch.randn(parameter.shape, generator=draw, dtype=dtype)


def run(model: nn.Module, handle: loramux.Handle, tasks: Sequence[str] | None = ASKED) -> Tensor:
    with handle.batch(tasks=tasks):
        return model(input_ids=IDS, attention_mask=MASK).logits


def expert(rows: Rows, slot: int) -> LowRank:
    """Leaves shared with the attached rows; experts with one A share that, too."""
    at = rows.slot_rows(slot)
    a = rows.a if rows.tied else rows.a[at]
    return LowRank(a, rows.b[at].T, rows.spans.scale[slot])


def params_of(handle: loramux.Handle) -> dict[str, Mixture]:
    adapter = adapter_of(handle)
    routers: Any = adapter.routers
    return {
        path: Mixture(
            [expert(rows, slot) for slot in range(rows.spans.num_slots)],
            routers[path].weight,
            getattr(routers[path], "embedding", None),
        )
        for path, rows in adapter.rows.items()
    }


def oracle(
    method: str, handle: loramux.Handle, family: str = "llama", *, double: bool = False
) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    model = build(family, double).requires_grad_(False)
    return site_mixture.oracle_logits(model, IDS, MASK, params_of(handle), METHODS[method][1])


def assert_is_oracle(method: str, family: str, *, double: bool) -> None:
    model, handle = attached(method, family, double=double)
    got = run(model, handle).detach()
    expected, details = oracle(method, handle, family, double=double)
    close(got[REAL], expected.detach()[REAL])
    records = {record.path: record for record in handle.routing()}
    assert records.keys() == details.keys()
    for path, found in details.items():
        gates, weights = records[path].gates.detach(), found["weights"].detach()
        if method == "moelora":
            close(gates, weights[:, 0].to(gates.dtype))
        else:
            real = REAL.reshape(-1)
            close(gates[real], weights.reshape(-1, weights.shape[-1])[real].to(gates.dtype))
