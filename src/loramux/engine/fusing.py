"""Takes the many small calls between the linears out of a model that stays otherwise its own.

Why: at a few rows, a decode step of transformers spends more time between its linears than on attention. Norms get a
`forward` of their own (norms.py), gated activations a promise (activations.py). An attention module runs the very code
of its class, in which one name, `apply_rotary_pos_emb`, means one call instead of sixteen. Both only where they were
seen to give the same numbers, and on the instance, so that other models of the process are not touched.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loramux.engine.activations import fuse_activations
from loramux.engine.norms import fuse_norms
from loramux.ops.rotary import rotary

ROTARY = "apply_rotary_pos_emb"
PROBES = ((4, 2, 16, 16), (2, 1, 24, 8))  # query heads, key heads, width of a head, numbers rotated
Turn = Callable[..., tuple[Tensor, Tensor]]


def fuse_model(model: nn.Module) -> Callable[[], None]:
    """Fuses norms, rotary embeddings and gated activations; the function returned takes all of it back.

    Parameters, names and hooks stay. Calls that want a gradient, and inputs that the kernels do not take, run as
    before.
    """
    undos = [fuse_norms(model), fuse_rotary(model), fuse_activations(model)]

    def undo() -> None:
        while undos:
            undos.pop()()

    return undo


def fuse_rotary(model: nn.Module) -> Callable[[], None]:
    """Gives every attention module whose rotary embedding passes the probe a `forward` that calls the fused one."""
    dtype = next(model.parameters()).dtype
    forwards: dict[type, types.FunctionType | None] = {}
    fused: list[nn.Module] = []
    for module in model.modules():
        kind = type(module)
        if kind not in forwards:
            forwards[kind] = _with_fused_rotary(kind.forward, dtype)
        forward = forwards[kind]
        if forward is not None and "forward" not in vars(module):
            module.forward = types.MethodType(forward, module)
            fused.append(module)

    def undo() -> None:
        for module in fused:
            vars(module).pop("forward", None)
        fused.clear()

    return undo


def shortcut_children(model: nn.Module) -> Callable[[], None]:
    """Lets `self.q_proj` and the like be found as plain attributes; the function returned undoes it.

    A module looks its children up in Python, which a step does some 400 times. Setting a child anew goes through the
    module and takes the shortcut away, so none can be stale: call this when everything stands in its place.
    """
    made: list[tuple[nn.Module, str, nn.Module]] = []
    for module in model.modules():
        for name, child in module.named_children():
            if name not in vars(module):
                vars(module)[name] = child
                made.append((module, name, child))

    def undo() -> None:
        for module, name, child in made:
            if vars(module).get(name) is child:
                del vars(module)[name]
        made.clear()

    return undo


def _with_fused_rotary(forward: Any, dtype: torch.dtype) -> types.FunctionType | None:
    """The same code, with the fused function under the name; None if it does not call one that passes the probe."""
    if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    own = forward.__globals__.get(ROTARY)
    if own is None or {_is_same(own, dtype, *sizes) for sizes in PROBES} - {None} != {True}:
        return None

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = None if args or kwargs else rotary(q, k, cos, sin)
        return own(q, k, cos, sin, *args, **kwargs) if found is None else found

    fused = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, ROTARY: turn},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


@torch.inference_mode()
def _is_same(
    own: Turn, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, turned: int
) -> bool | None:
    """Whether a family's function turns as the kernel does; None if it cannot take these shapes, or this call.

    Cosines and sines have no pattern that could hide a mix-up.
    """
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    q, k = draw(1, 7, heads, dim).transpose(1, 2), draw(1, 7, kv_heads, dim).transpose(1, 2)
    cos, sin = draw(1, 7, turned), draw(1, 7, turned)
    got = rotary(q, k, cos, sin)
    try:
        expected = own(q, k, cos, sin)
    except Exception:  # another signature, or whole heads only
        return None
    return got is not None and all(
        isinstance(theirs, Tensor) and torch.equal(ours, theirs)
        for ours, theirs in zip(got, expected, strict=True)
    )
