"""The one wrapper around a linear: base, plus whatever the current forward pass says acts here.

Roles: `plain`; `enter`, where a token may become several FFN rows; `exit`, where rows fold back into tokens.
With combine = "rows" nothing between the two is rewritten: the elementwise part of an FFN does not care about rows.
At the exit the base runs once per token, not once per row, since it is linear and shared.

Letters: N tokens, M FFN rows, P pairs, R rank rows, E experts, I input width, O output width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from loramux.core.bank import Rows
from loramux.core.types import Site
from loramux.ops import cpu, reference
from loramux.ops.contract import Pairs, RowMap
from loramux.ops.cpu_bound import Bound, bind
from loramux.ops.cpu_structs import SiteState
from loramux.ops.rows import fold_rows, to_rows
from loramux.ops.segments import Segment
from loramux.ops.segments import linear as segmented

if TYPE_CHECKING:
    from loramux.core.dispatch import Dispatch
    from loramux.core.plan import Dense, Part, Plan


class LoraLinear(nn.Module):
    """Stands where a linear of the model stood; `detach` puts the very same object back."""

    def __init__(self, base_layer: nn.Module, site: Site, dispatch: Dispatch):
        super().__init__()
        self.base_layer = base_layer
        self.site = site
        self.path = site.path
        self.dispatch = dispatch
        weight = base_layer.weight
        # A quantised weight may be a subclass that calls itself fp32: a kernel must not read its memory.
        is_dense = type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()  # type: ignore[operator]
        if type(base_layer) is not nn.Linear or not is_dense:
            dispatch.unfused.add(site.path)
        # The kernel's view of this site, one per adapter (None: the base alone).
        self.states: dict[Rows | None, SiteState] = {}

    # Models look at these on their linears (dtype checks, tensor-parallel plans).
    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return self.site.d_in

    @property
    def out_features(self) -> int:
        return self.site.d_out

    def weight_OI(self) -> Tensor:
        """The frozen weight as [O, I], whatever the module keeps."""
        weight: Tensor = self.weight
        return weight.T if self.site.transposed else weight

    def forward(self, x: Tensor) -> Tensor:
        # The way of a decode step: what could be decided beforehand was, see ops/cpu_bound.py.
        state = self.dispatch.state
        plan = None if state is None else state.plans.get(self.path)
        if plan is not None and plan.bound is not None:
            y = plan.bound(x)
            if y is not None:
                return y
        return self._planned(x)

    def _planned(self, x: Tensor) -> Tensor:
        if self.dispatch.together is not None:
            return self.dispatch.together.linear(self, x)
        plan = self.dispatch.plan(self.site)
        if plan is None:
            return self.base_layer(x)  # type: ignore[no-any-return]
        rows_in = x.reshape(-1, x.shape[-1])
        if plan.backend == "cpu":
            y = self._fused(rows_in, plan)
            plan.bound = self._bind(plan, tuple(x.shape)) if plan.is_used else None
            plan.is_used = True
        elif (own := self._segment(rows_in, plan)) is not None:
            y = segmented(rows_in, self.weight, self.bias, (own,))
        else:
            y = self.add_parts(self._base(rows_in, plan.row_map), rows_in, plan)
        y = self._with_bias(y, plan)
        lead = x.shape[:-1] if plan.row_map is None else plan.lead_out
        return y.view(*lead, self.site.d_out)

    def _with_bias(self, y: Tensor, plan: Plan) -> Tensor:
        """The expert outputs, bias included, are weighted; the fold counted the bias once."""
        if plan.bias_N is None or self.bias is None:
            return y
        return y + ((plan.bias_N - 1).unsqueeze(1) * self.bias).to(y.dtype)

    # --- The path for training and long prompts ----------------------------------------------

    def share(self, y: Tensor, x: Tensor, plan: Plan) -> Tensor:
        """What a share of a joint forward pass has here: y, the base on its rows, plus its parts (core/together.py)."""
        return self._with_bias(self.add_parts(y, x, plan), plan)

    def add_parts(self, y: Tensor, x: Tensor, plan: Plan) -> Tensor:
        """y, the base on these rows, plus every part."""
        # DoRA rescales what the base gives: for the first part that is still y.
        base = y if plan.row_map is None and self.bias is None else None
        for part in plan.parts:
            y, base = self._add(y, x, part, base), None
        return y

    def _segment(self, x: Tensor, plan: Plan) -> Segment | None:
        """What trains here, if it is one LoRA that acts in full on every row: base and LoRA are one autograd node."""
        if plan.backend != "reference" or plan.row_map is not None or len(plan.parts) != 1:
            return None
        (part,) = plan.parts
        rows, pairs = part.rows, part.pairs
        if pairs is None or part.late is not None or part.dropout > 0:
            return None
        if type(rows) is not Rows or rows.magnitude is not None or not rows.a.requires_grad:
            return None
        if self.path in self.dispatch.unfused or torch.is_autocast_enabled(x.device.type):
            return None
        if not torch.is_grad_enabled() or any(
            p.requires_grad for p in self.base_layer.parameters()
        ):
            return None
        found = reference.plan_for(rows.spans, pairs, x.dtype)
        is_whole = found.start == 0 and found.stop == rows.a.shape[0] > 0
        if not is_whole or not (found.mask is found.src is found.dst is None):
            return None
        return Segment(x.shape[0], rows.a, rows.b, found.scale)

    def _base(self, x: Tensor, row_map: RowMap | None) -> Tensor:
        """The frozen linear on tokens: an `enter` site copies its output to rows, an `exit` folds them first."""
        if row_map is None:
            return self.base_layer(x)  # type: ignore[no-any-return]
        if self.site.role == "enter":
            return to_rows(self.base_layer(x), row_map)
        return self.base_layer(fold_rows(x, row_map))  # type: ignore[no-any-return]

    def _add(self, y: Tensor, x: Tensor, part: Part, base: Tensor | None) -> Tensor:
        if part.dense is not None:
            return self._add_dense(y, x, part, part.dense)
        rows, pairs = part.rows, part.pairs
        assert pairs is not None
        if part.late is not None:
            return self._add_late(y, x, part)
        if part.dropout > 0:
            x, pairs = part.drop(x)
            base = None
        if isinstance(rows, Rows) and rows.magnitude is not None:
            return self._add_dora(y, x, pairs, rows, base)
        return part.apply(y, x, rows.a, rows.b, rows.spans, pairs)

    def _add_dense(self, y: Tensor, x: Tensor, part: Part, dense: Dense) -> Tensor:
        """y += B^T (w * (A x)) with all experts weighed: one shrink, one product with the weights, one expand."""
        rows, own = part.rows, dense.own
        if own is not None:
            x = x[own.src]
        if part.dropout > 0:
            x = nn.functional.dropout(x, part.dropout)
        t_nR = nn.functional.linear(x, rows.a.to(x.dtype))
        u_nR = dense.weigh(t_nR, rows.spans, rows.tied).to(y.dtype)
        b = rows.b.to(y.dtype)
        if own is None:
            return torch.addmm(y, u_nR, b)
        return y.index_add(0, own.dst, u_nR @ b)

    def _add_late(self, y: Tensor, x: Tensor, part: Part) -> Tensor:
        """Shrink, ask the gate (it reads t = A x), expand. Row n of the adapter's tokens weighs its E experts."""
        rows, spans = part.rows, part.rows.spans
        own = part.late.own_rows(self.site)
        if own is not None:
            x = x[own.src]
        t_nR = nn.functional.linear(x, rows.a.to(x.dtype))
        weight_nE = part.late.weights(t_nR)
        slot_R, scale_R = spans.row_slot_R.to(y.device), spans.row_scale_R.to(y.device)
        u_nR = t_nR * (weight_nE[:, slot_R] * scale_R).to(t_nR.dtype)
        if own is None:
            return torch.addmm(y, u_nR, rows.b.to(u_nR.dtype))
        return y.index_add(0, own.dst, u_nR @ rows.b.to(u_nR.dtype))

    def _add_dora(
        self, y: Tensor, x: Tensor, pairs: Pairs, rows: Rows, base: Tensor | None
    ) -> Tensor:
        """y[dst] += weight * ((c - 1) * W0 x[src] + c * s B^T A x[src]), c = m / ||W0 + s B^T A|| per expert.

        base: W0 x, where it is known.
        """
        gain_EO = rows.gain(self.weight_OI())
        src, dst, slot = pairs.src.long(), pairs.dst.long(), pairs.slot.long()
        base_SO = nn.functional.linear(x, self.weight_OI()) if base is None else base
        weight_P1 = pairs.weight.unsqueeze(-1)
        # Every pair is a destination row of its own first: the gain belongs to the expert, not to the token.
        own = Pairs(
            src=pairs.src,
            dst=torch.arange(pairs.num_pairs, dtype=torch.int32, device=x.device),
            slot=pairs.slot,
            weight=torch.ones_like(pairs.weight),
            num_src=pairs.num_src,
            num_dst=pairs.num_pairs,
            rank_weight=pairs.rank_weight,
        )
        zero_PO = torch.zeros(pairs.num_pairs, y.shape[-1], dtype=y.dtype, device=y.device)
        delta_PO = reference.apply(zero_PO, x, rows.a, rows.b, rows.spans, own)
        gain_PO = gain_EO[slot.clamp_min(0)].to(torch.promote_types(y.dtype, torch.float32))
        weight_P1 = weight_P1.to(gain_PO.dtype).masked_fill((slot < 0).unsqueeze(-1), 0.0)
        change_PO = weight_P1 * (gain_PO * (base_SO[src] + delta_PO) - base_SO[src])
        return y.index_add(0, dst, change_PO.to(y.dtype))

    # --- The path for few rows on CPU: base and experts in one call ---------------------------

    def _fused(self, x: Tensor, plan: Plan) -> Tensor:
        enter = plan.row_map if self.site.role == "enter" else None
        leave = plan.row_map if self.site.role == "exit" else None
        base = cast(nn.Linear, self.base_layer)
        weight, bias = base.weight, base.bias
        first = plan.parts[0] if plan.parts else None
        rows = None if first is None else cast(Rows, first.rows)
        state = self.states.get(rows)
        if state is None:
            state = self.states[rows] = SiteState()
        if first is None or rows is None:
            return cpu.linear(x, weight, bias, enter=enter, exit=leave, state=state)
        y = cpu.linear(
            x, weight, bias, rows.a, rows.b, rows.spans, first.pairs,
            enter=enter, exit=leave, state=state,
        )  # fmt: skip
        for part in plan.parts[1:]:
            assert part.pairs is not None
            y = cpu.apply(y, x, part.rows.a, part.rows.b, part.rows.spans, part.pairs)
        return y

    def _bind(self, plan: Plan, shape: tuple[int, ...]) -> Bound | None:
        """The same call with everything looked up; only for one adapter and no FFN rows."""
        if plan.row_map is not None or len(plan.parts) > 1:
            return None
        base = self.base_layer._parameters
        if not plan.parts:
            return bind(base, None, None, None, shape)
        rows, pairs = cast(Rows, plan.parts[0].rows), plan.parts[0].pairs
        return bind(base, rows._parameters, rows.spans, pairs, shape)
