"""Carries the oracles' parameters over into attached adapters, so that both compute with the same numbers.

Letters: R rank rows, E experts, D width, O output width, Q requests, C modules of a layer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loramux
from loramux.core.adapter import Adapter
from loramux.core.bank import Rows
from loramux.core.types import RouteRecord
from oracles import milora, mixlora_model, mole, mole_model
from oracles.lora import LowRank
from pico import build_pico

LORA_FAMILIES = ("llama", "phi3", "gpt2", "qwen3", "gemma")
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float64: {"atol": 1e-9, "rtol": 1e-9},
}


def build_double(family: str = "llama", **overrides: Any) -> nn.Module:
    """A pico model that is fp64 throughout: the norms of transformers round to fp32, which hides or fakes 1e-9."""
    model = build_pico(family, dtype=torch.float64, **overrides)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _double_norm(module)
    return model


def _double_norm(module: Any) -> Any:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    offset = 1.0 if "Gemma" in type(module).__name__ else 0.0

    def forward(x: Tensor) -> Tensor:
        return (module.weight + offset) * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    return forward


def close(got: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Equal to 1e-5 (fp32) or 1e-9 (fp64), relative to the largest value where that is above 1."""
    limit = TOLERANCE[expected.dtype]["atol"] if tolerance is None else tolerance
    limit *= float(expected.detach().abs().max().clamp_min(1))
    torch.testing.assert_close(got, expected, atol=limit, rtol=0)


def set_rows(rows: Rows, experts: Sequence[LowRank | None]) -> None:
    """Slot i becomes expert i; ranks and scales must already be those of the experts."""
    present = [e for e in experts if e is not None]
    assert [0 if e is None else e.A.shape[0] for e in experts] == list(rows.spans.rank)
    for expert, scale in zip(experts, rows.spans.scale, strict=True):
        assert expert is None or abs(expert.scale - scale) < 1e-12
    rows.a.data = torch.cat([e.A for e in present]).detach().clone()
    rows.b.data = torch.cat([e.B.T for e in present]).detach().clone()
    magnitudes = [e.magnitude for e in present if e.magnitude is not None]
    assert (rows.magnitude is not None) == bool(magnitudes)
    if rows.magnitude is not None:
        rows.magnitude.data = torch.stack(magnitudes).detach().clone()


def low_rank(rows: Rows, slot: int = 0) -> LowRank:
    """The other way: leaves of the oracle that share autograd with the attached rows."""
    at = rows.slot_rows(slot)
    magnitude = None if rows.magnitude is None else rows.magnitude[slot]
    return LowRank(rows.a[at], rows.b[at].T, rows.spans.scale[slot], magnitude)


def adapter_of(handle: loramux.Handle) -> Adapter:
    return handle.adapters["default"]


def copy_lora(handle: loramux.Handle, params: Mapping[str, LowRank]) -> None:
    adapter = adapter_of(handle)
    assert adapter.rows.keys() == params.keys()
    for path, rows in adapter.rows.items():
        set_rows(rows, [params[path]])


def lora_params(handle: loramux.Handle) -> dict[str, LowRank]:
    return {path: low_rank(rows) for path, rows in adapter_of(handle).rows.items()}


# -- MiLoRA --------------------------------------------------------------------------------------


def columns(router: nn.Module, modules: Sequence[str]) -> list[int]:
    """For each of the router's columns the oracle's: ours follow the running order, its the module order."""
    names: tuple[str, ...] = router.names  # type: ignore[assignment]
    assert sorted(names) == sorted(modules)
    return [modules.index(name) for name in names]


def copy_milora(handle: loramux.Handle, params: milora.Params, modules: Sequence[str]) -> None:
    copy_lora(handle, params.experts)
    routers: Any = adapter_of(handle).routers
    assert routers.keys() == params.routers.keys()
    for path, router in routers.items():
        theirs = params.routers[path]
        if router.query is not None:
            router.query.data = theirs.W_sa.clone()
        router.weight.data = theirs.W_r[:, columns(router, modules)].clone()
        router.activation.numerator.data = theirs.a.clone()
        router.activation.denominator.data = theirs.b.clone()


def milora_params(handle: loramux.Handle, modules: Sequence[str]) -> milora.Params:
    """Leaves shared with the attached adapter, for comparing gradients."""
    routers: Any = adapter_of(handle).routers
    return milora.Params(
        lora_params(handle),
        {
            path: milora.Router(
                r.query if r.query is not None else torch.zeros(r.weight.shape[0]),
                r.weight[:, torch.tensor(columns(r, modules)).argsort()],
                r.activation.numerator,
                r.activation.denominator,
            )
            for path, r in routers.items()
        },
    )


def by_layer(
    records: Sequence[RouteRecord], modules: Sequence[str], field: str = "gates"
) -> Tensor:
    """[Q, L, C] in the oracle's order of modules."""
    stacked = [
        getattr(r, field)[:, torch.tensor([r.columns.index(name) for name in modules])]
        for r in records
    ]
    return torch.stack(stacked, dim=1)


# -- MixLoRA -------------------------------------------------------------------------------------


