"""The router protocol, what a router may look at, and ready parts: pooling, top-k, balance losses.

A router runs when the input of its module arrives. It receives the route handed down from above, returns a refined
one, and that holds for every site beneath the module.

Letters: N tokens, Q requests, D width of the module's input, E choices, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from loramux.core.types import Route, RouteRecord, When


@dataclass(frozen=True, eq=False)
class RouteView:
    """What a router sees: the tokens of its own adapter's requests, nobody else's.

    x_ND       the module's input (for a router that reads `t`: t_NR = A x, one column per rank row of the site)
    request_N  which request a token belongs to, 0..num_requests-1
    prompt_N   True where the token is part of the prompt; valid_N False on padding
    training   whether the model is in training mode
    recomputed whether backward runs this piece of an earlier forward pass again (activation checkpointing)
    tasks      the task id of every request, where the caller named them
    record     call it to publish what was decided
    """

    x_ND: Tensor
    request_N: Tensor
    prompt_N: Tensor
    valid_N: Tensor
    num_requests: int
    training: bool
    record: Callable[..., None]
    mask_E: Tensor | None = None
    tasks: tuple[str | None, ...] | None = None
    recomputed: bool = False


class Router(nn.Module):
    """Decides a `Route`. Subclasses declare where they sit, when they run and what they read."""

    scope: ClassVar[Literal["layer", "block", "site"]]
    when: When = "token"
    reads: ClassVar[Literal["x", "t", "hidden"]] = "x"
    needs_prompt: ClassVar[bool] = (
        True  # of `prompt` routers: one that looks at tasks needs no token
    )
    # The attribute that `observed` counts tokens in (a tensor of whole numbers or None), where that decides what the
    # router does next; is_summed: it adds it up over data-parallel processes by itself, as the loops of others need.
    counted: ClassVar[str | None] = None
    is_summed: bool = True

    def forward(self, view: RouteView, incoming: Route) -> Route:
        raise NotImplementedError("a router must define forward(view, incoming)")

    def lowered(self) -> object | None:
        """Its decision as flat fp32 arrays (ops/gates.py), for kernels that decide in C; None: torch only."""
        return None

    def observed(self, record: RouteRecord) -> None:
        """Told once, at the end of a forward pass of training, what it recorded there; not when a layer runs again."""


class Recorder:
    """Collects route records of one forward pass. A second record of the same router replaces the first."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], RouteRecord] = {}

    def of(self, adapter: str) -> list[RouteRecord]:
        return [record for (name, _), record in self.records.items() if name == adapter]

    def put(self, record: RouteRecord) -> None:
        self.records[record.adapter, record.path] = record


def segment_softmax(
    score_N: Tensor, segment_N: Tensor, keep_N: Tensor, num_segments: int
) -> Tensor:
    """Softmax of `score_N` within each segment over the kept entries; 0 elsewhere. fp32 or fp64 in, same out."""
    score_N = score_N.masked_fill(~keep_N, float("-inf"))
    top_Q = torch.full((num_segments,), float("-inf"), dtype=score_N.dtype, device=score_N.device)
    top_Q = top_Q.scatter_reduce(0, segment_N, score_N.detach(), "amax")
    top_Q = top_Q.masked_fill(top_Q == float("-inf"), 0.0)  # a segment without kept entries
    power_N = torch.exp(score_N - top_Q[segment_N])
    total_Q = torch.zeros_like(top_Q).index_add(0, segment_N, power_N)
    return power_N / total_Q.clamp_min(torch.finfo(score_N.dtype).tiny)[segment_N]


def segment_sum(value_ND: Tensor, segment_N: Tensor, num_segments: int) -> Tensor:
    """Sum of the rows of each segment: [num_segments, D]."""
    out = value_ND.new_zeros(num_segments, value_ND.shape[-1])
    return out.index_add(0, segment_N, value_ND)


def top_k_stable(score_NE: Tensor, k: int) -> Tensor:
    """Indices [N, k] of the largest scores, best first; ties go to the lower index."""
    return torch.sort(score_NE, dim=-1, descending=True, stable=True).indices[:, :k]


def top_k_mask(score_NE: Tensor, k: int) -> Tensor:
    """True [N, E] at the k largest scores of every row; ties go to the lower index."""
    if score_NE.device.type == "cpu" and score_NE.dtype in (torch.float32, torch.float64):
        # numpy's sort is twenty times as quick as torch's stable one at 1024 x 64, and only ties need the latter.
        sorted_NE = np.sort(score_NE.detach().numpy(), axis=-1)
        mask_NE = score_NE >= torch.from_numpy(sorted_NE[:, -k, None])
        if int(mask_NE.sum()) == k * score_NE.shape[0]:
            return mask_NE
    mask_NE = torch.zeros_like(score_NE, dtype=torch.bool)
    return mask_NE.scatter(1, top_k_stable(score_NE.detach(), k), True)


def mean_over(value_NE: Tensor, valid_N: Tensor) -> Tensor:
    """Mean of the valid rows [E]; zeros when there is none."""
    keep_N1 = valid_N.to(value_NE.dtype).unsqueeze(-1)
    return (value_NE * keep_N1).sum(0) / keep_N1.sum().clamp_min(1)


def switch_balance(probs_NE: Tensor, valid_N: Tensor) -> Tensor:
    """E * sum_i f_i P_i with f the top-1 share (no gradient) and P the mean probability; 1 when balanced, E collapsed.

    Switch Transformer's loss; MiLoRA Eq. 4-5, MixLoRA Eq. 8-9.
    """
    num = probs_NE.shape[-1]
    top_NE = torch.nn.functional.one_hot(top_k_stable(probs_NE.detach(), 1)[:, 0], num)
    share_E = mean_over(top_NE.to(probs_NE.dtype), valid_N)
    return num * (share_E * mean_over(probs_NE, valid_N)).sum()
