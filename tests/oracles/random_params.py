"""Random, non-degenerate parameters for a pico model in the oracles' own layouts.

Every B is non-zero, every router decides, so a comparison cannot pass because something is off.
Letters as in the oracle of each method.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from oracles import milora, mixlora, mixlora_model, mole, mole_model
from oracles.lora import LowRank, random_low_rank
from oracles.surgery import base_weight, decoder_layers, linear_sites


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer_modules(model: nn.Module) -> tuple[str, ...]:
    """Linears of one layer by their path inside it, in module order."""
    return tuple(linear_sites(next(iter(decoder_layers(model).values()))))


def layer_linears(model: nn.Module) -> list[str]:
    """Full paths of the linears of all layers."""
    return [f"{layer}.{name}" for layer in decoder_layers(model) for name in layer_modules(model)]


def model_width(model: nn.Module) -> int:
    return int(model.config.hidden_size)


def lora_params(
    model: nn.Module, rank: int = 4, seed: int = 0, *, scale: float = 1.0, dora: bool = False
) -> dict[str, LowRank]:
    draw = generator(seed)
    dtype = next(model.parameters()).dtype
    return {
        path: random_low_rank(
            model.get_submodule(path), rank, draw, scale=scale, dora=dora, dtype=dtype
        )
        for path in layer_linears(model)
    }


def milora_params(
    model: nn.Module,
    rank: int = 4,
    seed: int = 0,
    *,
    modules: tuple[str, ...] | None = None,
    dora: bool = False,
) -> milora.Params:
    """Routers with an opinion: random W_sa, wide W_r, coefficients moved off the GELU start."""
    modules = layer_modules(model) if modules is None else modules
    draw, width = generator(seed + 1), model_width(model)
    dtype = next(model.parameters()).dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=dtype)

    routers = {
        layer: milora.Router(
            0.3 * normal(width),
            0.5 * normal(width, len(modules)),
            torch.tensor(milora.GELU_A, dtype=dtype) + 0.01 * normal(7),
            torch.tensor(milora.GELU_B, dtype=dtype) + 0.01 * normal(5),
        )
        for layer in decoder_layers(model)
    }
    wanted = {f"{layer}.{name}" for layer in routers for name in modules}
    experts = lora_params(model, rank, seed, dora=dora)
    return milora.Params({p: e for p, e in experts.items() if p in wanted}, routers)


def ffn_experts(
    ffn: mixlora.Ffn,
    num_experts: int,
    rank: int,
    draw: torch.Generator,
    *,
    scale: float = 1.0,
    dora: Sequence[str] = (),
) -> list[dict[str, LowRank]]:
    """Experts for one FFN; the linears named in `dora` get a magnitude."""
    experts = []
    for _ in range(num_experts):
        expert = {}
        for name, (W, _) in ffn.linears.items():
            module = nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype)
            module.weight = nn.Parameter(W.detach().clone())
            expert[name] = random_low_rank(
                module, rank, draw, scale=scale, dora=name in dora, dtype=W.dtype
            )
        experts.append(expert)
    return experts


def ffn_paths(model: nn.Module) -> list[str]:
    return [f"{layer}.mlp" for layer in decoder_layers(model)]


def mixlora_params(
    model: nn.Module,
    num_experts: int = 4,
    rank: int = 4,
    seed: int = 0,
    *,
    scale: float = 1.0,
    dora: bool = False,
) -> mixlora_model.Params:
    draw = generator(seed)
    dtype = next(model.parameters()).dtype
    routers, experts = {}, {}
    for path in ffn_paths(model):
        ffn = mixlora.read_ffn(model.get_submodule(path))
        routers[path] = 0.5 * torch.randn(
            num_experts, model_width(model), generator=draw, dtype=dtype
        )
        names = tuple(ffn.linears) if dora else ()
        experts[path] = ffn_experts(ffn, num_experts, rank, draw, scale=scale, dora=names)
    inside = tuple(path + "." for path in routers)
    everything = lora_params(model, rank, seed + 1, scale=scale, dora=dora)
    linears = {p: e for p, e in everything.items() if not p.startswith(inside)}
    return mixlora_model.Params(linears, routers, experts)


def mole_params(
    model: nn.Module,
    num_experts: int = 3,
    config: mole.Config = mole.Config(),  # noqa: B008 - an immutable tuple
    *,
    ranks: Sequence[int] = (4, 2, 3),
    seed: int = 0,
    gate_std: float = 0.3,
    parallel: bool = False,
    length: int = 1,
) -> mole.Params:
    """Adapters of different rank and scale at every linear, and one gate per unit.

    `gate_std` 0 gives fresh gates (G = 1/N). The width a gate reads is that of the unit's first
    linear to run, which is the first query or fused projection, or the model's width if `parallel`.
    """
    adapters = [
        lora_params(model, ranks[i % len(ranks)], seed + i, scale=1.0 + 0.5 * i)
        for i in range(num_experts)
    ]
    sites = layer_linears(model)
    draw, dtype = generator(seed + 100), next(model.parameters()).dtype
    gates: dict[str, mole.Gate] = {}
    for site in sorted(sites, key=_run_order):
        unit = mole_model.unit_of(site, config.granularity, model)
        if unit in gates:
            continue
        W, _ = base_weight(model.get_submodule(site))
        width = model_width(model) if parallel else W.shape[0]
        rows = num_experts * width * (length if config.pool == "flatten" else 1)
        e = gate_std * torch.randn(rows, num_experts, generator=draw, dtype=dtype)
        log_tau = gate_std * torch.randn((), generator=draw, dtype=dtype)
        gates[unit] = mole.Gate(e, log_tau)
    return mole.Params({site: [a[site] for a in adapters] for site in sites}, gates)


def _run_order(site: str) -> tuple[int, int]:
    """Layer number, then attention output after the other attention linears, then the FFN."""
    layer = next(int(part) for part in site.split(".") if part.isdigit())
    is_ffn = ".mlp." in site
    is_output = site.endswith(("o_proj", "attn.c_proj", "down_proj", "mlp.c_proj"))
    return layer, 2 * is_ffn + is_output
