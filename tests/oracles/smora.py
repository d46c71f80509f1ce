"""SMoRA: every rank of a LoRA is an expert; gates by a Python loop per token, increments by gathered dot products.

Letters: B samples, L tokens, T = B L tokens in a row, I input width, O output width, r ranks, k active ranks.

Parameters: `{module path: Layer(A [r, I], B [O, r], router [r / rho, I], bias [r])}`, rho ranks per router unit.

z = sigmoid(x router^T), each entry repeated rho times;  zhat = z + bias;  M = the k largest of zhat, ties to the lower
g_j = k z_j / sum_M z  (`from_biased`: zhat for z) on M, else 0;  y = W0 x + (alpha / k) sum_M g_j <A_j, x> B_j
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from oracles.surgery import base_weight, replaced_forwards


class Layer(NamedTuple):
    A: Tensor
    B: Tensor
    router: Tensor
    bias: Tensor


class Config(NamedTuple):
    k: int
    alpha: float
    rho: int = 1
    from_biased: bool = False
    score: Literal["sigmoid", "softmax"] = "sigmoid"


Params = Mapping[str, Layer]


def scores(x: Tensor, layer: Layer, config: Config) -> Tensor:
    """z [T, r]."""
    logits = x @ layer.router.T
    if config.score == "softmax":
        power = torch.exp(logits - logits.max(1, keepdim=True).values)
        z = power / power.sum(1, keepdim=True)
    else:
        z = 1 / (1 + torch.exp(-logits))
    return torch.stack([z[:, j // config.rho] for j in range(len(layer.A))], dim=1)


def largest(values: Sequence[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda j: (-values[j], j))[:k]


def choose(z: Tensor, layer: Layer, config: Config) -> tuple[list[list[int]], Tensor]:
    """(M, one list of ranks per token; g [T, k] in the order of M)."""
    chosen, gates = [], []
    for row in z:
        biased = row + layer.bias
        active = largest(biased.tolist(), config.k)
        values = torch.stack([(biased if config.from_biased else row)[j] for j in active])
        total = values.sum()
        chosen.append(active)
        gates.append(config.k * values / (total if total > 1e-6 else torch.full_like(total, 1e-6)))
    return chosen, torch.stack(gates)


def sparse_increment(x: Tensor, layer: Layer, config: Config) -> Tensor:
    """[T, O]: the active ranks only, gathered for every token."""
    chosen, g = choose(scores(x, layer, config), layer, config)
    M = torch.tensor(chosen)
    H = torch.einsum("td,tjd->tj", x, layer.A[M])
    return config.alpha / config.k * torch.einsum("tj,tjo->to", g * H, layer.B.T[M])


def dense_gates(x: Tensor, layer: Layer, config: Config) -> Tensor:
    """g [T, r] with zeros off M."""
    chosen, g = choose(scores(x, layer, config), layer, config)
    rows = []
    for active, values in zip(chosen, g, strict=True):
        row = [values.new_zeros(())] * len(layer.A)
        for place, j in enumerate(active):
            row[j] = values[place]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def masked_increment(x: Tensor, layer: Layer, config: Config) -> Tensor:
    """The same as B diag(g) A x, one matrix per token."""
    g = dense_gates(x, layer, config)
    deltas = [
        config.alpha / config.k * layer.B @ torch.diag(gate) @ (layer.A @ row)
        for gate, row in zip(g, x, strict=True)
    ]
    return torch.stack(deltas)


def counts(chosen: Sequence[Sequence[int]], num_ranks: int) -> list[int]:
    """Tokens whose M holds rank j."""
    return [sum(j in active for active in chosen) for j in range(num_ranks)]


def moved_bias(bias: Sequence[float], count: Sequence[int], u: float) -> list[float]:
    mean = sum(count) / len(count)
    step = [(u if c < mean else -u if c > mean else 0.0) for c in count]
    return [b + s for b, s in zip(bias, step, strict=True)]


def top_1_mixture(x: Tensor, layer: Layer, num_experts: int, alpha: float) -> Tensor:
    """A mixture of `num_experts` LoRAs, gate 1 for the best one: rank r / num_experts each, scale alpha / rank."""
    rank = len(layer.A) // num_experts
    best = (x @ layer.router.T).argmax(1).tolist()
    rows = []
    for row, e in zip(x, best, strict=True):
        at = slice(e * rank, (e + 1) * rank)
        rows.append(alpha / rank * layer.B[:, at] @ (layer.A[at] @ row))
    return torch.stack(rows)


def random_layer(
    d_in: int, d_out: int, num_ranks: int, rho: int, draw: torch.Generator, dtype: torch.dtype
) -> Layer:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=dtype)

    bias = (0.2 * normal(num_ranks // rho)).repeat_interleave(rho)
    return Layer(
        0.2 * normal(num_ranks, d_in), 0.2 * normal(d_out, num_ranks),
        0.5 * normal(num_ranks // rho, d_in), bias,
    )  # fmt: skip


def adapted_forward(module: nn.Module, layer: Layer, config: Config) -> Callable[[Tensor], Tensor]:
    W, bias = base_weight(module)

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ W.T + sparse_increment(rows, layer, config)
        y = y if bias is None else y + bias
        return y.reshape(*x.shape[:-1], -1)

    return forward


def oracle_logits(model: nn.Module, params: Params, config: Config, **inputs: Tensor) -> Tensor:
    """Logits of the model with every named linear adapted."""
    forwards = {
        path: adapted_forward(model.get_submodule(path), layer, config)
        for path, layer in params.items()
    }
    with replaced_forwards(model, forwards):
        return model(**inputs, use_cache=False).logits
