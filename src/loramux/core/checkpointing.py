"""Activation checkpointing: a layer that is run again during backward must find the forward pass it belongs to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from loramux.core.dispatch import Dispatch
from loramux.core.state import State


class Bound:
    """A checkpoint function that re-enters the forward pass in which it was called."""

    def __init__(self, original: Callable[..., Any], dispatch: Dispatch):
        self.original = original
        self.dispatch = dispatch

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state, together = self.dispatch.state, self.dispatch.together
        if together is not None:
            return together.checkpointed(self.original, function)(*args, **kwargs)
        if state is None:
            return self.original(function, *args, **kwargs)
        return self.original(functools.partial(self._run, state, function), *args, **kwargs)

    def _run(self, state: State, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.dispatch.state is state:
            return function(*args, **kwargs)
        with self.dispatch.resume(state):
            return function(*args, **kwargs)


def follow(model: nn.Module, dispatch: Dispatch) -> None:
    """Bind the checkpoint function of every checkpointed layer; refuses what would lose a router's gradient."""
    shares = dispatch.together.shares if dispatch.together is not None else ()
    states = [dispatch.state] if dispatch.state is not None else [share.state for share in shares]
    routed = any(member.adapter.routers for state in states for member in state.members)
    for layer in _layers(model):
        if not getattr(layer, "gradient_checkpointing", False):
            continue
        found: Any = layer._gradient_checkpointing_func
        original = found.original if isinstance(found, Bound) else found
        # Unset means re-entrant: torch's own default.
        if routed and getattr(original, "keywords", {}).get("use_reentrant") is not False:
            raise ValueError(
                "routers and their losses get no gradient through re-entrant checkpointing; use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if found is original:
            layer._gradient_checkpointing_func = Bound(original, dispatch)  # type: ignore[assignment]


def release(model: nn.Module) -> None:
    """Give every layer its own checkpoint function back."""
    for layer in _layers(model):
        found: Any = layer._gradient_checkpointing_func
        if isinstance(found, Bound):
            layer._gradient_checkpointing_func = found.original  # type: ignore[assignment]


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func"))
