"""Frozen adapters with numbers that the oracles share: what tests of methods over trained adapters have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loramux
from loramux.core.frozen import FrozenConfig
from loramux.core.types import RouteRecord
from methods.bridge import adapter_of, build_double, set_rows, write_experts
from oracles import lora, mole
from oracles.lora import LowRank
from oracles.random_params import lora_params
from pico import build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29], [90, 33, 12, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
REAL = MASK.bool()
NAMES = ("red", "green", "blue", "grey")

Experts = dict[str, list[LowRank | None]]


def random_experts(model: nn.Module, ranks: Sequence[int] = (4, 2, 3)) -> Experts:
    """Adapters of different rank and scale at every linear."""
    adapters = [
        lora_params(model, rank, seed, scale=1.0 + 0.5 * seed) for seed, rank in enumerate(ranks)
    ]
    return {site: [a[site] for a in adapters] for site in adapters[0]}


def single(experts: Experts, number: int) -> dict[str, LowRank]:
    chosen = {site: entries[number] for site, entries in experts.items()}
    return {site: entry for site, entry in chosen.items() if entry is not None}


class Frozen:
    """A model under `config_class` over adapters on disk; rows in the model's precision, routers left to the caller."""

    def __init__(
        self,
        root: Path,
        config_class: type[FrozenConfig],
        family: str = "llama",
        ranks: Sequence[int] = (4, 2, 3),
        double: bool = True,
        experts: Experts | None = None,
        **options: Any,
    ):
        self.family, self.double = family, double
        self.model: Any = self.base()
        self.experts = random_experts(self.model, ranks) if experts is None else experts
        self.num = len(next(iter(self.experts.values())))
        self.folders = write_experts(
            lambda: build_pico(family),
            mole.Params(self.experts, {}),
            root / family,
            NAMES[: self.num],
        )
        config = config_class(adapters=self.folders, **options)
        self.handle = loramux.attach(self.model, config, backend="reference")
        self.fill()

    def fill(self) -> None:
        """Files hold fp32: put the numbers as they are, and let routers that read rows read them again."""
        adapter = adapter_of(self.handle)
        for path, rows in adapter.rows.items():
            set_rows(rows, self.experts[path])
        for path, router in self.routers.items():
            if self.double:
                router.double()
            if hasattr(router, "bind"):
                router.bind(adapter.rows[path])
        # The rows' order is that of the files; the oracles' dictionaries are put into it.
        self.experts = {path: self.experts[path] for path in adapter.rows}

    def base(self) -> nn.Module:
        return build_double(self.family) if self.double else build_pico(self.family)

    @property
    def routers(self) -> dict[str, Any]:
        return adapter_of(self.handle).routers

    def run(self, ids: Tensor = IDS, mask: Tensor | None = MASK) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).logits

    def records(self) -> dict[str, RouteRecord]:
        return {record.path: record for record in self.handle.routing()}

    def alone(self, number: int) -> Tensor:
        """Logits of one adapter alone, dense."""
        return lora.oracle_logits(self.base(), IDS, MASK, single(self.experts, number)).detach()


def merged_logits(frozen: Frozen, weights: Sequence[float]) -> Tensor:
    """Logits of the base with sum_i c_i s_i B_i A_i added to its weights."""
    from oracles.surgery import model_logits

    merged = frozen.base()
    for site, experts in frozen.experts.items():
        module: Any = merged.get_submodule(site)
        present = [(e, c) for e, c in zip(experts, weights, strict=True) if e is not None]
        module.weight.data = lora.merged_weight(
            module.weight.data, [e for e, _ in present], [c for _, c in present]
        )
    return model_logits(merged, IDS, MASK).detach()


def piecewise(model: Any, ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """Logits of all positions, fed in pieces through a KV cache."""
    cache, start, logits = None, 0, []
    with torch.no_grad():
        for size in sizes:
            out = model(
                input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True
            )
            cache, start = out.past_key_values, start + size
            logits.append(out.logits)
    return torch.cat(logits, dim=1)
