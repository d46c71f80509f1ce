"""Puts the engine's linears and hooks into an unmodified model, and takes them out again without a trace.

Letters: N tokens, D width of a module's input, E experts of an entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loramux.core.guards import check_bare
from loramux.core.types import Route, Site
from loramux.engine.blockrows import BlockRows, attach_gates, lay_out, take_routes, widened
from loramux.engine.latecalls import ask_router
from loramux.engine.linear import EngineLinear, Group
from loramux.engine.program import Entry, Program
from loramux.engine.siteroutes import dense
from loramux.ops.pool import Member
from loramux.ops.slots import SlotTable

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


class Wiring:
    """The model's side of the engine. `program` is what the current forward adds; None: the bare base."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        table: SlotTable,
        groups: Sequence[Sequence[str]],
        head: str | None,
    ):
        check_bare(model)
        self.model, self.sites, self.table = model, list(sites), table
        self.site_index = {site.path: i for i, site in enumerate(sites)}
        self.by_block: dict[str, list[tuple[int, Site]]] = {}
        for i, site in enumerate(sites):
            self.by_block.setdefault(site.block, []).append((i, site))
        self.program: Program | None = None
        self.device = next(model.parameters()).device
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self._listening: dict[str, Any] = {}
        self.groups: list[Group] = []
        try:
            for paths in [*groups, *([[head]] if head else [])]:
                self._wrap(paths)
        except BaseException:
            self.close()
            raise

    def _wrap(self, paths: Sequence[str]) -> None:
        layers = [self.model.get_submodule(path) for path in paths]
        indices = [self.site_index.get(path) for path in paths]
        sites = [None if i is None else self.sites[i] for i in indices]
        fusable = all(
            type(layer) is nn.Linear
            # A quantised weight may be a subclass that calls itself fp32: a kernel must not read its memory.
            and type(layer.weight) in (nn.Parameter, Tensor)
            and layer.weight.dtype in KERNEL_DTYPES
            and layer.weight.is_contiguous()
            for layer in layers
        )
        group = Group(len(self.groups), self, list(paths), layers, sites, indices, fusable)
        group.members = [
            Member(_weight_OI(layer, site), layer.bias, index)  # type: ignore[arg-type]
            for layer, site, index in zip(layers, sites, indices, strict=True)
        ]
        self.groups.append(group)
        for place, (path, layer) in enumerate(zip(paths, layers, strict=True)):
            parent_path, _, name = path.rpartition(".")
            parent = self.model.get_submodule(parent_path)
            wrapped = EngineLinear(layer, group, place)
            wrapped.training = layer.training
            setattr(parent, name, wrapped)
            self._replaced.append((parent, name, layer))

    def close(self) -> None:
        """Give the model back its own linears; no hook stays."""
        for hook in self._listening.values():
            hook.remove()
        self._listening.clear()
        self.forget()
        for parent, name, layer in reversed(self._replaced):
            setattr(parent, name, layer)
        self._replaced.clear()
        self.groups.clear()
        self.program = None

    # --- Around a forward -----------------------------------------------------------------------

    def begin(self, program: Program | None) -> None:
        """The next forward runs this program; routers' modules are listened to as long as it needs them."""
        self.program = program
        wanted: set[str] = set()
        if program is not None:
            wanted = {*program.layers, *program.routed_blocks}
        if wanted == self._listening.keys():
            return
        for path in self._listening.keys() - wanted:
            self._listening.pop(path).remove()
        for path in [p for p in sorted(wanted) if p not in self._listening]:
            self._listening[path] = self._listen(path)

    def end(self) -> None:
        """The forward is over, well or not."""
        self.program = None

    def forget(self) -> None:
        for group in self.groups:
            group.forget()

    def _listen(self, path: str) -> Any:
        def arrived(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            program = self.program
            if program is None:
                return
            x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
            if x is None:
                raise ValueError(f"{path} was called without hidden states; its router cannot run")
            self._arrived(program, path, x.reshape(-1, x.shape[-1]))

        module = self.model.get_submodule(path)
        return module.register_forward_pre_hook(arrived, with_kwargs=True)

    # --- Routers that read a module's input -----------------------------------------------------

    def _arrived(self, program: Program, path: str, x_ND: Tensor) -> None:
        for entry in program.layers.get(path, ()):
            route = ask_router(entry, entry.facts.layers[path], x_ND[entry.tokens])
            self._weigh(program, entry, path, route)
        entries = program.routed_blocks.get(path)
        if entries:
            self._lay_rows(program, path, entries, x_ND)

    def _weigh(self, program: Program, entry: Entry, path: str, route: Route) -> None:
        """A route that sums its experts: the same weights at all governed sites, times each site's own gate."""
        router = entry.facts.layers.get(path) or entry.facts.blocks[path].router
        governed = entry.facts.governed[path]
        base_nE = dense(route, entry)
        if route.gate is None:
            self._set(program, entry, governed, base_nE, router.when)
            return
        for site in governed:
            column = route.column.get(self.sites[site].path)
            gated = base_nE if column is None else base_nE * route.gate[0, column]
            self._set(program, entry, (site,), gated, router.when)

    def _set(
        self, program: Program, entry: Entry, sites: Sequence[int], gate_nE: Tensor, when: str
    ) -> None:
        program.fill(entry, sites, gate_nE)
        if when == "prompt":
            program.keep(entry, sites, gate_nE[0])

    def _lay_rows(
        self, program: Program, path: str, entries: Sequence[Entry], x_ND: Tensor
    ) -> None:
        routes: dict[int, Route] = {}  # by entry: what routers without a kernel decided
        for entry in entries:
            own = entry.facts.blocks[path]
            if own.gate is None:
                route = ask_router(entry, own.router, x_ND[entry.tokens])
                if route.combine == "rows":
                    routes[id(entry)] = widened(route, len(entry.slots))
                else:
                    self._weigh(program, entry, path, route)
        rows = program.blocks.get(path)
        if rows is None:
            rows = self._lay_out(program, path, entries, routes)
            if rows is None:
                return
        elif rows.refreshes:
            rows.refresh(program)
        if rows.call is not None:
            rows.call.run(x_ND)
        take_routes(rows, routes)

    def _lay_out(
        self,
        program: Program,
        path: str,
        entries: Sequence[Entry],
        routes: Mapping[int, Route],
    ) -> BlockRows | None:
        """Rows of a block for as long as the program lasts: how many a token has depends on its adapter only."""
        chosen = []
        for entry in entries:
            gate = entry.facts.blocks[path].gate
            if gate is not None:
                chosen.append((entry, gate.k))
            elif id(entry) in routes:
                chosen.append((entry, len(entry.slots)))
        if not chosen:
            return None
        rows = program.blocks[path] = lay_out(program, self.by_block[path], chosen)
        rows.refreshes = rows.refreshes or len(chosen) < len(entries)
        attach_gates(rows, path)
        return rows


def _weight_OI(layer: nn.Module, site: Site | None) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if site is not None and site.transposed else weight
