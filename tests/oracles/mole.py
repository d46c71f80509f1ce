"""MoLE (ICLR 2024): learned gates over N frozen LoRAs; increments, so no residual counts twice.

Letters: B samples, L tokens, N experts, O width of the increments a gate reads.

Parameters: `Params(experts, gates)`
  experts  {module path: list over the N adapters of LowRank or None (adapter lacks the site)}
  gates    {unit: Gate(e [N*O, N] (flatten: [L*N*O, N]), log_tau scalar)}
A unit is named by granularity: "matrix" the module path of the linear; "layer" the path of its
attention or FFN module ("model.layers.0.self_attn"); "block" the path of the transformer layer
("model.layers.0"); "network" the empty string. Row i*O + j of e reads increment i, component j
(flatten: row l*N*O + i*O + j).

Gate   z = LayerNorm(concat_i E_i(x)) over the last axis, no affine; pool; G = softmax(z e / tau)
Unit   O(x) = U(x) + sum_i G_i E_i(x)

Additive execution: one G per unit, from the increments s_i B_i A_i x at the unit's first linear to
RUN (module order can differ: Phi-3 registers o_proj before qkv_proj), used by all its linears.
The whole-model runners are in `oracles.mole_model`.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from oracles.lora import LowRank, increment
from oracles.surgery import at_least_float32

Pool = Literal["token", "mean", "prompt_mean", "flatten"]
Granularity = Literal["matrix", "layer", "block", "network"]

LAYER_NORM_EPS = 1e-5
CLAMP = 1e-8


class Gate(NamedTuple):
    e: Tensor
    log_tau: Tensor


class Params(NamedTuple):
    experts: Mapping[str, Sequence[LowRank | None]]
    gates: Mapping[str, Gate]


class Config(NamedTuple):
    granularity: Granularity = "matrix"
    pool: Pool = "token"
    expert_mask: tuple[bool, ...] | None = None  # True: the branch may be used
    gate_input: Literal["exact", "fast"] = "exact"  # fast: masked increments read as zeros
    weight_sum: Literal["1", "N"] = "1"


def initial_gate(num_experts: int, width: int, dtype: torch.dtype = torch.float32) -> Gate:
    """Zeros and tau = 1: every G is 1/N."""
    return Gate(
        torch.zeros(num_experts * width, num_experts, dtype=dtype), torch.zeros((), dtype=dtype)
    )


def increments(x: Tensor, W: Tensor, experts: Sequence[LowRank | None]) -> list[Tensor]:
    """E_i(x) of one linear, [B, L, O] each; zeros where an adapter has nothing here."""
    nothing = x.new_zeros(*x.shape[:-1], W.shape[0])
    return [nothing if e is None else increment(x, W, e) for e in experts]


def layer_norm(z: Tensor) -> Tensor:
    """Over the last axis, without weight and bias."""
    centred = z - z.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + LAYER_NORM_EPS).sqrt()


def pooled(z: Tensor, pool: Pool, valid: Tensor, prompt: Tensor) -> Tensor:
    """z [B, L, C] -> [B, L, C] (token), [B, C] (means), [B, L*C] (flatten)."""
    if pool == "token":
        return z
    if pool == "flatten":
        return z.flatten(1)
    mask = valid if pool == "mean" else prompt & valid
    if not mask.any(1).all():
        raise ValueError(f"pool={pool!r} needs at least one unmasked token in every sample")
    return torch.stack([z[i][mask[i]].mean(0) for i in range(len(z))])


def gate_logits(
    E: Sequence[Tensor], gate: Gate, pool: Pool, valid: Tensor, prompt: Tensor
) -> Tensor:
    """eps [B, N], or [B, L, N] per token, before the temperature."""
    z = layer_norm(at_least_float32(torch.cat(list(E), dim=-1)))
    z = pooled(z, pool, valid, prompt)
    if z.shape[-1] != gate.e.shape[0]:
        raise ValueError(
            f"the gate reads {gate.e.shape[0]} values but gets {z.shape[-1]}; "
            "pool='flatten' works only at the length it was made for"
        )
    return z @ gate.e


def gate_weights(
    E: Sequence[Tensor],
    gate: Gate,
    pool: Pool,
    valid: Tensor,
    prompt: Tensor,
    expert_mask: Tensor | None = None,
    gate_input: Literal["exact", "fast"] = "exact",
) -> Tensor:
    """G [B, N] or [B, L, N]; `expert_mask` [N] bool sends masked branches to weight zero."""
    if expert_mask is not None:
        if not expert_mask.any():
            raise ValueError("every branch is masked; keep at least one, or run the base model")
        if gate_input == "fast":
            E = [e if keep else torch.zeros_like(e) for e, keep in zip(E, expert_mask, strict=True)]
    eps = gate_logits(E, gate, pool, valid, prompt) / gate.log_tau.exp()
    if expert_mask is not None:
        eps = eps.masked_fill(~expert_mask, -torch.inf)
    return eps.softmax(-1)


def mask_and_renormalise(G: Tensor, expert_mask: Tensor) -> Tensor:
    """Mode 2 as the paper writes it: m_i G_i / sum_j m_j G_j."""
    return expert_mask * G / (expert_mask * G).sum(-1, keepdim=True)


def mix(E: Sequence[Tensor], G: Tensor) -> Tensor:
    """sum_i G_i E_i for G [B, N] or [B, L, N] and E_i [B, L, O]."""
    if G.dim() == 2:
        G = G[:, None, :]
    return sum(G[..., i, None] * E[i] for i in range(len(E)))  # type: ignore[return-value]


def mean_gate(G: Tensor, valid: Tensor) -> Tensor:
    """Average over samples, and over valid tokens if G is per token: [N]."""
    return (G if G.dim() == 2 else G[valid]).mean(0)


def balance_loss(gates: Sequence[Tensor], valid: Tensor) -> Tensor:
    """-sum_i log q_i, q the mean of G over gates, samples and valid tokens; minimum N log N."""
    q = torch.stack([mean_gate(at_least_float32(G), valid) for G in gates]).mean(0)
    return -q.clamp_min(CLAMP).log().sum()


def balance_floor(num_experts: int) -> float:
    """N log N: subtract it from the loss so that zero means balanced for any N."""
    return float(num_experts * torch.tensor(float(num_experts), dtype=torch.float64).log())


def parameter_count(num_gates: int, num_experts: int, width: int) -> int:
    """M (N^2 O + 1) for pools token and mean."""
    return num_gates * (num_experts**2 * width + 1)
