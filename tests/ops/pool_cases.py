"""What the group call is tested on: tables of unlike adapters, and the call restated as a loop over single pairs.

Letters: N tokens, M FFN rows, P pairs, E experts, S sites, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loramux.ops.contract import Pairs, RowMap
from loramux.ops.gates import LateGate
from loramux.ops.pool import Member, PackedRows, SlotTable

NUM_SLOTS = 6
RANKS = (3, 8, 0, 17, 1, 4)


def pack(
    widths: Sequence[tuple[int, int]],
    ranks: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    dora: bool = False,
) -> PackedRows:
    """ranks[e][s]. All experts in one blob; the sites of an expert one after the other."""
    rng = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    a_at, b_at, gain_at = (np.full((len(ranks), len(widths)), -1, np.int64) for _ in range(3))

    def place(value: Tensor) -> int:
        at = sum(part.shape[0] for part in parts)
        parts.append(value.contiguous().view(-1).view(torch.uint8))
        return at

    for e, own in enumerate(ranks):
        for s, ((d_in, d_out), rank) in enumerate(zip(widths, own, strict=True)):
            if dora:
                gain_at[e, s] = place(1 + 0.3 * torch.randn(d_out, generator=rng))
            if rank:
                a = torch.randn(rank, d_in, generator=rng) / d_in**0.5
                b = torch.randn(rank, d_out, generator=rng) / rank**0.5
                a_at[e, s], b_at[e, s] = place(a.to(dtype)), place(b.to(dtype))
            pad = -sum(part.shape[0] for part in parts) % 4
            parts.append(torch.zeros(pad, dtype=torch.uint8))
    scale = np.array([[0.5 + e + 0.25 * s for s in range(len(widths))] for e in range(len(ranks))])
    return PackedRows(
        torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8),
        dtype,
        a_at,
        b_at,
        np.array(ranks, np.int32),
        scale,
        gain_at if dora else None,
    )


def mixed_table(widths: Sequence[tuple[int, int]], *, dora: bool = False) -> SlotTable:
    table = SlotTable(widths, NUM_SLOTS + 1)
    fill_mixed(table, dora=dora)
    return table


def fill_mixed(table: SlotTable, *, dora: bool = False) -> None:
    """Slots 0..5: two contents of two experts (fp32, bf16), two of one (DoRA if wanted; bf16, fp32)."""
    widths = table.widths
    of = [[rank if (rank + s) % 5 else 0 for s in range(len(widths))] for rank in RANKS]
    table.put([4, 0], pack(widths, [of[4], of[0]], seed=1))
    table.put([1, 5], pack(widths, [of[1], of[5]], seed=2, dtype=torch.bfloat16))
    table.put([3], pack(widths, [of[3]], seed=3, dtype=torch.bfloat16, dora=dora))
    table.put([2], pack(widths, [of[2]], seed=4, dora=dora))


def random_pairs(
    num_src: int, num_dst: int, num_pairs: int, seed: int = 0, *, same: bool = True
) -> Pairs:
    """`same`: a pair writes the row that it reads. Some pairs are padding."""
    rng = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (num_pairs,), generator=rng, dtype=torch.int32)

    src = integers(0, num_src)
    dst = src.clone() if same else integers(0, num_dst)
    weight = torch.randn(num_pairs, generator=rng)
    return Pairs(src, dst, integers(-1, NUM_SLOTS), weight, num_src, num_dst)


@dataclass
class Group:
    x: Tensor
    members: list[Member]
    table: SlotTable
    pairs: list[Pairs | None]
    enter: RowMap | None = None
    exit: RowMap | None = None

    def alone(self, token: int) -> Group:
        """The same token without the others; only for groups without FFN rows."""
        pairs: list[Pairs | None] = []
        for own in self.pairs:
            if own is None:
                pairs.append(None)
                continue
            keep = own.dst == token
            zero = torch.zeros(int(keep.sum()), dtype=torch.int32)
            pairs.append(Pairs(zero, zero, own.slot[keep], own.weight[keep], 1, 1))
        return Group(self.x[token : token + 1], self.members, self.table, pairs)


def random_group(
    num_rows: int,
    *,
    d_in: int = 64,
    d_outs: Sequence[int] = (48, 16, 80),
    dtype: torch.dtype = torch.float32,
    dora: bool = False,
    bias: bool = True,
    seed: int = 0,
) -> Group:
    """Three linears with pairs of their own, the last one without adapters."""
    rng = torch.Generator().manual_seed(seed)
    widths = [(d_in, d_out) for d_out in d_outs]
    members = [
        Member(
            (torch.randn(d_out, d_in, generator=rng) / d_in**0.5).to(dtype),
            torch.randn(d_out, generator=rng).to(dtype) if bias else None,
            site,
        )
        for site, d_out in enumerate(d_outs)
    ]
    pairs: list[Pairs | None] = [
        random_pairs(num_rows, num_rows, 2 * num_rows, seed + site) for site in range(len(d_outs))
    ]
    pairs[-1] = None
    x = torch.randn(num_rows, d_in, generator=rng).to(dtype)
    return Group(x, members, mixed_table(widths, dora=dora), pairs)


def loop(group: Group) -> list[Tensor]:
    """Every member, one pair after the other, in fp64."""
    x = group.x.double()
    rows = x
    if group.exit is not None:
        rows = torch.zeros(group.exit.num_tokens, x.shape[1], dtype=torch.float64)
        rows.index_add_(0, group.exit.token.long(), x * group.exit.weight.double()[:, None])
    out = []
    for member, pairs in zip(group.members, group.pairs, strict=True):
        weight = member.weight.double()
        y = rows @ weight.T
        if member.bias is not None:
            y = y + member.bias.double()
        if group.enter is not None:
            y = y[group.enter.token.long()]
        out.append(y if pairs is None else add(y.clone(), x, weight, group.table, member, pairs))
    return out


def add(
    y: Tensor, x: Tensor, weight: Tensor, table: SlotTable, member: Member, pairs: Pairs
) -> Tensor:
    assert member.site is not None
    for src, dst, slot, gate in zip(
        pairs.src.tolist(),
        pairs.dst.tolist(),
        pairs.slot.tolist(),
        pairs.weight.tolist(),
        strict=True,
    ):
        if slot < 0:
            continue
        a, b, gain, scale = table.rows_of(slot, member.site)
        change = scale * (a.double() @ x[src]) @ b.double()
        if gain is not None:
            base = weight @ x[src]
            change = gain.double() * (base + change) - base
        y[dst] += gate * change
    return y


def late_gate(ranks: list[int], mask: list[bool] | None = None, seed: int = 0) -> LateGate:
    rng = torch.Generator().manual_seed(seed)
    num_rows, num = sum(ranks), len(ranks)
    root = torch.randn(num_rows, num_rows, generator=rng)
    return LateGate(
        be_RE=torch.randn(num_rows, num, generator=rng),
        mean_R=0.1 * torch.randn(num_rows, generator=rng),
        gram_RR=root @ root.T / num_rows,
        total_E=torch.randn(num, generator=rng),
        inv_tau=0.7,
        eps=1e-5,
        mask_E=None if mask is None else torch.tensor(mask),
    )
