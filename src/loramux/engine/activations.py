"""Runs act(gate) * up of gated FFNs in one call, where that was seen to give the same numbers.

Why: the product of an activation and the other half is two trips through memory, a seventh of a long prompt's time. An
FFN's code says `self.act_fn(gate) * up`, so its activation module hands out a promise instead of a tensor, and the
product keeps it. An FFN that does anything else with its activation fails the probe and is left alone.

Letters: N probe rows, D input width of an FFN.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loramux.core.modes import evaluating
from loramux.ops.gated import ACTIVATIONS, Activation, gated, gated_torch, kernel

NUM_PROBES = 4
# Relative, of the norm: the activation is the same but for its last bit.
MAX_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
Function = Callable[[Tensor], Tensor]


class Activated:
    """activation(gate), not computed yet: all one can do with it is multiply it."""

    __slots__ = ("activation", "gate", "own")

    def __init__(self, gate: Tensor, activation: Activation, own: Function):
        self.gate, self.activation, self.own = gate, activation, own

    def __mul__(self, up: Tensor) -> Tensor:
        y = gated(self.gate, up, self.activation)
        return self.own(self.gate) * up if y is None else y

    __rmul__ = __mul__


def fuse_activations(model: nn.Module) -> Callable[[], None]:
    """Lets the activations of gated FFNs promise; the function returned takes it back.

    Calls that want a gradient, and inputs that the kernel does not take, run as before.
    """
    fused: list[nn.Module] = []
    seen: dict[tuple[type, str, type], Activation | None] = {}

    def undo() -> None:
        for activation in fused:
            vars(activation).pop("forward", None)
        fused.clear()

    weight = next(model.parameters())
    if kernel().call is None or weight.dtype not in MAX_DIFFERENCE or weight.device.type != "cpu":
        return undo
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    with evaluating(model), torch.inference_mode():
        for block in model.modules():
            for name, module in block.named_children():
                if uses[id(module)] == 1 and _may_be_activation(module):
                    kind = (type(block), name, type(module))
                    if kind not in seen:
                        seen[kind] = _probe(block, module, weight.dtype)
                    activation = seen[kind]
                    if activation is not None:
                        _install(module, activation)
                        fused.append(module)
    return undo


def _may_be_activation(module: nn.Module) -> bool:
    return "forward" not in vars(module) and not (
        module._modules or module._parameters or module._buffers
    )


def _install(module: nn.Module, activation: Activation) -> None:
    own: Function = module.forward

    def forward(gate: Tensor) -> Tensor | Activated:
        if torch.is_grad_enabled():
            return own(gate)
        return Activated(gate, activation, own)

    module.forward = forward


def _probe(block: nn.Module, module: nn.Module, dtype: torch.dtype) -> Activation | None:
    """Which activation it is, if the block multiplies it and nothing else; the module is left as it was."""
    activation = _kind_of(module, dtype)
    width = next((getattr(m, "in_features", None) for m in block.children()), None)
    if activation is None or not isinstance(width, int):
        return None
    x_ND = torch.randn(1, NUM_PROBES, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        expected: Any = block.forward(x_ND)
        _install(module, activation)
        got: Any = block.forward(x_ND)
    except Exception:  # a block with other inputs, or one that does more than multiply
        return None
    finally:
        vars(module).pop("forward", None)
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        return None
    return activation if _is_close(got, expected) else None


def _kind_of(module: nn.Module, dtype: torch.dtype) -> Activation | None:
    x = torch.linspace(-8, 8, 1001).to(dtype)
    try:
        found = module.forward(x)
    except Exception:  # no function of one tensor
        return None
    if not isinstance(found, Tensor) or found.shape != x.shape:
        return None
    one = torch.ones_like(x)
    return next((a for a in ACTIVATIONS if _is_close(found, gated_torch(x, one, a))), None)


def _is_close(got: Tensor, expected: Tensor) -> bool:
    difference = (got.double() - expected.double()).norm() / expected.double().norm()
    return bool(difference <= MAX_DIFFERENCE[expected.dtype])
