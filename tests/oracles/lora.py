"""LoRA, rsLoRA and DoRA at one linear, and in a whole model.

Letters: B samples, T tokens, I input width, O output width, R rank. Base weight `W [O, I]`.

Layout of an expert: `LowRank(A [R, I], B [O, R], scale, magnitude [O] or None)`; with a magnitude
it is a DoRA expert. Layout of a model's parameters: `{module path: LowRank}`, the path as
`model.named_modules()` spells it, for example "model.layers.0.self_attn.q_proj".

LoRA   y = W x + bias + s B A x,                   s = alpha / R, or alpha / sqrt(R) for rsLoRA
DoRA   y = (m / n) * (W x + s B A x) + bias,       n = row norms of W + s B A, no gradient into n
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from oracles.surgery import at_least_float32, base_weight, model_logits, replaced_forwards


class LowRank(NamedTuple):
    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None


def lora_scale(alpha: float, rank: int, rslora: bool = False) -> float:
    return alpha / rank**0.5 if rslora else alpha / rank


def low_rank_product(x: Tensor, expert: LowRank) -> Tensor:
    """`s B A x` for x [..., I], computed in the factors' dtype."""
    x = x.to(expert.A.dtype)
    return expert.scale * ((x @ expert.A.T) @ expert.B.T)


def dora_norm(W: Tensor, expert: LowRank) -> Tensor:
    """Row norms [O] of `W + s B A`; a constant for autograd, as DoRA's section 4.3 asks."""
    V = at_least_float32(W) + expert.scale * (expert.B @ expert.A)
    return V.norm(dim=1).detach()


def initial_magnitude(W: Tensor) -> Tensor:
    """Row norms of the base weight, so that the layer starts as the base."""
    return at_least_float32(W).norm(dim=1)


def increment(x: Tensor, W: Tensor, expert: LowRank) -> Tensor:
    """What the expert adds to `W x`: the one place where LoRA and DoRA differ."""
    update = low_rank_product(x, expert)
    if expert.magnitude is None:
        return update
    c = expert.magnitude / dora_norm(W, expert)
    return (c - 1) * (x @ W.T) + c * update


def adapted_linear(x: Tensor, W: Tensor, bias: Tensor | None, expert: LowRank | None) -> Tensor:
    """One linear with one expert (None: the base alone)."""
    y = x @ W.T
    if expert is not None:
        y = y + increment(x, W, expert).to(y.dtype)
    return y if bias is None else y + bias


def merged_weight(W: Tensor, experts: Sequence[LowRank], weights: Sequence[float]) -> Tensor:
    """`W + sum_i w_i s_i B_i A_i` for LoRA experts (not DoRA): normalised linear arithmetic."""
    if any(expert.magnitude is not None for expert in experts):
        raise ValueError("a DoRA expert is no sum of low-rank deltas; merge LoRA experts only")
    deltas = [w * e.scale * (e.B @ e.A) for e, w in zip(experts, weights, strict=True)]
    return torch.stack([W, *deltas]).sum(0)


def random_low_rank(
    module: nn.Module,
    rank: int,
    generator: torch.Generator,
    *,
    scale: float = 1.0,
    std: float = 0.2,
    dora: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LowRank:
    """A random expert for this linear, with B non-zero and (DoRA) a magnitude off its start."""
    W, _ = base_weight(module)
    A = std * torch.randn(rank, W.shape[1], generator=generator, dtype=dtype)
    B = std * torch.randn(W.shape[0], rank, generator=generator, dtype=dtype)
    if not dora:
        return LowRank(A, B, scale)
    stretch = 1 + 0.2 * torch.randn(W.shape[0], generator=generator, dtype=dtype)
    return LowRank(A, B, scale, initial_magnitude(W.detach()).to(dtype) * stretch)


def adapted_forward(module: nn.Module, expert: LowRank) -> Callable[[Tensor], Tensor]:
    W, bias = base_weight(module)
    return lambda x: adapted_linear(x, W, bias, expert)


def oracle_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    params: Mapping[str, LowRank],
) -> Tensor:
    """Logits [B, T, vocabulary] of the model with one expert at each named linear."""
    forwards = {
        path: adapted_forward(model.get_submodule(path), expert) for path, expert in params.items()
    }
    with replaced_forwards(model, forwards):
        return model_logits(model, input_ids, attention_mask)


def parameter_count(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """LoRA parameters over linears given as (I, O)."""
    return sum(rank * (width_in + width_out) for width_in, width_out in shapes)
