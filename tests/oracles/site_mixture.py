"""Mixtures with a gate at every linear: MoLA, LoRAMoE, HydraLoRA, MoLoRA, and MOELoRA whose gate reads the task.

    y = W x + bias + sum_i w_i(x) s_i B_i A_i x

One expert after the other, in the order of the sum; nothing is stacked and no zero is skipped.

Layout of a model's parameters: `{module path: Mixture}`. `gate` [E, I] for gates that read x; for MOELoRA `embedding`
[tasks, M] and `gate` [E, M].

Letters: B samples, T tokens, I input width, E experts, M width of an embedding, Q samples of a loss.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oracles.lora import LowRank, low_rank_product
from oracles.surgery import at_least_float32, base_weight, model_logits, replaced_forwards


class Mixture(NamedTuple):
    experts: list[LowRank]
    gate: Tensor
    embedding: Tensor | None = None


Weigh = Callable[[Mixture, Tensor], Tensor]  # (mixture, x [B, T, I]) -> weights [B, T, E]


def soft(mixture: Mixture, x: Tensor) -> Tensor:
    """LoRAMoE, HydraLoRA, MoLoRA: softmax over all experts."""
    return (at_least_float32(x) @ mixture.gate.T).softmax(-1)


def top_renormalised(k: int) -> Weigh:
    """MoLA: the k most probable experts (the lower number where two are equal), their weights divided by their sum."""

    def weigh(mixture: Mixture, x: Tensor) -> Tensor:
        p = soft(mixture, x)
        weights = torch.zeros_like(p)
        for b in range(p.shape[0]):
            for t in range(p.shape[1]):
                values = p[b, t].tolist()
                order = sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]
                total = sum(p[b, t, e] for e in order)
                for e in order:
                    weights[b, t, e] = p[b, t, e] / total
        return weights

    return weigh


def by_task(tasks: Sequence[int]) -> Weigh:
    """MOELoRA: sample b is of task `tasks[b]`; -1 is a task without embedding, whose experts count alike."""

    def weigh(mixture: Mixture, x: Tensor) -> Tensor:
        rows = []
        for task in tasks:
            if task < 0:
                rows.append(torch.full_like(mixture.gate[:, 0], 1 / len(mixture.gate)))
            else:
                assert mixture.embedding is not None
                rows.append((mixture.gate @ mixture.embedding[task]).softmax(-1))
        return torch.stack(rows)[:, None, :].expand(-1, x.shape[1], -1)

    return weigh


def mixed_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, mixture: Mixture, weights: Tensor
) -> Tensor:
    y = x @ W.T
    for e, expert in enumerate(mixture.experts):
        y = y + (weights[..., e : e + 1] * low_rank_product(x, expert)).to(y.dtype)
    return y if bias is None else y + bias


def oracle_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    params: Mapping[str, Mixture],
    weigh: Weigh,
) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    """(logits [B, T, vocabulary], path -> {"weights", "probs"} [B, T, E])."""
    details: dict[str, dict[str, Tensor]] = {}

    def forward_of(path: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        W, bias = base_weight(module)

        def forward(x: Tensor) -> Tensor:
            weights = weigh(params[path], x)
            probs = weights if params[path].embedding is not None else soft(params[path], x)
            details[path] = {"weights": weights, "probs": probs}
            return mixed_linear(x, W, bias, params[path], weights)

        return forward

    forwards: dict[str, Any] = {p: forward_of(p, model.get_submodule(p)) for p in params}
    with replaced_forwards(model, forwards):
        return model_logits(model, input_ids, attention_mask), details


# -- losses --------------------------------------------------------------------------------------


def localised(
    probs: Tensor,
    mask: Tensor,
    types: Sequence[int | None],
    delta: float,
    orientation: str = "code",
) -> Tensor:
    """LoRAMoE's constraint at one linear: probs [B, T, E], mask [B, T] of real tokens, one type per sample."""
    num = probs.shape[-1]
    z = []
    for n, kind in enumerate(types):
        for e in range(num):
            total = sum(probs[n, t, e] for t in range(probs.shape[1]) if mask[n, t])
            is_first_half = e < num // 2
            own = is_first_half if kind == 1 else not is_first_half
            sign = 1 if own else -1
            if orientation == "specialise":
                sign = -sign
            z.append(total * (1.0 if kind is None else 1 + sign * delta))
    entries = torch.stack(z)
    mean = entries.sum() / len(entries)
    variance = ((entries - mean) ** 2).sum() / (len(entries) - 1)
    return variance / (mean**2 + 1e-10)


def selection_balance(weights: Tensor, probs: Tensor, mask: Tensor) -> Tensor:
    """MoLA's loss at one linear: E * sum_i (share of the selections) (mean probability), over real tokens."""
    num = probs.shape[-1]
    chosen, mean = [0.0] * num, [torch.zeros((), dtype=probs.dtype)] * num
    count = int(mask.sum())
    for b, t in mask.nonzero().tolist():
        for e in range(num):
            chosen[e] += float(weights[b, t, e] > 0)
            mean[e] = mean[e] + probs[b, t, e] / count
    total = sum(chosen)
    return num * sum((chosen[e] / total) * mean[e] for e in range(num))


# -- parameter counts ----------------------------------------------------------------------------


def count_full(shapes: Sequence[tuple[int, int]], experts: int, rank: int) -> int:
    """Experts with an A and a B each, one gate row per expert, over linears given as (I, O)."""
    return sum(experts * rank * (i + o) + experts * i for i, o in shapes)


def count_shared(shapes: Sequence[tuple[int, int]], heads: int, rank: int) -> int:
    """HydraLoRA: one A, `heads` B, one gate row per head."""
    return sum(rank * i + heads * rank * o + heads * i for i, o in shapes)


def count_by_task(shapes: Sequence[tuple[int, int]], experts: int, rank: int, tasks: int) -> int:
    """MOELoRA: the total rank's A and B, an embedding of width 64 per task, a gate over it."""
    return sum(rank * (i + o) + 64 * tasks + 64 * experts for i, o in shapes)
