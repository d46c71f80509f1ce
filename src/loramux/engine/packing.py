"""One adapter content becomes one blob: the rows of every expert at every site, and where each begins.

Why one blob: it is hashed, counted, dropped and (on CUDA) copied as a whole, and a forward pass reads it front to back.
Within a group (the linears of a block that read the same input) the A rows of its sites lie side by side, then the B
rows; of one site, those of all experts. DoRA's gains c = m / ||W + s B^T A|| follow behind all rows.

Letters: E experts (slots), S sites of the engine, R rank rows, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loramux.core.bank import Rows, dora_gain
from loramux.core.sites import ATTENTION_EXITS
from loramux.core.types import Site
from loramux.formats.tensors import SiteTensors
from loramux.ops.contract import Spans
from loramux.ops.pool import PackedRows

ALIGN = 64  # bytes: a group begins on a cache line


class Layout:
    """The engine's sites, in order, and the weights behind them: what adapters are packed for.

    Make it while the model still has its own linears; the weights are only read, for DoRA's norms.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]):
        self.sites = tuple(sites)
        self.index = {site.path: i for i, site in enumerate(self.sites)}
        self.groups = tuple(_groups(self.sites))
        self._weights = {path: model.get_submodule(path).weight for path in self.index}
        floating = [w for w in self._weights.values() if w.is_floating_point()]  # type: ignore[operator]
        self.is_wide = any(w.dtype == torch.float64 for w in floating)

    def weight_OI(self, site: Site) -> Tensor:
        """The frozen weight of a site; refuses one that is quantised."""
        weight = self._weights[site.path]
        assert isinstance(weight, Tensor)
        if not weight.is_floating_point():
            raise ValueError(
                f"DoRA needs the norms of the base's weights, and those of {site.path} are quantised; use adapters "
                "without use_dora, or a base that is not quantised"
            )
        weight_OI = weight.detach().T if site.transposed else weight.detach()
        return weight_OI.cpu()


def _groups(sites: Sequence[Site]) -> list[tuple[int, ...]]:
    """Indices of sites that read one input, by name: all of a block but its last linear, then that one."""
    found: dict[tuple[str, bool, int], list[int]] = {}
    for i, site in enumerate(sites):
        is_last = site.role == "exit" or (
            site.kind == "attention" and site.path.rpartition(".")[2] in ATTENTION_EXITS
        )
        found.setdefault((site.block, is_last, site.d_in), []).append(i)
    return [tuple(group) for group in found.values()]


@dataclass(frozen=True, eq=False)
class SiteParts:
    """What one site gets: the rows of its experts in slot order, one after the other, in any dtype and stride."""

    spans: Spans
    parts: tuple[SiteTensors, ...]
    magnitude_EO: Tensor | None = None

    @classmethod
    def of_rows(cls, rows: Rows) -> SiteParts:
        magnitude = None if rows.magnitude is None else rows.magnitude.detach()
        packed = Spans.packed(rows.spans.rank, rows.spans.scale)
        slots = [rows.slot_rows(slot) for slot in range(packed.num_slots)]
        parts = [SiteTensors(rows.a.detach()[at], rows.b.detach()[at]) for at in slots]
        return cls(packed, tuple(part for part in parts if part.rank), magnitude)

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {t.dtype for part in self.parts for t in (part.a, part.b)}


@dataclass(frozen=True, eq=False)
class Packed:
    """The blob with its offsets, and what the core's types need to see it as rows again.

    rows_bytes: how much of the blob is rows; the gains behind it follow from rows, magnitudes and base.
    """

    rows: PackedRows
    rows_bytes: int
    spans: Mapping[str, Spans]
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        kept = sum(m.numel() * m.element_size() for m in self.magnitudes.values())
        return self.rows.blob.numel() + kept

    def rows_at(self, layout: Layout, path: str) -> Rows:
        """The rows of one site, experts in slot order, as views of the blob."""
        i, spans = layout.index[path], self.spans[path]
        site, r = layout.sites[i], spans.num_rows
        a = self._view(int(self.rows.a_at[0, i]), r, site.d_in)
        b = self._view(int(self.rows.b_at[0, i]), r, site.d_out)
        return Rows(spans, a, b, self.magnitudes.get(path))

    def _view(self, at: int, num_rows: int, width: int) -> Tensor:
        size = num_rows * width * self.rows.dtype.itemsize
        return self.rows.blob[at : at + size].view(self.rows.dtype).view(num_rows, width)


