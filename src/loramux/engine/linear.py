"""The engine's linears: those that read one input (q/k/v, gate/up) are a group, one call for the whole batch.

The first linear of a group to be called computes all of them; the others hand out what is waiting, if they are given
the very same tensor. Few rows on a CPU run in the C kernel, base included; many rows run the base in torch and add
the adapters.

Letters: N rows, I input width, O output width, E experts of an entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from loramux.core.types import Site
from loramux.engine.blockrows import BlockRows
from loramux.engine.latecalls import LatePlan, run_late, share_late
from loramux.engine.program import Program
from loramux.engine.siteroutes import route_sites
from loramux.ops import pool
from loramux.ops.contract import Pairs, RowMap
from loramux.ops.gates import LateCall
from loramux.ops.rows import fold_rows, to_rows

if TYPE_CHECKING:
    from loramux.engine.wiring import Wiring


class EngineLinear(nn.Module):
    """Stands where a linear of the model stood; closing the engine puts the very same object back."""

    serves_engine = True

    def __init__(self, base_layer: nn.Module, group: Group, place: int):
        super().__init__()
        self.base_layer = base_layer
        self._run = group.run
        self.place = place

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self.place, x)


@dataclass(eq=False)
class Call:
    """What a group does in a program. `alone`: its members cannot share one call, since a later one has a late gate."""

    pairs: list[Pairs | None]
    rows: BlockRows | None
    role: str
    late: list[LatePlan | None]
    is_fused: bool
    bound: Callable[[Tensor], list[Tensor]] | None = None

    def __post_init__(self) -> None:
        first = self.pairs[0]
        apart = any(
            p is not None and first is not None and p.weight is not first.weight for p in self.pairs
        )
        gate = self.late[0]
        apart = apart and gate is not None and gate.call is not None and not gate.is_shared
        self.alone = apart or any(plan is not None for plan in self.late[1:])
        biased = self.rows is not None and self.rows.bias_N is not None
        unshared = [p for p in self.late if p is not None and not p.is_shared]
        self.is_extra = biased or bool(unshared)


@dataclass(eq=False)
class Group:
    """Linears of one input. `indices`: their sites in the slot table, None for a linear that takes no adapters."""

    number: int
    wiring: Wiring
    paths: list[str]
    layers: list[nn.Module]
    sites: list[Site | None]
    indices: list[int | None]
    is_fusable: bool
    members: list[pool.Member] = field(default_factory=list)
    given: Tensor | None = None
    waiting: list[Tensor | None] = field(default_factory=list)

    def run(self, place: int, x: Tensor) -> Tensor:
        if place and self.given is x:
            y = self.waiting[place]
            if y is not None:
                self.waiting[place] = None
                if place == len(self.layers) - 1:
                    self.given = None  # handed out: nothing of the step is kept
                return y
        out = self.compute(x)
        if place == 0 and len(out) > 1:
            self.given, self.waiting = x, [None, *out[1:]]
        return out[place]

    def forget(self) -> None:
        """Drop what a failed step may have left."""
        self.given, self.waiting = None, []

    def compute(self, x: Tensor) -> list[Tensor]:
        """Outputs of all members, [1, rows, O] each for x [1, rows, I]."""
        program = self.wiring.program
        if program is None:
            return [layer(x) for layer in self.layers]
        if program.sited:
            route_sites(program, self, x)
        call: Call | None = program.calls.get(self.number)
        if call is None:
            call = program.calls[self.number] = self._plan(program, x)
        if call.bound is not None:
            out = call.bound(x)
        elif call.is_fused:
            out = self._fused(x, call, program)
        else:
            out = self._torch(x.reshape(-1, x.shape[-1]), call, program)
            if x.dim() == 3:
                out = [y.unsqueeze(0) for y in out]
        if call.is_extra:
            self._after(call, program, out)
        return out

    def _after(self, call: Call, program: Program, out: list[Tensor]) -> None:
        """What few steps need: late gates of the kernel shared with their units, biases that rows counted wrongly."""
        if call.is_fused and not call.alone:
            for plan, pairs in zip(call.late, call.pairs, strict=True):
                if plan is not None and pairs is not None:
                    share_late(plan, program, pairs)
        bias_N = None if call.rows is None or call.role != "exit" else call.rows.bias_N
        if bias_N is None:
            return
        for y, member in zip(out, self.members, strict=True):
            if member.bias is not None:
                y += ((bias_N - 1).unsqueeze(1) * member.bias).to(y.dtype)

    # --- Planning ---------------------------------------------------------------------------------

    def _plan(self, program: Program, x: Tensor) -> Call:
        site = self.sites[0]
        rows = program.blocks.get(site.block) if site is not None else None
        role = "plain" if site is None or rows is None else site.role
        pairs: list[Pairs | None] = []
        for index in self.indices:
            if index is None:
                pairs.append(None)
            elif rows is not None and role != "plain":
                pairs.append(rows.pairs_at(index, role))
            else:
                pairs.append(program.pairs_at(index))
        num_rows = x.numel() // x.shape[-1]
        if rows is not None and role != "plain":
            num_rows = rows.map.num_rows
        is_fused = self.is_fusable and num_rows <= pool.max_rows(
            self.members, self.wiring.table, enters=role == "enter"
        )
        is_fused = is_fused and self._can_fuse(program, role)
        acting = rows if role != "plain" else None
        late: list[LatePlan | None] = []
        for path, own in zip(self.paths, pairs, strict=True):
            waiting = program.late.get(path, [])
            if not waiting or own is None:
                late.append(None)
                continue
            late.append(LatePlan.make(role, waiting, acting, own, program if is_fused else None))
        call = Call(pairs, acting, role, late, is_fused)
        if (
            is_fused
            and not call.alone
            and not any(plan is not None and plan.torch for plan in late)
        ):
            call.bound = self._bind(call)
        return call

    def _can_fuse(self, program: Program, role: str) -> bool:
        """DoRA experts that are rows of an FFN rescale the base per row, which the kernel does not do."""
        return role == "plain" or not program.uses_dora

    # --- Few rows: one call for base and adapters ------------------------------------------------

    def _fused(self, x: Tensor, call: Call, program: Program) -> list[Tensor]:
        enter, leave = _maps(call)
        table = self.wiring.table
        if not call.alone:
            gate = self._gate(call, 0, x, program)
            return pool.group_linear(
                x, self.members, table, call.pairs, enter=enter, exit=leave, gate=gate
            )
        out = []
        for place, member in enumerate(self.members):
            gate = self._gate(call, place, x, program)
            out += pool.group_linear(
                x, [member], table, [call.pairs[place]], enter=enter, exit=leave, gate=gate
            )
            plan, pairs = call.late[place], call.pairs[place]
            if plan is not None and pairs is not None:
                share_late(plan, program, pairs)
        return out

    def _gate(self, call: Call, place: int, x: Tensor, program: Program) -> LateCall | None:
        plan = call.late[place]
        if plan is None:
            return None
        run_late(plan, program, x.reshape(-1, x.shape[-1]))
        return plan.call

    def _bind(self, call: Call) -> Callable[[Tensor], list[Tensor]]:
        plan = call.late[0]
        enter, leave = _maps(call)
        return pool.bind_group(
            self.members, self.wiring.table, call.pairs, enter=enter, exit=leave,
            gate=None if plan is None else plan.call,
        )  # fmt: skip

    # --- Many rows: the base in torch, then the adapters ------------------------------------------

    def _torch(self, x: Tensor, call: Call, program: Program) -> list[Tensor]:
        out = []
        for place, layer in enumerate(self.layers):
            pairs, index = call.pairs[place], self.indices[place]
            plan = call.late[place]
            if plan is not None:
                run_late(plan, program, x)
            acts = pairs is not None and index is not None and pairs.num_pairs > 0
            if acts and program.uses_dora:
                out += self._dense(x, place, call)
                continue
            y = self._base(layer, x, call)
            if acts:
                assert pairs is not None and index is not None
                y = pool.apply_many(y, x, self.wiring.table, index, pairs)
            out.append(y)
        return out

    def _dense(self, x: Tensor, place: int, call: Call) -> list[Tensor]:
        """DoRA rescales what the base gave to each row: the definition, in torch."""
        enter, leave = _maps(call)
        return pool.group_linear_torch(
            x,
            [self.members[place]],
            self.wiring.table,
            [call.pairs[place]],
            enter=enter,
            exit=leave,
        )

    def _base(self, layer: nn.Module, x: Tensor, call: Call) -> Tensor:
        if call.rows is None:
            return layer(x)  # type: ignore[no-any-return]
        if call.role == "enter":
            return to_rows(layer(x), call.rows.map)
        return layer(fold_rows(x, call.rows.map))  # type: ignore[no-any-return]


def _maps(call: Call) -> tuple[RowMap | None, RowMap | None]:
    """(enter, exit) of the kernel contract."""
    if call.rows is None:
        return None, None
    return (call.rows.map, None) if call.role == "enter" else (None, call.rows.map)
