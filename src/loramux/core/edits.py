"""Edits of rank rows while an adapter trains: rows, row gates and optimizer moments move by one gather.

Why in one place: a copied rank whose moments stay behind is pushed by somebody else's history. In the usual boolean
indexing `state[key][mask].copy_(...)` writes to a temporary and changes nothing; here every tensor is computed first
and then installed whole. Where the number of rows stays the same the Parameter objects stay the same.

Letters: R rank rows of a site before the edit, S after it.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loramux.core.adapter import Adapter
from loramux.core.bank import Rows, gather_rows, init_a
from loramux.core.rowgate import moved_gate
from loramux.ops.contract import Spans

FRESH = -1
Moments = Literal["copy", "zero", "keep"]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A and B of every site with their optimizer moments, as they were: `PATH|a`, `PATH|b|exp_avg` -> tensor."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Editor:
    """Edits one adapter under training. `parameters`, the caller's name -> parameter, is kept up to date."""

    def __init__(
        self,
        adapter: Adapter,
        optimizer: torch.optim.Optimizer,
        parameters: MutableMapping[str, nn.Parameter],
        generator: torch.Generator,
    ):
        self.adapter = adapter
        self.optimizer = optimizer
        self.parameters = parameters
        self.generator = generator

    @torch.no_grad()
    def gather(
        self,
        path: str,
        slot: int,
        index: Sequence[int],
        snapshot: Snapshot | None = None,
        moments: Moments = "copy",
    ) -> None:
        """Rebuild `slot` of the site from its own rows, in this order; -1 is a fresh row (A random, B and moments 0).

        snapshot: rows that move (index[i] != i) take A, B and their moments from it instead of the present ones; row
        gates always move as they are now. moments: of the rows that move, "zero" forgets them and "keep" leaves those
        of the row that was there before; both only where the number of rows stays the same.
        """
        rows = self._rows(path)
        take_S, ranks = _take(rows, slot, index)
        if moments != "copy" and len(take_S) != rows.spans.num_rows:
            raise ValueError(f"moments={moments!r} needs an edit that keeps the number of rows")
        if snapshot is not None and snapshot.tensors[f"{path}|b"].shape != rows.b.shape:
            raise ValueError(
                f"the snapshot holds {len(snapshot.tensors[f'{path}|b'])} rows of {path}, which has {len(rows.b)} now; "
                "take a new snapshot after ranks were added or removed"
            )
        fresh_S = take_S < 0
        spans = rows.spans
        if len(take_S) != spans.num_rows:
            rows.spans = Spans.packed(ranks, spans.scale)
        for letter in ("a", "b"):
            old: nn.Parameter = getattr(rows, letter)
            name = f"{path}|{letter}"
            value = _moved(
                old.detach(), take_S, None if snapshot is None else snapshot.tensors[name]
            )
            if letter == "a" and bool(fresh_S.any()):
                value[fresh_S] = init_a(int(fresh_S.sum()), value.shape[1], self.generator).to(
                    value
                )
            states = self._moved_moments(old, take_S, moments, name, snapshot)
            self._install(rows, letter, value, states)
        self._gather_gate(rows, take_S)
        self._refresh()

    def snapshot(self) -> Snapshot:
        """Copies of all rows and their moments."""
        kept: dict[str, Tensor] = {}
        for path, rows in self.adapter.rows.items():
            for letter in ("a", "b"):
                parameter: nn.Parameter = getattr(rows, letter)
                kept[f"{path}|{letter}"] = parameter.detach().clone()
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    if torch.is_tensor(value) and value.shape == parameter.shape:
                        kept[f"{path}|{letter}|{key}"] = value.detach().clone()
        return Snapshot(kept)

    @torch.no_grad()
    def reset_moments(self, parameter: nn.Parameter) -> None:
        """Zero everything per element that the optimizer keeps of a parameter; its step count stays."""
        for value in self.optimizer.state.get(parameter, {}).values():
            if torch.is_tensor(value) and value.dim() > 0:
                value.zero_()

    def resize(self, ranks: Mapping[str, Sequence[int]]) -> None:
        """Give the slots of sites these ranks, rows unspecified: before saved values are put in their place."""
        drawn, self.generator = self.generator, torch.Generator()
        for path, wanted in ranks.items():
            for slot, rank in enumerate(wanted):
                if self._rows(path).spans.rank[slot] != rank:
                    self.gather(path, slot, [FRESH] * rank)
        self.generator = drawn

    # --- Inside -----------------------------------------------------------------------------------

    def _rows(self, path: str) -> Rows:
        rows = self.adapter.rows.get(path)
        if rows is None:
            raise ValueError(
                f"adapter {self.adapter.name!r} has no rows at {path!r}; it has {list(self.adapter.rows)}"
            )
        return rows

    def _moved_moments(
        self,
        parameter: nn.Parameter,
        take_S: Tensor,
        how: Moments,
        name: str = "",
        snapshot: Snapshot | None = None,
    ) -> dict[str, Tensor]:
        if how == "keep":
            return {}
        found = {}
        for key, now in self.optimizer.state.get(parameter, {}).items():
            if not torch.is_tensor(now) or now.dim() == 0:
                continue
            if now.shape != parameter.shape:
                # Factored moments know rows and columns only together: they start anew for this matrix.
                found[key] = torch.zeros_like(now)
                continue
            before = None if snapshot is None else snapshot.tensors.get(f"{name}|{key}")
            found[key] = _moved(now, take_S, before)
            if how == "zero":
                found[key][take_S != torch.arange(len(take_S), device=take_S.device)] = 0
        return found

    def _install(
        self, module: nn.Module, name: str, value: Tensor, moments: Mapping[str, Tensor]
    ) -> None:
        """Give a parameter its new value, and the optimizer the moments that go with it."""
        old: nn.Parameter = getattr(module, name)
        if value.shape == old.shape:
            old.copy_(value)
            for key, moment in moments.items():
                self.optimizer.state[old][key].copy_(moment)
            return
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        setattr(module, name, new)
        for group in self.optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        state: dict[str, Any] = self.optimizer.state.pop(old, {})
        if state and all(moment.shape == new.shape for moment in moments.values()):
            self.optimizer.state[new] = {**state, **moments}

    def _gather_gate(self, rows: Rows, take_S: Tensor) -> None:
        gate = rows.gate
        if gate is None:
            return
        for name, value in moved_gate(gate, take_S).items():
            holder, _, leaf = name.rpartition(".")
            module = gate.get_submodule(holder)
            old = getattr(module, leaf)
            if isinstance(old, nn.Parameter):
                self._install(module, leaf, value, self._moved_moments(old, take_S, "copy"))
            else:
                old.copy_(value)

    def _refresh(self) -> None:
        found = self.adapter.trainable()
        if any(found[name] is not p for name, p in self.parameters.items() if name in found):
            self.parameters.clear()
            self.parameters.update(found)


