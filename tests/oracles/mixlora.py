"""MixLoRA (arXiv 2404.15159): the FFN block with N LoRA experts over one frozen FFN.

Letters: T tokens (rows), D width, F inner width, N experts, K experts per token, R rank.

`Ffn(kind, linears, act)`, `linears` being {name: (W [O, I], bias or None)}:
  "gated"  gate_proj, up_proj [F, D], down_proj [D, F]    act(gate) * up, then down
  "fused"  gate_up_proj [2F, D], down_proj [D, F]         halves: first gate, then up
  "plain"  (fc1, fc2) or (c_fc, c_proj)                   fc1, act, fc2
One expert is {linear name: LowRank} (a name may be missing); fused has one pair with B [2F, R].
Routers are G [N, D]. `Route` holds weight and selected [T, N], overflow [T], p and z [T, N].
A row with overflow runs the frozen FFN.

The whole-model runner and the auxiliary losses are in `oracles.mixlora_model`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from oracles.lora import LowRank, adapted_linear, increment
from oracles.surgery import at_least_float32, base_weight

Linear = tuple[Tensor, Tensor | None]
Expert = Mapping[str, LowRank]


class Ffn(NamedTuple):
    kind: Literal["gated", "fused", "plain"]
    linears: Mapping[str, Linear]
    act: Callable[[Tensor], Tensor]


class Route(NamedTuple):
    weight: Tensor
    selected: Tensor
    overflow: Tensor
    p: Tensor
    z: Tensor


def read_ffn(module: nn.Module) -> Ffn:
    """Recognise a transformers FFN by the names of its linears."""
    names = [name for name, _ in module.named_children()]
    kinds: dict[Literal["gated", "fused", "plain"], list[tuple[str, ...]]] = {
        "gated": [("gate_proj", "up_proj", "down_proj")],
        "fused": [("gate_up_proj", "down_proj")],
        "plain": [("fc1", "fc2"), ("c_fc", "c_proj")],
    }
    act = next(getattr(module, n) for n in ("act_fn", "activation_fn", "act") if n in names)
    for kind, choices in kinds.items():
        for choice in choices:
            if set(choice) <= set(names):
                linears = {n: base_weight(module.get_submodule(n)) for n in choice}
                return Ffn(kind, linears, act)
    raise ValueError(f"no known FFN shape in {names}; known: {kinds}")


# -- routing -------------------------------------------------------------------------------------


def router_logits(x: Tensor, G: Tensor) -> Tensor:
    """z = fp32(x) G^T, [T, N]."""
    return at_least_float32(x) @ at_least_float32(G).T


def route_top_k(z: Tensor, k: int) -> Route:
    """Strategy "mixlora": softmax, the k largest, weights made to sum to one again."""
    p = z.softmax(-1)
    _, index = p.topk(k, dim=-1)
    selected = torch.zeros_like(p, dtype=torch.bool).scatter(-1, index, True)
    kept = p * selected
    weight = kept / kept.sum(-1, keepdim=True)
    return Route(weight, selected, _nothing(p), p, z)


def top_p_selection(p: Tensor, top_p: float) -> Tensor:
    """Bool [T, N]: descending, everything while the running sum is at most top_p, plus one."""
    rows = []
    for row in p:
        selected, total = torch.zeros_like(row, dtype=torch.bool), torch.zeros_like(row[0])
        for expert in row.sort(descending=True, stable=True).indices:
            total = total + row[expert]
            selected[expert] = True
            if total > top_p:
                break
        rows.append(selected)
    return torch.stack(rows)


def route_top_p(
    z: Tensor,
    top_p: float = 0.8,
    *,
    renormalise: bool = False,
    temperature: float = 0.0,
    divide: Literal["logits", "probabilities"] = "logits",
) -> Route:
    """Strategy "mixlora-dynamic". The released code keeps raw p and divides the probabilities.

    Divided probabilities no longer sum to one; selection and weights both use the divided ones.
    """
    if temperature > 0 and divide == "logits":
        p = (z / temperature).softmax(-1)
    else:
        p = z.softmax(-1) / (temperature if temperature > 0 else 1.0)
    selected = top_p_selection(p, top_p)
    weight = p * selected
    if renormalise:
        weight = weight / weight.sum(-1, keepdim=True)
    return Route(weight, selected, _nothing(p), p, z)


def route_switch(
    z: Tensor,
    *,
    capacity: int | None = None,
    sequence: Tensor | None = None,
    token_mask: Tensor | None = None,
    multiply: bool = False,
) -> Route:
    """Strategy "mixlora-switch": top-1; a token beyond its expert's `capacity` overflows.

    Capacity is per sequence (`sequence` [T]: the sequence of each row) and in token order; masked
    rows take no place and never overflow. Give no capacity outside training. The weight is one
    with the gradient of p, or p itself with `multiply`.
    """
    p = z.softmax(-1)
    top = p.argmax(-1)
    overflow = _nothing(p)
    if capacity is not None:
        used: dict[tuple[int, int], int] = {}
        for t in range(len(top)):
            if token_mask is not None and not token_mask[t]:
                continue
            key = (0 if sequence is None else int(sequence[t]), int(top[t]))
            overflow[t] = used.get(key, 0) >= capacity
            used[key] = used.get(key, 0) + 1
    selected = torch.zeros_like(p, dtype=torch.bool).scatter(-1, top[:, None], True)
    selected = selected & ~overflow[:, None]
    weight = selected * (p if multiply else 1 + (p - p.detach()))
    return Route(weight, selected, overflow, p, z)


def _nothing(p: Tensor) -> Tensor:
    return torch.zeros(p.shape[0], dtype=torch.bool)


# -- the FFN -------------------------------------------------------------------------------------


def entry_linears(ffn: Ffn) -> list[str]:
    return list(ffn.linears)[:-1]


def exit_linear(ffn: Ffn) -> str:
    return list(ffn.linears)[-1]


def activate(ffn: Ffn, entries: Sequence[Tensor]) -> Tensor:
    """The elementwise part between the entry linears and the exit linear."""
    if ffn.kind == "plain":
        return ffn.act(entries[0])
    if ffn.kind == "fused":
        gate, up = entries[0].chunk(2, dim=-1)
    else:
        gate, up = entries
    return ffn.act(gate) * up


def expert_ffn(x: Tensor, ffn: Ffn, expert: Expert) -> Tensor:
    """E_e(x): one whole FFN with one expert's updates inside; an empty expert is the base FFN."""
    entries = [adapted_linear(x, *ffn.linears[n], expert.get(n)) for n in entry_linears(ffn)]
    last = exit_linear(ffn)
    return adapted_linear(activate(ffn, entries), *ffn.linears[last], expert.get(last))


