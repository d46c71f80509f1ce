"""Routers that run inside a decode step without Python per request: token top-k, and late gates that read t = A x.

Why: a token-routed request is decided anew in every block of every step. Lowered to flat arrays, one call decides for
all of them, whoever's gate it is, and writes slots and weights where the next calls read them.

Letters: N tokens, n entries (tokens that one of the gates decides), D width of the block's input, E experts,
k chosen experts, R rank rows of a late gate's experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramux.ops.contract import Pairs, RowMap
from loramux.ops.cpu_structs import TYPES
from loramux.ops.gate_structs import BoundTopK, check_written
from loramux.ops.pool_kernel import kernel


@dataclass(frozen=True, eq=False)
class TopKGate:
    """softmax over E in fp32, the k largest, ties to the lower index; weights sum to 1 if `normalise`."""

    weight_ED: Tensor
    k: int
    normalise: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight_ED", _fp32(self.weight_ED))
        if not 1 <= self.k <= self.num_experts:
            raise ValueError(f"k must be in 1..{self.num_experts} (the experts), got {self.k}")

    @property
    def num_experts(self) -> int:
        return int(self.weight_ED.shape[0])

    def choose(self, x_nD: Tensor) -> tuple[Tensor, Tensor]:
        """(expert [n, k] int64, weight [n, k] fp32)."""
        p_nE = (x_nD.float() @ self.weight_ED.T).softmax(-1)
        expert_nk = torch.sort(p_nE, dim=-1, descending=True, stable=True).indices[:, : self.k]
        weight_nk = p_nE.gather(1, expert_nk)
        if self.normalise:
            weight_nk = weight_nk / weight_nk.sum(-1, keepdim=True)
        return expert_nk, weight_nk


@dataclass(frozen=True, eq=False)
class LateGate:
    """Weights E experts from t = A x of their rank rows, expert after expert.

    logits = (t be - mean total) / sqrt(max(t gram t - mean^2, 0) + eps), mean = t mean_R; softmax(logits * inv_tau).
    `gram` is divided by the number of entries that the norm runs over. Experts whose mask is False get weight 0.
    """

    be_RE: Tensor
    mean_R: Tensor
    gram_RR: Tensor
    total_E: Tensor
    inv_tau: float
    eps: float
    mask_E: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("be_RE", "mean_R", "gram_RR", "total_E"):
            object.__setattr__(self, name, _fp32(getattr(self, name)))
        num_rows, num_experts = self.be_RE.shape
        wanted = {"mean_R": (num_rows,), "gram_RR": (num_rows, num_rows), "total_E": (num_experts,)}
        for name, shape in wanted.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(
                    f"{name} is {tuple(getattr(self, name).shape)}, be_RE {tuple(self.be_RE.shape)} wants {shape}"
                )
        if self.mask_E is not None:
            mask = self.mask_E.detach().to("cpu", torch.bool).contiguous()
            if tuple(mask.shape) != (num_experts,) or not bool(mask.any()):
                raise ValueError(
                    f"mask_E must let at least one of {num_experts} experts through, got {mask.tolist()}"
                )
            object.__setattr__(self, "mask_E", mask)

    @property
    def num_experts(self) -> int:
        return int(self.be_RE.shape[1])

    @property
    def num_rows(self) -> int:
        return int(self.be_RE.shape[0])

    def weights(self, t_nR: Tensor) -> Tensor:
        """[n, E]"""
        t_nR = t_nR.float()
        mean_n1 = (t_nR @ self.mean_R).unsqueeze(1)
        square_n1 = ((t_nR @ self.gram_RR) * t_nR).sum(1, keepdim=True)
        var_n1 = (square_n1 - mean_n1.square()).clamp_min(0)
        logits_nE = (t_nR @ self.be_RE - mean_n1 * self.total_E) * torch.rsqrt(var_n1 + self.eps)
        logits_nE = logits_nE * self.inv_tau
        if self.mask_E is not None:
            logits_nE = logits_nE.masked_fill(~self.mask_E, float("-inf"))
        return logits_nE.softmax(-1)


class TopKCall:
    """Token routers of one block for one step shape. `run` decides anew and writes in place.

    slot_base[g]: global slot of the first expert of gates[g], or the slots of all its experts. Entry i routes
    token[i] with gates[gate[i]]: its k pairs start at pair[i] in `enter` and in `exit`, its k rows at row[i] of `rows`.
    """

    def __init__(
        self,
        gates: Sequence[TopKGate],
        slot_base: Sequence[int | Sequence[int]],
        token: Tensor,
        gate: Tensor,
        pair: Tensor,
        row: Tensor,
        enter: Pairs,
        exit: Pairs,
        rows: RowMap,
    ):
        self.gates, self.enter, self.exit, self.rows = tuple(gates), enter, exit, rows
        self.slots = [_slots(g, base) for g, base in zip(gates, slot_base, strict=True)]
        self.token, self.gate, self.pair, self.row = (_int32(t) for t in (token, gate, pair, row))
        self.width = int(gates[0].weight_ED.shape[1]) if gates else 0
        self._check()
        self._bound = None if kernel().top_k is None else BoundTopK(self, rows.num_tokens)

    def _check(self) -> None:
        """The kernel writes where it is told to."""
        for name, tensor, dtype in (
            ("enter.slot", self.enter.slot, torch.int32),
            ("exit.slot", self.exit.slot, torch.int32),
            ("exit.weight", self.exit.weight, torch.float32),
            ("rows.weight", self.rows.weight, torch.float32),
        ):
            check_written(name, tensor, dtype)
        if {gate.weight_ED.shape[1] for gate in self.gates} - {self.width}:
            raise ValueError("the gates of one call must read inputs of one width")
        num_entries = self.token.shape[0]
        if any(t.shape != (num_entries,) for t in (self.gate, self.pair, self.row)):
            raise ValueError("token, gate, pair and row must have one entry per routed token")
        _check_inside("gate", self.gate, 1, len(self.gates))
        _check_inside("token", self.token, 1, self.rows.num_tokens)
        k_n = torch.tensor([gate.k for gate in self.gates], dtype=torch.int32)[self.gate.long()]
        _check_inside("pair", self.pair, k_n, min(self.enter.num_pairs, self.exit.num_pairs))
        _check_inside("row", self.row, k_n, self.rows.num_rows)

    def run(self, x_ND: Tensor) -> None:
        """x_ND: the input of the block, [N, D] or [1, N, D]."""
        if self._bound is None or x_ND.dtype not in TYPES:
            self.run_torch(x_ND.reshape(-1, x_ND.shape[-1]))
            return
        if x_ND.shape[-1] != self.width:
            raise ValueError(f"x is {x_ND.shape[-1]} wide, the gates read {self.width}")
        self._bound.run(x_ND if x_ND.is_contiguous() else x_ND.contiguous())

    def run_torch(self, x_ND: Tensor) -> None:
        """The definition."""
        for g, (gate, slots_E) in enumerate(zip(self.gates, self.slots, strict=True)):
            mine = (self.gate == g).nonzero()[:, 0]
            expert_nk, weight_nk = gate.choose(x_ND[self.token[mine].long()])
            step_k = torch.arange(gate.k)
            pair_nk = self.pair[mine].long().unsqueeze(1) + step_k
            row_nk = self.row[mine].long().unsqueeze(1) + step_k
            slot_nk = slots_E[expert_nk]
            self.enter.slot[pair_nk] = slot_nk
            self.exit.slot[pair_nk] = slot_nk
            self.exit.weight[pair_nk] = weight_nk
            self.rows.weight[row_nk] = weight_nk


class LateCall:
    """Late gates of one unit for one step shape, handed to the group call of the unit's first linears.

    Entry i is token[i], weighed by gates[gate[i]]: its E pairs start at pair[i], in the order of the experts. The
    weights are written into the pairs of the group's first member and hold for all sites that share that `weight`.
    also: weights of the unit's other sites, over pairs that lie alike, fp32 [P]; they are written as well.
    """

    def __init__(
        self,
        gates: Sequence[LateGate],
        token: Tensor,
        gate: Tensor,
        pair: Tensor,
        also: Sequence[Tensor] = (),
    ):
        self.gates, self.also = tuple(gates), tuple(also)
        self.token, self.gate, self.pair = (_int32(t) for t in (token, gate, pair))
        if any(t.shape != self.token.shape for t in (self.gate, self.pair)):
            raise ValueError("token, gate and pair must have one entry per weighed token")
        _check_inside("gate", self.gate, 1, len(self.gates))
        self.cache: dict[object, object] = {}


def _slots(gate: TopKGate, base: int | Sequence[int]) -> Tensor:
    slots = range(base, base + gate.num_experts) if isinstance(base, int) else base
    if len(slots) != gate.num_experts:
        raise ValueError(f"a gate of {gate.num_experts} experts was given the slots {list(slots)}")
    return torch.tensor(list(slots), dtype=torch.int32)


def _check_inside(name: str, start_n: Tensor, length: int | Tensor, end: int) -> None:
    if bool(((start_n < 0) | (start_n + length > end)).any()):
        raise ValueError(f"{name} must stay within 0..{end - 1}, got {start_n.tolist()}")


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _int32(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.int32).contiguous()
