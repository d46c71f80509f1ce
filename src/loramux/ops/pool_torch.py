"""The group call in torch: its definition, and what runs without a compiler or in dtypes the kernel does not know.

Letters: N tokens, M FFN rows, P pairs, n pairs of one slot, r rank, I input width, O output width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from loramux.ops.contract import Pairs, RowMap
from loramux.ops.gates import LateCall
from loramux.ops.rows import fold_rows, to_rows
from loramux.ops.slots import SlotTable


class Linear(Protocol):
    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def site(self) -> int | None: ...


@torch.no_grad()
def group_torch(
    x: Tensor,
    members: Sequence[Linear],
    table: SlotTable | None,
    pairs: Sequence[Pairs | None],
    *,
    enter: RowMap | None = None,
    exit: RowMap | None = None,
    gate: LateCall | None = None,
) -> list[Tensor]:
    if gate is not None:
        write_late(x, members[0], table, pairs[0], gate)
    outputs = []
    for member, member_pairs in zip(members, pairs, strict=True):
        y = _one(x.reshape(-1, x.shape[-1]), member, table, member_pairs, enter, exit)
        lead = math.prod(x.shape[:-2])
        outputs.append(y.view(*x.shape[:-2], y.shape[0] // lead, y.shape[1]))
    return outputs


def _one(
    x: Tensor,
    member: Linear,
    table: SlotTable | None,
    pairs: Pairs | None,
    enter: RowMap | None,
    exit: RowMap | None,
) -> Tensor:
    base = functional.linear(x if exit is None else fold_rows(x, exit), member.weight)
    y = base if member.bias is None else base + member.bias
    if enter is not None:
        y = to_rows(y, enter)
    if pairs is None or table is None or member.site is None:
        return y
    wide = torch.promote_types(x.dtype, torch.float32)
    change = torch.zeros(pairs.num_dst, y.shape[1], dtype=wide, device=y.device)
    add_pairs(change, x, table, member.site, pairs, member.weight)
    return (y.to(wide) + change).to(y.dtype)


def apply_torch(y: Tensor, x: Tensor, table: SlotTable, site: int, pairs: Pairs) -> Tensor:
    """y += LoRA."""
    refuse_gains(table, site, pairs)
    change = torch.zeros_like(y, dtype=torch.promote_types(y.dtype, torch.float32))
    add_pairs(change, x, table, site, pairs, None)
    return y.copy_(y + change)


def add_pairs(
    change: Tensor, x: Tensor, table: SlotTable, site: int, pairs: Pairs, weight: Tensor | None
) -> None:
    """Adds to `change` [D, O], of fp32 or wider. `weight`: the base, for slots with a DoRA gain; None leaves it out."""
    wide = change.dtype
    for slot in torch.unique(pairs.slot).tolist():
        if slot < 0:
            continue
        mine = (pairs.slot == slot).nonzero()[:, 0]
        a, b, gain, scale = table.rows_of(slot, site)
        if a.shape[0] == 0 and gain is None:
            continue
        x_nI = x[pairs.src[mine].long()].to(wide)
        t_nr = x_nI @ a.to(wide).T
        if pairs.rank_weight is not None:
            t_nr = t_nr * pairs.rank_weight[mine, : t_nr.shape[1]]
        delta_nO = scale * (t_nr @ b.to(wide))
        if gain is not None and weight is not None:
            base_nO = functional.linear(x_nI, weight.to(wide))
            delta_nO = gain * (base_nO + delta_nO) - base_nO
        change.index_add_(
            0, pairs.dst[mine].long(), delta_nO * pairs.weight[mine].to(wide).unsqueeze(1)
        )


def refuse_gains(table: SlotTable, site: int, pairs: Pairs) -> None:
    gained = (table.gain_at[site] != table.nothing).nonzero()[0].tolist()
    if gained and not set(gained).isdisjoint(pairs.slot.tolist()):
        raise ValueError(
            "a DoRA slot rescales what the base gives; use group_linear, which computes both"
        )


def write_late(
    x: Tensor, member: Linear, table: SlotTable | None, pairs: Pairs | None, call: LateCall
) -> None:
    """The weights of a unit, from t = A x at its first site, into pairs.weight."""
    if table is None or member.site is None or pairs is None:
        raise ValueError("a late gate reads the first linear of the group: it needs pairs there")
    rows = x.reshape(-1, x.shape[-1])
    slot_P, src_P = pairs.slot.tolist(), pairs.src.tolist()
    for token, g, first in zip(
        call.token.tolist(), call.gate.tolist(), call.pair.tolist(), strict=True
    ):
        gate = call.gates[g]
        last = first + gate.num_experts
        slots = slot_P[first:last]
        a_rI = [table.rows_of(slot, member.site)[0].float() for slot in slots if slot >= 0]
        fits = len(a_rI) == gate.num_experts and set(src_P[first:last]) == {token}
        if not fits or sum(a.shape[0] for a in a_rI) != gate.num_rows:
            raise ValueError("a late gate is for other experts than its pairs name")
        t_1R = (torch.cat(a_rI) @ rows[token].float()).unsqueeze(0)
        weight_E = gate.weights(t_1R.cpu())[0]
        for written in (pairs.weight, *call.also):
            written[first:last] = weight_E.to(written.device)