def pack(layout: Layout, sites: Mapping[str, SiteParts]) -> Packed:
    """Copy the rows of an adapter's sites into one blob, and compute DoRA's gains behind them."""
    dtype = _dtype(layout, sites)
    places = _Places(max(parts.spans.num_slots for parts in sites.values()), len(layout.sites))
    pieces, rows_bytes = _place_rows(layout, sites, dtype, places)
    gained = [path for path, parts in sites.items() if parts.magnitude_EO is not None]
    end = _place_gains(layout, sites, gained, rows_bytes, places)
    blob = torch.empty(end, dtype=torch.uint8)
    # One call for all sites: every call gives the interpreter away, and the engine's thread may keep it for long.
    torch.cat(pieces, out=blob[:rows_bytes].view(dtype))
    packed = Packed(
        rows=PackedRows(
            blob=blob,
            dtype=dtype,
            a_at=places.a,
            b_at=places.b,
            rank=places.rank,
            scale=places.scale,
            gain_at=places.gain if gained else None,
        ),
        rows_bytes=rows_bytes,
        spans={path: parts.spans for path, parts in sites.items()},
        magnitudes={path: _magnitude(sites[path], layout) for path in gained},
    )
    for path in gained:
        i = layout.index[path]
        gain_EO = dora_gain(packed.rows_at(layout, path), layout.weight_OI(layout.sites[i]))
        at = int(places.gain[0, i])
        blob[at : at + 4 * gain_EO.numel()].view(torch.float32).copy_(gain_EO.reshape(-1))
    return packed


class _Places:
    """Offsets, ranks and scales [E, S] under construction."""

    def __init__(self, num_slots: int, num_sites: int):
        shape = num_slots, num_sites
        self.a, self.b = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.gain = np.full(shape, -1, np.int64)
        self.rank, self.scale = np.zeros(shape, np.int32), np.zeros(shape, np.float32)


def _dtype(layout: Layout, sites: Mapping[str, SiteParts]) -> torch.dtype:
    """bf16 where all rows are; fp64 only over an fp64 base; else fp32, which holds fp16 exactly."""
    found = {dtype for parts in sites.values() for dtype in parts.dtypes}
    if found == {torch.bfloat16}:
        return torch.bfloat16
    return torch.float64 if layout.is_wide and torch.float64 in found else torch.float32


def _place_rows(
    layout: Layout, sites: Mapping[str, SiteParts], dtype: torch.dtype, places: _Places
) -> tuple[list[Tensor], int]:
    """Give every site its offsets: all rows, flat and in the order of the blob, and where they end."""
    item, end = dtype.itemsize, 0
    pieces: list[Tensor] = []
    for group in layout.groups:
        own = [(i, layout.sites[i]) for i in group if layout.sites[i].path in sites]
        for i, site in own:
            parts = sites[site.path]
            end = _place_factor(parts.spans, places.a[:, i], end, item * site.d_in)
            pieces += [part.a.reshape(-1) for part in parts.parts]
        end = _pad(pieces, end, dtype)
        for i, site in own:
            parts = sites[site.path]
            end = _place_factor(parts.spans, places.b[:, i], end, item * site.d_out)
            pieces += [part.b.reshape(-1) for part in parts.parts]
            places.rank[: parts.spans.num_slots, i] = parts.spans.rank
            places.scale[: parts.spans.num_slots, i] = parts.spans.scale
        end = _pad(pieces, end, dtype)
    return [piece.to("cpu", dtype) for piece in pieces], end


def _place_factor(spans: Spans, starts_E: NDArray[np.int64], at: int, row_bytes: int) -> int:
    for slot, start in enumerate(spans.start):
        starts_E[slot] = at + start * row_bytes
    return at + spans.num_rows * row_bytes


def _pad(pieces: list[Tensor], end: int, dtype: torch.dtype) -> int:
    """Fill up with zeros, so that equal rows are equal blobs."""
    left = -end % ALIGN
    if left:
        pieces.append(torch.zeros(left // dtype.itemsize, dtype=dtype))
    return end + left


def _place_gains(
    layout: Layout,
    sites: Mapping[str, SiteParts],
    gained: Sequence[str],
    end: int,
    places: _Places,
) -> int:
    for path in gained:
        i = layout.index[path]
        for slot in range(sites[path].spans.num_slots):
            places.gain[slot, i] = end
            end += 4 * layout.sites[i].d_out
    return end


def _magnitude(parts: SiteParts, layout: Layout) -> Tensor:
    assert parts.magnitude_EO is not None
    wide = layout.is_wide and parts.magnitude_EO.dtype == torch.float64
    return parts.magnitude_EO.to("cpu", torch.float64 if wide else torch.float32, copy=True)
