"""Swap the forward of single modules of a transformers model for the time of a `with` block.

Why: the oracles need whole-model logits without any adapter library. A base linear is always seen
as `W [out, in]` and `bias [out]` or None, whether the model keeps it as Linear or Conv1D.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> transformer layer, in the order they run."""
    stacks = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    path, stack = max(stacks.items(), key=lambda item: len(item[1]))
    return {f"{path}.{index}": layer for index, layer in enumerate(stack)}


def linear_sites(root: nn.Module) -> list[str]:
    """Paths of all linears below `root`, in module order; the output head is left out."""
    return [
        name
        for name, module in root.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not name.endswith("lm_head")
    ]


def base_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """`(W [out, in], bias)` of a Linear or a Conv1D (which stores the transpose)."""
    if isinstance(module, Conv1D):
        return module.weight.T, module.bias
    if isinstance(module, nn.Linear):
        return module.weight, module.bias
    raise ValueError(f"{type(module).__name__} is no linear; give the path of a Linear or Conv1D")


@contextmanager
def replaced_forwards(
    model: nn.Module, forwards: Mapping[str, Callable[..., Any]]
) -> Iterator[None]:
    """Module path -> function called instead of its forward; all of it is undone on exit."""
    modules = [model.get_submodule(path) for path in forwards]
    try:
        for module, forward in zip(modules, forwards.values(), strict=True):
            module.forward = forward
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def model_logits(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, **inputs: Any
) -> Tensor:
    """One full forward without a KV cache: `[B, T, vocabulary]`."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    return model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs
    ).logits


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision goes up to float32; float64 stays float64, so gradients can be checked."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
