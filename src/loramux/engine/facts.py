"""What the engine must know of an adapter's routers, looked up once per content.

Five kinds of router can sit in an adapter: one that reads the input of a layer or block and weighs its experts (a
sum), one that does so at a single linear, one that turns the tokens of an FFN into rows (top-k experts), a late gate
that reads t = A x at the first site of its unit, and one that reads the bare base's last hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loramux.core.adapter import Adapter
from loramux.core.router import Router
from loramux.core.types import Site
from loramux.ops.gates import LateGate, TopKGate


@dataclass(frozen=True, eq=False)
class LateUnit:
    """The gate of a unit, at its first site. `sites`: indices of all sites it governs."""

    path: str
    router: Router
    gate: LateGate | None  # what the kernel runs; None: the router itself runs in torch
    sites: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class RowBlock:
    """The router of an FFN block, and what the kernel runs instead of it, if it can."""

    path: str
    router: Router
    gate: TopKGate | None


@dataclass(frozen=True, eq=False)
class Facts:
    """layers and sited: routers by the path of a layer or block, and of a linear; hidden: those that run before the
    step (engine/twin.py); governed: the sites they weigh.
    """

    layers: Mapping[str, Router]
    sited: Mapping[str, Router]
    hidden: Mapping[str, Router]
    governed: Mapping[str, tuple[int, ...]]
    blocks: Mapping[str, RowBlock]
    late: Mapping[str, LateUnit]
    late_sites: frozenset[int]
    num_plain: int  # experts of a site outside the row blocks
    routes_on_prompt: bool
    routes_tokens: bool

    @property
    def gate_bytes(self) -> int:
        """What the kernels' fp32 copies of its gates take."""
        late = [unit.gate for unit in self.late.values()]
        gates = [*late, *(block.gate for block in self.blocks.values())]
        tensors = [t for gate in gates for t in vars(gate or object).values() if torch.is_tensor(t)]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def is_late(self) -> bool:
        return bool(self.late)


def find_facts(adapter: Adapter, sites: Sequence[Site]) -> Facts:
    """`sites` are the engine's, in order: their indices are those of the slot table."""
    index = {site.path: i for i, site in enumerate(sites)}
    layers: dict[str, Router] = {}
    sited: dict[str, Router] = {}
    blocks: dict[str, RowBlock] = {}
    for path, router in adapter.hooked_routers():
        if path in adapter.sites:
            sited[path] = router
        elif router.scope == "block":
            gate: Any = router.lowered() if adapter.mask is None else None
            kept = gate if isinstance(gate, TopKGate) else None
            blocks[path] = RowBlock(path, router, kept)
        else:
            layers[path] = router
    governed = {
        path: tuple(
            index[site.path]
            for site in adapter.sites.values()
            if path in (site.layer_path, site.block, site.path, adapter.method.governor_of(site))
        )
        for path in (*layers, *sited, *blocks)
    }
    hidden = dict(adapter.hidden_routers)
    governed |= dict.fromkeys(hidden, tuple(index[path] for path in adapter.sites))
    late = _late_units(adapter, index)
    plain = [
        rows.spans.num_slots
        for path, rows in adapter.rows.items()
        if adapter.sites[path].block not in blocks
    ]
    routers = list(adapter.routers.values())
    return Facts(
        layers=layers,
        sited=sited,
        hidden=hidden,
        governed=governed,
        blocks=blocks,
        late=late,
        late_sites=frozenset(s for unit in late.values() for s in unit.sites),
        num_plain=max(plain, default=0),
        routes_on_prompt=any(r.when == "prompt" for r in routers),
        routes_tokens=any(r.when == "token" for r in routers),
    )


def _late_units(adapter: Adapter, index: Mapping[str, int]) -> dict[str, LateUnit]:
    units: dict[str, list[int]] = {}
    for path, site in adapter.sites.items():
        unit = adapter.method.unit_of(site)
        if unit is not None:
            units.setdefault(unit, []).append(index[path])
    found = {}
    for path, own in units.items():
        router = adapter.routers[path]
        lowers = router.when == "token" and adapter.mask is None
        gate: Any = router.lowered() if lowers else None
        kept = gate if isinstance(gate, LateGate) else None
        found[path] = LateUnit(path, router, kept, tuple(own))
    return found
