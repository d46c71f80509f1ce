"""The rows of an adapter at a site, rank-major: every edit of them is one gather (core/edits.py).

Why rank-major in both factors: row i of A and row i of B are one rank, so prune, duplicate, reorder and gate are row
operations. The scale of a slot stays beside its span and multiplies `w`, so saving is lossless.

A row gate is a learned factor per rank row (BeamLoRA's scores): it folds into A, so every path computes it alike. Tied
experts share one A (HydraLoRA): it is kept once and repeated where a kernel wants it per expert.

Letters: R rank rows, E slots, I input width, O output width, r rank of a tied expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loramux.core.types import Expert, Site
from loramux.ops.contract import Spans


@dataclass(frozen=True, eq=False)
class Acting:
    """Rows as they act in one forward pass, folded: A is [r, I] where it is `tied`, else [R, I]. Never DoRA."""

    spans: Spans
    a: Tensor
    b: Tensor
    tied: int


class Rows(nn.Module):
    """A [R, I], B [R, O] and, for DoRA, the magnitudes [E, O] of one adapter at one site.

    gate: a module without arguments that gives fp32 [R], multiplied into A. tied: the number of experts that share
    one A, which then is [R / tied, I]; 0 when every expert has its own.
    """

    a: nn.Parameter
    b: nn.Parameter
    magnitude: nn.Parameter | None
    gate: nn.Module | None

    def __init__(
        self,
        spans: Spans,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor | None = None,
        gate: nn.Module | None = None,
        tied: int = 0,
    ):
        super().__init__()
        if tied and len(set(spans.rank)) > 1:
            raise ValueError(f"experts that share one A need one rank, got {spans.rank}")
        if a.shape[0] * max(1, tied) != spans.num_rows or b.shape[0] != spans.num_rows:
            raise ValueError(
                f"spans own {spans.num_rows} rank rows, but A has {a.shape[0]} and B {b.shape[0]}"
            )
        if magnitude is not None and (gate is not None or tied):
            raise ValueError("DoRA goes with neither gates over ranks nor experts that share one A")
        self.spans = spans
        self.gate = gate
        self.tied = tied
        self._folded: tuple[object, Rows] | None = None
        self._gain: tuple[object, Tensor] | None = None
        self.a = nn.Parameter(a, requires_grad=False)
        self.b = nn.Parameter(b, requires_grad=False)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude, requires_grad=False)

    def extra_repr(self) -> str:
        return f"slots={self.spans.num_slots}, ranks={self.spans.rank}"

    def slot_rows(self, slot: int) -> slice:
        start = self.spans.start[slot]
        return slice(start, start + self.spans.rank[slot])

    @property
    def is_plain(self) -> bool:
        """Whether the parameters are what acts: no gate to fold, no A to repeat."""
        return self.gate is None and not self.tied

    def acting(self, dense: bool) -> Rows | Acting:
        """What acts in this forward pass: these rows, or their folded form. `dense`: a tied A is wanted once."""
        if self.is_plain:
            return self
        if not torch.is_grad_enabled() and not (dense and self.tied):
            return self.folded()
        a = self._gated()
        if self.tied and not dense:
            return Acting(self.spans, a.repeat(self.tied, 1), self.b, 0)
        return Acting(self.spans, a, self.b, self.tied)

    @torch.no_grad()
    def folded(self) -> Rows:
        """Plain rows that act the same, for kernels and files. One object that follows the parameters."""
        if self.is_plain:
            return self
        own = [*self.parameters(), *self.buffers()]
        key = tuple((id(p), p.data_ptr(), p._version) for p in own)
        # Rows under training are folded anew each time: fused optimizers write in place without a new version.
        is_trained = any(p.requires_grad for p in own)
        if self._folded is None or self._folded[0] != key or is_trained:
            a = self._gated()
            a = a.repeat(self.tied, 1) if self.tied else a
            old = None if self._folded is None else self._folded[1]
            if old is None or old.spans != self.spans:
                old = Rows(self.spans, a, self.b.detach(), self.magnitude)
            old.a.data, old.b.data = a, self.b.detach()
            self._folded = (key, old)
        return self._folded[1]

    def gain(self, weight_OI: Tensor) -> Tensor:
        """`dora_gain`, worked out once where nothing is trained: it reads the whole frozen weight."""
        own = [*self.parameters(), weight_OI]
        if torch.is_grad_enabled() or any(p.requires_grad for p in own):
            return dora_gain(self, weight_OI)
        key = tuple((p.data_ptr(), p._version, p.dtype) for p in own if not p.is_inference())
        if self._gain is None or self._gain[0] != key or len(key) < len(own):
            self._gain = (key, dora_gain(self, weight_OI))
        return self._gain[1]

    def _gated(self) -> Tensor:
        if self.gate is None:
            return self.a
        factor_R: Tensor = self.gate()
        return self.a * factor_R.to(self.a.dtype).unsqueeze(1)


def gather_rows(rows: Tensor, take: Tensor) -> Tensor:
    """rows[take], with zeros where `take` is -1."""
    out = rows.new_zeros(len(take), *rows.shape[1:])
    out[take >= 0] = rows[take[take >= 0]]
    return out


def init_a(rank: int, d_in: int, generator: torch.Generator | None = None) -> Tensor:
    """Kaiming uniform with a = sqrt(5), as PEFT: uniform in +-1/sqrt(d_in). fp32 [rank, d_in]."""
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)


def init_a_gaussian(rank: int, d_in: int, generator: torch.Generator | None = None) -> Tensor:
    """Normal with standard deviation 1/rank, as PEFT's `gaussian`. fp32 [rank, d_in]."""
    return torch.empty(rank, d_in).normal_(0, 1 / rank, generator=generator)


