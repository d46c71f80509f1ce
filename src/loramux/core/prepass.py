"""A pass of the bare base before the forward itself, for routers that read its last hidden state (X-LoRA).

The pass has a KV cache of its own, the twin of the caller's: made where the caller's is empty, kept on it, and changed
with it when beams reorder it or assisted decoding crops it. So a decode step costs two steps, not two whole sequences.

Letters: B rows of the call, T tokens per row, D width of the model.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from loramux.core.dispatch import Dispatch
from loramux.core.router import Router
from loramux.core.state import PromptStore, State
from loramux.core.types import Route

NOT_PASSED = ("past_key_values", "use_cache", "labels", "return_dict")


class HiddenRouter(Router):
    """Reads the last hidden state of the bare base. Its route is decided before the forward begins."""

    reads: ClassVar[Literal["x", "t", "hidden"]] = "hidden"
    scope: ClassVar[Literal["layer", "block", "site"]] = "layer"

    def spread(self, route: Route) -> Mapping[str, Route]:
        """Path of a site -> its own share of the route, where sites differ."""
        return {}


def run(model: nn.Module, dispatch: Dispatch, call: Mapping[str, Any]) -> None:
    """Run the base and its readers' routers, if a member of the open forward pass has any."""
    state = dispatch.state
    assert state is not None
    readers = [(m, *entry) for m in state.members for entry in m.adapter.hidden_routers]
    if not readers:
        return
    hidden = _base_pass(model, dispatch, state, call)
    flat_ND = hidden.reshape(-1, hidden.shape[-1])
    for member, path, router in readers:
        assert isinstance(router, HiddenRouter)
        route = dispatch.run_router(state, member, path, router, member.own(flat_ND))
        for site, part in router.spread(route).items():
            state.routes[member.adapter.name, site] = part


@torch.no_grad()
def _base_pass(
    model: nn.Module, dispatch: Dispatch, state: State, call: Mapping[str, Any]
) -> Tensor:
    """Last hidden state [B, T, D] of the base without adapters."""
    body: Any = getattr(model, getattr(model, "base_model_prefix", ""), None)
    body = body if isinstance(body, nn.Module) else model
    known = inspect.signature(body.forward).parameters
    inputs = {k: v for k, v in call.items() if k in known and k not in NOT_PASSED}
    inputs = {k: v for k, v in inputs.items() if not k.startswith("output_")}
    cache = call.get("past_key_values")
    twin = None if cache is None else twin_of(cache, state.batch.past_length)
    wanted = call.get("use_cache")
    if wanted is None:
        wanted = getattr(getattr(model, "config", None), "use_cache", False)
    dispatch.state = State(
        batch=state.batch,
        members=[],
        training=state.training,
        keeps=False,
        needs_grad=False,
        store=PromptStore(0, []),
        prompt_done=True,
    )
    try:
        # Not through the call: its hooks would open another forward pass.
        output = body.forward(
            **inputs,
            past_key_values=twin,
            use_cache=twin is not None or (bool(wanted) and state.keeps),
        )
    finally:
        dispatch.state = state
    state.twin = None if twin is not None else cache_of(output)
    return output[0]  # type: ignore[no-any-return]


def twin_of(cache: Any, past_length: int) -> Any:
    """The base's own cache beside the caller's; a new one where that is empty."""
    twin = getattr(cache, "loramux_twin", None)
    if twin is not None and int(twin.get_seq_length()) == past_length:
        return twin
    if past_length > 0:
        raise ValueError(
            "this KV cache was filled without this adapter, which reads the bare base of every token; run the whole "
            "prompt again under it, or generate without past_key_values"
        )
    vars(cache).pop("loramux_twin", None)
    twin = copy.deepcopy(cache)
    if isinstance(twin, _Twinned):
        twin.__class__ = type(twin).__mro__[2]
    join(cache, twin)
    return twin


class _Twinned:
    """What changes the cache, other than a forward pass, changes its twin too; after a reset it gets a new one."""

    loramux_twin: Any

    def reorder_cache(self, *args: Any, **kwargs: Any) -> Any:
        self.loramux_twin.reorder_cache(*args, **kwargs)
        return super().reorder_cache(*args, **kwargs)  # type: ignore[misc]

    def crop(self, *args: Any, **kwargs: Any) -> Any:
        self.loramux_twin.crop(*args, **kwargs)
        return super().crop(*args, **kwargs)  # type: ignore[misc]

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> Any:
        self.loramux_twin.batch_repeat_interleave(*args, **kwargs)
        return super().batch_repeat_interleave(*args, **kwargs)  # type: ignore[misc]

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> Any:
        self.loramux_twin.batch_select_indices(*args, **kwargs)
        return super().batch_select_indices(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def _twinned(kind: type) -> type:
    return type(kind.__name__, (_Twinned, kind), {})


def join(cache: Any, twin: Any) -> None:
    """Keep the twin on the cache. A class of its own, not functions on the instance: these would be a cycle that
    holds both caches until the garbage collector comes by, and a copy of the cache would change the first one's twin.
    """
    cache.loramux_twin = twin
    if not isinstance(cache, _Twinned):
        kind: type = type(cache)
        cache.__class__ = _twinned(kind)


def cache_of(output: Any) -> Any:
    """The KV cache a model returned, from a named or a plain tuple."""
    if isinstance(output, tuple):
        return next((entry for entry in output if hasattr(entry, "get_seq_length")), None)
    return getattr(output, "past_key_values", None)
