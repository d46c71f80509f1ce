"""One forward pass of several adapters over one base, each as if it were alone.

Every adapter keeps a whole forward pass of its own (`State`): its rows, routes, plans, records and random numbers. Only
the frozen linears, norms and the head see all rows at once, and those work on each row by itself. So a method needs
nothing to be trained beside others, and what one adapter draws, routes or overflows to NaN reaches no other.

The rows of an adapter lie next to each other: N tokens of the call are the tokens of the first share, then the second.
Inside an FFN that is routed by rows a share may have more rows than tokens.

Letters: N tokens of the call, n tokens of a share, m FFN rows of a share, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loramux.core.state import State
from loramux.core.types import Site
from loramux.ops.rows import fold_rows, to_rows
from loramux.ops.segments import Segment
from loramux.ops.segments import linear as segmented

if TYPE_CHECKING:
    from loramux.core.dispatch import Dispatch
    from loramux.core.linear import LoraLinear
    from loramux.core.plan import Plan


@dataclass(eq=False)
class Share:
    """One adapter's part: the forward pass of its own rows, and where it takes its random numbers from.

    draws: a context inside which torch's generators are the adapter's own. freeze: gives a context that draws the same
    numbers again, from where the generators stand now (for layers that are run twice).
    """

    state: State
    draws: Callable[[], AbstractContextManager[None]] = nullcontext
    freeze: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def num_tokens(self) -> int:
        return self.state.batch.num_tokens

    def num_rows(self, block: str) -> int:
        """Rows of this share between the linears of a block."""
        layout = self.state.layouts.get(block)
        return self.num_tokens if layout is None else layout.map.num_rows


class Together:
    """The forward pass that is open, as the linears and hooks of the attached model see it."""

    def __init__(self, dispatch: Dispatch, shares: Sequence[Share]):
        self.dispatch = dispatch
        self.shares = list(shares)
        self.tokens = [share.num_tokens for share in self.shares]
        self.is_plain = [_is_plain(share) for share in self.shares]
        self.is_forward = True
        self._split: tuple[Tensor, list[int], tuple[Tensor, ...]] | None = None

    # --- What the model's modules ask -------------------------------------------------------------

    def linear(self, linear: LoraLinear, x: Tensor) -> Tensor:
        """The base once for all rows, then every share's own part on its own rows."""
        site = linear.site
        plans = [
            None if is_plain else self._plan(share, site)
            for share, is_plain in zip(self.shares, self.is_plain, strict=True)
        ]
        as_tokens = all(plan is None or plan.row_map is None for plan in plans)
        if as_tokens and site.path not in self.dispatch.unfused and not torch.is_autocast_enabled():
            return self._segmented(linear, x, plans)
        plans = [
            self._plan(share, site) if is_plain else plan
            for share, is_plain, plan in zip(self.shares, self.is_plain, plans, strict=True)
        ]
        if not any(plans):
            return linear.base_layer(x)  # type: ignore[no-any-return]
        x_parts = self.split(x, self._sizes(site))
        y = self._parts(linear, self._base(linear, x, x_parts, plans), x_parts, plans)
        return y.view(*x.shape[:-2], -1, site.d_out)

    def _segmented(self, linear: LoraLinear, x: Tensor, plans: Sequence[Plan | None]) -> Tensor:
        """What is a plain LoRA is added by the function that multiplies the base, in place; then the others."""
        site = linear.site
        segments = [
            self._segment(share, site) if is_plain else Segment(share.num_tokens)
            for share, is_plain in zip(self.shares, self.is_plain, strict=True)
        ]
        y: Tensor
        if all(segment.a is None for segment in segments):
            y = linear.base_layer(x)
        else:
            y = segmented(x.reshape(-1, site.d_in), linear.weight, linear.bias, segments)
        if any(plan is not None for plan in plans):
            parts = y.reshape(-1, site.d_out).split(self.tokens)
            y = self._parts(linear, parts, self.split(x, self.tokens), plans)
        return y.view(*x.shape[:-1], site.d_out)

    def _parts(
        self,
        linear: LoraLinear,
        y_parts: Sequence[Tensor],
        x_parts: Sequence[Tensor],
        plans: Sequence[Plan | None],
    ) -> Tensor:
        """The base of every share plus its parts, as one tensor of all rows."""
        out = []
        for share, plan, y, own in zip(self.shares, plans, y_parts, x_parts, strict=True):
            if plan is None:
                out.append(y)
                continue
            draws = any(part.dropout > 0 or part.late is not None for part in plan.parts)
            with self._alone(share), share.draws() if draws else nullcontext():
                out.append(linear.share(y, own, plan))
        return torch.cat(out)

    def enter_module(self, path: str, x: Tensor) -> None:
        """The input of a module with routers arrived: every share's own routers read its own rows."""
        site = self._site(path)
        parts = self.split(x, self.tokens if site is None else self._sizes(site))
        for share, own in zip(self.shares, parts, strict=True):
            if any(path in member.adapter.routers for member in share.state.members):
                with self._alone(share), share.draws():
                    self.dispatch.enter_module(path, own)

    def each(self, x: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
        """`work` on the tokens of each share by themselves, with its own random numbers."""
        out = []
        for share, own in zip(self.shares, self.split(x, self.tokens), strict=True):
            with share.draws():
                out.append(work(own))
        return torch.cat(out).view(x.shape)

    def split(self, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """[n, I] of every share. Linears that read the same x share one split: its backward copies all rows."""
        if self._split is not None and self._split[0] is x and self._split[1] == list(sizes):
            return self._split[2]
        parts: tuple[Tensor, ...] = x.reshape(-1, x.shape[-1]).split(list(sizes))
        self._split = (x, list(sizes), parts)
        return parts

    # --- Activation checkpointing -----------------------------------------------------------------

    def checkpointed(self, original: Callable[..., Any], function: Callable[..., Any]) -> Any:
        """A function for `original`, torch's checkpoint, that finds this forward pass again inside backward."""
        frozen = [share.freeze() for share in self.shares]

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.is_forward:
                return function(*args, **kwargs)
            with self._again(frozen):
                return function(*args, **kwargs)

        return lambda *args, **kwargs: original(run, *args, **kwargs)

    @contextmanager
    def _again(self, frozen: Sequence[AbstractContextManager[None]]) -> Iterator[None]:
        """Run a piece of this forward pass again: routes are decided anew, with the numbers drawn at first."""
        before = self.dispatch.together, self.dispatch.recomputing, self._split
        for share in self.shares:
            share.state.plans.clear()
            share.state.pairs.clear()
            share.state.forget_step()
        self.dispatch.together, self.dispatch.recomputing, self._split = self, True, None
        self.dispatch.listen(any(not share.state.is_settled for share in self.shares))
        try:
            with ExitStack() as stack:
                for again in frozen:
                    stack.enter_context(again)
                yield
        finally:
            self.dispatch.together, self.dispatch.recomputing, self._split = before

    # --- Inside ------------------------------------------------------------------------------------

    def _segment(self, share: Share, site: Site) -> Segment:
        rows = share.state.members[0].adapter.rows.get(site.path)
        if rows is None or rows.spans.num_rows == 0:
            return Segment(share.num_tokens)
        return Segment(share.num_tokens, rows.a, rows.b, rows.spans.scale[0])

    def _base(
        self,
        linear: LoraLinear,
        x: Tensor,
        x_parts: Sequence[Tensor],
        plans: Sequence[Plan | None],
    ) -> list[Tensor]:
        """What the frozen linear gives for each share, with as many rows as the share has behind this site."""
        maps = [None if plan is None else plan.row_map for plan in plans]
        if any(rows is not None for rows in maps) and linear.site.role == "exit":
            folded = [
                own if rows is None else fold_rows(own, rows)
                for own, rows in zip(x_parts, maps, strict=True)
            ]
            return list(linear.base_layer(torch.cat(folded)).split(self.tokens))
        y_parts = linear.base_layer(x.reshape(-1, x.shape[-1])).split(self.tokens)
        if linear.site.role != "enter":
            return list(y_parts)
        return [
            y if rows is None else to_rows(y, rows) for y, rows in zip(y_parts, maps, strict=True)
        ]

    def _sizes(self, site: Site) -> list[int]:
        """How many rows of the input of `site` are whose."""
        if site.role != "exit":
            return self.tokens
        return [share.num_rows(site.block) for share in self.shares]

    def _site(self, path: str) -> Site | None:
        for share in self.shares:
            for member in share.state.members:
                if path in member.adapter.sites:
                    return member.adapter.sites[path]
        return None

    def _plan(self, share: Share, site: Site) -> Plan | None:
        with self._alone(share):
            return self.dispatch.plan(site)

    @contextmanager
    def _alone(self, share: Share) -> Iterator[None]:
        """Inside, the dispatch is in the forward pass of this share."""
        dispatch = self.dispatch
        dispatch.state, dispatch.together = share.state, None
        try:
            yield
        finally:
            dispatch.state, dispatch.together = None, self


def _is_plain(share: Share) -> bool:
    """Whether the adapter is one LoRA per linear that acts in full on every token: no plan is needed to know it."""
    if len(share.state.members) != 1:
        return False
    adapter = share.state.members[0].adapter
    if adapter.routers or (share.state.training and adapter.method.config.lora_dropout > 0):
        return False
    return all(
        rows.is_plain
        and rows.magnitude is None
        and rows.spans.num_slots == 1
        and adapter.method.unit_of(adapter.sites[path]) is None
        for path, rows in adapter.rows.items()
    )
