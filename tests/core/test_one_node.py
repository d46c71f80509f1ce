"""A plain LoRA under training is one autograd node with its frozen linear, and the numbers are those of the parts."""

from typing import Any

import pytest
import torch

import loramux
from loramux.core.linear import LoraLinear
from pico import build_pico

NODE = "_LinearBackward"


def attached(config: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, loramux.Handle]:
    base = build_pico("qwen2", dtype=dtype)  # with biases
    torch.manual_seed(0)
    handle = loramux.attach(base, config)
    adapter = next(iter(handle.adapters.values())).to(dtype)
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return base, handle


def nodes_of(base: Any, handle: loramux.Handle) -> set[str]:
    """What made the outputs of the wrapped linears."""
    found = set()

    def note(module: Any, args: Any, y: torch.Tensor) -> None:
        node: Any = y.grad_fn
        while node is not None and node.name() in ("ViewBackward0", "UnsafeViewBackward0"):
            node = node.next_functions[0][0]
        found.add(node.name())

    hooks = [linear.register_forward_hook(note) for linear in handle.linears.values()]
    base(torch.arange(4, 20).view(2, 8))
    for hook in hooks:
        hook.remove()
    return found


def gradients(base: Any, handle: loramux.Handle) -> dict[str, torch.Tensor]:
    ids = torch.arange(4, 20).view(2, 8)
    base(ids, labels=ids).loss.backward()
    found = {key: p.grad for key, p in handle.trainable_parameters().items() if p.grad is not None}
    base.zero_grad(set_to_none=True)
    return found


def test_it_is_one_node_whose_gradients_are_those_of_the_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, handle = attached(loramux.LoraConfig(r=3, lora_alpha=5))
    assert nodes_of(base, handle) == {NODE}
    have = gradients(base, handle)
    monkeypatch.setattr(LoraLinear, "_segment", lambda *_: None)
    assert NODE not in nodes_of(base, handle)
    want = gradients(base, handle)
    assert have.keys() == want.keys()
    assert len(have) == 2 * len(handle.linears)
    for key, value in want.items():
        torch.testing.assert_close(have[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "config",
    [
        loramux.LoraConfig(r=3, lora_dropout=0.1),
        loramux.LoraConfig(r=3, use_dora=True),
        loramux.MiLoRAConfig(r=3),
        loramux.SMoRAConfig(r=8, activate_r=2),
    ],
    ids=["dropout", "dora", "milora", "smora"],
)
def test_whatever_does_more_than_a_plain_lora_is_left_to_its_parts(config: Any) -> None:
    base, handle = attached(config)
    assert NODE not in nodes_of(base.train(), handle)


def test_a_base_that_is_trained_too_gets_its_gradients() -> None:
    base, handle = attached(loramux.LoraConfig(r=3))
    linear = next(iter(handle.linears.values()))
    linear.base_layer.weight.requires_grad_(True)
    gradients_of_rows = gradients(base, handle)
    assert gradients_of_rows
    base(torch.arange(4, 12).view(1, 8)).logits.sum().backward()
    assert linear.base_layer.weight.grad is not None