def ranks_of(adapter: Adapter) -> dict[str, list[int]]:
    """The rank of every slot, by site."""
    return {path: list(rows.spans.rank) for path, rows in adapter.rows.items()}


def _take(rows: Rows, slot: int, index: Sequence[int]) -> tuple[Tensor, list[int]]:
    """(gather index over all rows of the site, the ranks of its slots afterwards)."""
    if rows.tied:
        raise ValueError("experts that share one A cannot be edited rank by rank")
    start, rank = rows.spans.start[slot], rows.spans.rank[slot]
    bad = [i for i in index if not FRESH <= i < rank]
    if bad:
        raise ValueError(f"slot {slot} has rows 0..{rank - 1} (-1 for a fresh one), got {bad}")
    own = [start + i if i >= 0 else FRESH for i in index]
    all_rows = [*range(start), *own, *range(start + rank, rows.spans.num_rows)]
    ranks = [*rows.spans.rank[:slot], len(own), *rows.spans.rank[slot + 1 :]]
    return torch.tensor(all_rows, dtype=torch.long, device=rows.b.device), ranks


def _moved(now: Tensor, take_S: Tensor, before: Tensor | None) -> Tensor:
    """now[take], zeros where -1; rows that change their place come from `before`, if that is given."""
    out = gather_rows(now, take_S)
    if before is not None:
        moved_S = (take_S >= 0) & (take_S != torch.arange(len(take_S), device=take_S.device))
        out[moved_S] = before.to(out)[take_S[moved_S]]
    return out