def ffn_naive(x: Tensor, ffn: Ffn, experts: Sequence[Expert], route: Route) -> Tensor:
    """y_t = sum_e w_te E_e(x_t): one pass per expert over its own rows; overflow rows run bare."""
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        rows = route.selected[:, e].nonzero().squeeze(-1)
        weight = route.weight[rows, e, None].to(x.dtype)
        y = y.index_add(0, rows, weight * expert_ffn(x[rows], ffn, expert))
    rows = route.overflow.nonzero().squeeze(-1)
    return y.index_add(0, rows, expert_ffn(x[rows], ffn, {}))


def ffn_combined(x: Tensor, ffn: Ffn, experts: Sequence[Expert], route: Route) -> Tensor:
    """The same function with the base entry products made once and W2 applied to the mixture.

    y = W2 (sum_e w_e u_e) + (sum_e w_e) bias + sum_e w_e s B2_e A2_e u_e. LoRA on the exit only.
    """
    last = exit_linear(ffn)
    if any(e[last].magnitude is not None for e in experts if last in e):
        raise ValueError("DoRA on the exit linear scales rows per expert; use ffn_naive")
    base = {n: x @ ffn.linears[n][0].T for n in entry_linears(ffn)}
    W2, bias2 = ffn.linears[last]
    mixed, total = torch.zeros(x.shape[0], W2.shape[1], dtype=x.dtype), torch.zeros_like(x)
    weights = torch.cat([route.weight, route.overflow[:, None].to(route.weight.dtype)], dim=1)
    for e, expert in enumerate([*experts, {}]):
        entries = []
        for name in entry_linears(ffn):
            W, bias = ffn.linears[name]
            h = base[name] if name not in expert else base[name] + increment(x, W, expert[name])
            entries.append(h if bias is None else h + bias)
        weighted = weights[:, e, None] * activate(ffn, entries)
        mixed = mixed + weighted
        if last in expert:
            total = total + increment(weighted, W2, expert[last])
    y = mixed @ W2.T + total
    return y if bias2 is None else y + weights.sum(-1, keepdim=True) * bias2


def base_multiply_adds(width: int, inner: int, k: int) -> dict[str, int]:
    """Multiply-adds per token of the three ways to run a gated FFN's base linears."""
    area = width * inner
    return {"naive": 3 * k * area, "shared": (2 + k) * area, "combined": 3 * area}