def fresh_rows(
    site: Site,
    experts: Sequence[Expert],
    *,
    gaussian: bool = False,
    magnitude_O: Tensor | None = None,
    generator: torch.Generator | None = None,
    gate: nn.Module | None = None,
    tied: int = 0,
) -> Rows:
    """New experts in fp32: A random, B zero, magnitudes (if given) equal for all: together they change nothing."""
    init = init_a_gaussian if gaussian else init_a
    spans = Spans.packed([e.rank for e in experts], [e.scale for e in experts])
    own = experts[:1] if tied else experts
    parts = [init(e.rank, site.d_in, generator) for e in own if e.rank]
    a = torch.cat(parts) if parts else torch.zeros(0, site.d_in)
    magnitude = None if magnitude_O is None else magnitude_O.repeat(len(experts), 1)
    return Rows(spans, a, torch.zeros(spans.num_rows, site.d_out), magnitude, gate, tied)


# --- DoRA ---------------------------------------------------------------------------------------


def weight_norm(weight_OI: Tensor) -> Tensor:
    """Norm of each output row of the frozen weight, fp32 (fp64 stays): DoRA's magnitude at the start."""
    wide = weight_OI if weight_OI.dtype == torch.float64 else weight_OI.float()
    norm_O: Tensor = torch.linalg.vector_norm(wide, dim=1)
    return norm_O


def dora_gain(rows: Rows, weight_OI: Tensor) -> Tensor:
    """c [E, O] = m / ||W + s B^T A||, the norm detached from autograd as the DoRA paper does.

    The norm of the sum is expanded, ||w||^2 + 2 s w.(BA) + s^2 |BA|^2, so no O x I matrix is built per expert.
    """
    assert rows.magnitude is not None, "dora_gain needs magnitudes"
    dtype = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        weight, a, b = weight_OI.to(dtype), rows.a.to(dtype), rows.b.to(dtype)
        base_O = weight.square().sum(1)
        cross_RO = a @ weight.T
        norms = []
        for slot, scale in enumerate(rows.spans.scale):
            at = rows.slot_rows(slot)
            gram_RR = a[at] @ a[at].T
            square_O = base_O + scale * (
                2 * (b[at] * cross_RO[at]).sum(0) + scale * (b[at] * (gram_RR @ b[at])).sum(0)
            )
            norms.append(square_O.clamp_min(0).sqrt())
        norm_EO = torch.stack(norms)
    gain_EO: Tensor = rows.magnitude.to(dtype) / norm_EO
    return gain_EO