def copy_mixlora(handle: loramux.Handle, params: mixlora_model.Params) -> None:
    adapter = adapter_of(handle)
    routers: Any = adapter.routers
    assert routers.keys() == params.routers.keys()
    for path, router in routers.items():
        router.weight.data = params.routers[path].detach().clone()
    for path, rows in adapter.rows.items():
        block, _, name = path.rpartition(".")
        if block in params.experts:
            set_rows(rows, [expert[name] for expert in params.experts[block]])
        else:
            set_rows(rows, [params.linears[path]])


def mixlora_params(handle: loramux.Handle) -> mixlora_model.Params:
    """Leaves shared with the attached adapter."""
    adapter = adapter_of(handle)
    routers: Any = adapter.routers
    experts: dict[str, list[dict[str, LowRank]]] = {}
    linears: dict[str, LowRank] = {}
    for path, rows in adapter.rows.items():
        block, _, name = path.rpartition(".")
        if block not in routers:
            linears[path] = low_rank(rows)
            continue
        own = experts.setdefault(block, [{} for _ in range(rows.spans.num_slots)])
        for slot, expert in enumerate(own):
            expert[name] = low_rank(rows, slot)
    weights = {path: router.weight for path, router in routers.items()}
    return mixlora_model.Params(linears, weights, experts)


# -- MoLE ----------------------------------------------------------------------------------------


def write_experts(
    make_base: Any, params: mole.Params, root: Path, names: Sequence[str]
) -> tuple[str, ...]:
    """One PEFT folder per adapter of the oracle, written through a plain LoRA."""
    folders = []
    for number, name in enumerate(names):
        experts = mole_model.single_expert(params, number)
        first = next(iter(experts.values()))
        rank = first.A.shape[0]
        config = loramux.LoraConfig(
            r=rank, lora_alpha=rank * first.scale, target_modules=tuple(experts)
        )
        handle = loramux.attach(make_base(), config)
        copy_lora(handle, {p: _float32(e) for p, e in experts.items()})
        handle.save(root / name)
        folders.append(str(root / name))
    return tuple(folders)


def _float32(expert: LowRank) -> LowRank:
    return expert._replace(A=expert.A.float(), B=expert.B.float())


def copy_mole(
    handle: loramux.Handle, params: mole.Params, granularity: mole.Granularity
) -> dict[str, str]:
    """Gates (and rows in full precision) of the oracle; returns unit of the oracle -> path of our gate."""
    adapter, model = adapter_of(handle), handle.model
    for path, rows in adapter.rows.items():
        set_rows(rows, params.experts[path])
    units = {}
    routers: Any = adapter.routers
    for path, router in routers.items():
        unit = mole_model.unit_of(path, granularity, model)
        num = router.weight.shape[0]
        router.weight.data = params.gates[unit].e.reshape(num, -1, num).clone()
        router.log_tau.data = params.gates[unit].log_tau.clone()
        units[unit] = path
    assert units.keys() == params.gates.keys()
    return units


def mole_gates(handle: loramux.Handle, granularity: mole.Granularity) -> dict[str, mole.Gate]:
    """Leaves shared with the attached gates, under the oracle's names."""
    routers: Any = adapter_of(handle).routers
    return {
        mole_model.unit_of(path, granularity, handle.model): mole.Gate(
            r.weight.reshape(-1, r.weight.shape[-1]), r.log_tau
        )
        for path, r in routers.items()
    }


# -- comparing gradients -------------------------------------------------------------------------


def same_gradients(
    handle: loramux.Handle, ours: Tensor, theirs: Tensor, tolerance: float = 1e-9
) -> None:
    """d ours and d theirs with respect to everything that is trained."""
    parameters = handle.trainable_parameters()
    found = [
        torch.autograd.grad(value, list(parameters.values()), allow_unused=True, retain_graph=True)
        for value in (ours, theirs)
    ]
    assert any(g is not None and g.abs().max() > 0 for g in found[1])
    for (name, parameter), got, expected in zip(parameters.items(), *found, strict=True):
        zero = torch.zeros_like(parameter)
        got, expected = (zero if g is None else g for g in (got, expected))
        limit = tolerance * float(expected.abs().max().clamp_min(1))
        torch.testing.assert_close(
            got, expected, atol=limit, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def finite_differences(
    value: Any, tensors: Mapping[str, Tensor], samples: int = 6, step: float = 1e-6
) -> None:
    """d value() / d tensor entry by central differences against autograd, at random entries of each tensor (fp64)."""
    leaves = list(tensors.values())
    gradients = torch.autograd.grad(value(), leaves)
    draw = torch.Generator().manual_seed(0)
    for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
        flat, slope = tensor.data.view(-1), gradient.reshape(-1)
        for _ in range(min(samples, flat.numel())):
            at = int(torch.randint(flat.numel(), (), generator=draw))
            before = float(flat[at])
            ends = []
            for end in (before + step, before - step):
                flat[at] = end
                ends.append(float(value().detach()))
            flat[at] = before
            expected = (ends[0] - ends[1]) / (2 * step)
            assert abs(float(slope[at]) - expected) < 1e-6 * max(1.0, abs(expected)), (
                f"{name}[{at}]: autograd {float(slope[at])}, finite difference {expected}"
            )
