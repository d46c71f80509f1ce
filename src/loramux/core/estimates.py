"""Importance of ranks or modules without ablating them: cheaper stand-ins for `core.ablation`, and other criteria.

With c_u the switch of a unit u and S = minus the mean cross-entropy of the supervised tokens:

    taylor       S(M\\u) ~ S(M) - dS/dc_u at all c = 1;  S(M_u) ~ S(base) + dS/dc_u at all c = 0: two backward passes
                 for all units
    sensitivity  sum over the unit's weights of |w dL/dw|, L = -S (AdaLoRA's family, arXiv 2303.10512)
    output_norm  mean over tokens of || s B^T A x ||^2, optionally over || W x ||^2 (LoRA-drop, arXiv 2402.07721)

With y = W x + sum_i c_i s (A_i x) B_i, dS/dc_i = sum over tokens of s (A_i x) (B_i . dS/dy): what enters a linear and
the gradient of what leaves it are enough, at c = 1 and at c = 0 alike.

Letters: N tokens, I input width, O output width, R rank rows of a site, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loramux.core.ablation import Scores, Unit, check_scorable, inputs_of
from loramux.core.adapter import Adapter
from loramux.core.attach import Attachment
from loramux.core.linear import LoraLinear
from loramux.core.modes import evaluating
from loramux.core.supervised import token_losses

Watch = Callable[[str, Tensor, Tensor], None]  # path, input [N, I], output [N, O] of a linear


@dataclass(frozen=True, eq=False)
class Criterion:
    """What a scorer without ablation says of every unit on one batch.

    importance [U], float64. weight: what the batch counts for in a mean over several.
    """

    importance: Tensor
    weight: int


def taylor_scores(
    handle: Attachment,
    batch: Mapping[str, Tensor],
    units: Sequence[Unit],
    name: str | None = None,
) -> Scores:
    """First-order estimates of what `ablation_scores` computes; `full` and `base` are exact."""
    adapter = _checked(handle, name)
    with evaluating(handle.model), _frozen(adapter):
        full, at_one = _slopes(handle, adapter, batch, adapter.name)
        base, at_zero = _slopes(handle, adapter, batch, None)
    _, labels = inputs_of(batch, handle.dispatch.weight.device)
    return Scores(
        units=tuple(units),
        full=full,
        base=base,
        without=full - _by_unit(at_one, units),
        alone=base + _by_unit(at_zero, units),
        num_tokens=int((labels[:, 1:] != -100).sum()),
    )


def sensitivity_scores(
    handle: Attachment,
    batch: Mapping[str, Tensor],
    units: Sequence[Unit],
    name: str | None = None,
) -> Criterion:
    """Sum of |w dL/dw| over the weights of each unit.

    The gradient is that of one batch's mean loss and its absolute value is taken, so another division into batches
    gives other scores; every batch weighs the same.
    """
    adapter = _checked(handle, name)
    rows = {path: found for path, found in adapter.rows.items() if found.spans.num_rows}
    factors = [factor for found in rows.values() for factor in (found.a, found.b)]
    flags = [factor.requires_grad for factor in factors]
    last = handle.dispatch.last
    try:
        for factor in factors:
            factor.requires_grad_(True)
        with evaluating(handle.model), torch.enable_grad():
            loss = _loss(handle, batch, adapter.name)
            grads = torch.autograd.grad(loss, factors)
    finally:
        handle.dispatch.last = last
        for factor, flag in zip(factors, flags, strict=True):
            factor.requires_grad_(flag)
    products = [(f.detach() * g).abs().double().sum(1) for f, g in zip(factors, grads, strict=True)]
    found = {path: products[2 * i] + products[2 * i + 1] for i, path in enumerate(rows)}
    return Criterion(_by_unit(found, units), 1)


def output_norm_scores(
    handle: Attachment,
    batch: Mapping[str, Tensor],
    units: Sequence[Unit],
    name: str | None = None,
    *,
    relative: bool = False,
) -> Criterion:
    """Mean squared norm of what each unit adds, over real tokens; `relative` to that of the base's output.

    A batch weighs as many as it has real tokens, so several batches are as one.
    """
    adapter = _checked(handle, name)
    call, _ = inputs_of(batch, handle.dispatch.weight.device)
    valid_N = call.get("attention_mask", torch.ones_like(call["input_ids"])).reshape(-1).bool()
    score_U = torch.zeros(len(units), dtype=torch.float64)

    def watch(path: str, x_NI: Tensor, y_NO: Tensor) -> None:
        rows = adapter.rows[path].folded()
        x_NI = x_NI[valid_N]
        t_NR = nn.functional.linear(x_NI, rows.a.to(x_NI.dtype)) * _scales(
            rows.spans.row_scale_R, x_NI
        )
        base_N = _squared(handle.linears[path].base_layer(x_NI)) if relative else None
        for u, unit in enumerate(units):
            if unit.path != path:
                continue
            at = list(unit.rows)
            norm_N = _squared(t_NR[:, at] @ rows.b[at].to(x_NI.dtype))
            score_U[u] = (norm_N if base_N is None else norm_N / base_N).mean()

    with evaluating(handle.model), torch.no_grad(), _watching(handle, adapter, watch):
        _loss(handle, batch, adapter.name)
    return Criterion(score_U, int(valid_N.sum()))


def _slopes(
    handle: Attachment, adapter: Adapter, batch: Mapping[str, Tensor], name: str | None
) -> tuple[float, dict[str, Tensor]]:
    """(S, dS/dc of every rank row by site) with the adapter on (`name`) or with the bare base (None)."""
    found: dict[str, Tensor] = {}

    def watch(path: str, x_NI: Tensor, y_NO: Tensor) -> None:
        rows = adapter.rows[path].folded()
        if not y_NO.requires_grad:
            y_NO.requires_grad_(True)
        x_NI = x_NI.detach()

        def arrived(grad_NO: Tensor) -> None:
            g_NO = grad_NO.reshape(-1, grad_NO.shape[-1])
            t_NR = nn.functional.linear(x_NI, rows.a.to(x_NI.dtype))
            slope_NR = (
                t_NR * (g_NO @ rows.b.to(g_NO.dtype).T) * _scales(rows.spans.row_scale_R, x_NI)
            )
            found[path] = -slope_NR.double().sum(0)

        y_NO.register_hook(arrived)

    with torch.enable_grad(), _watching(handle, adapter, watch):
        loss = _loss(handle, batch, name)
        loss.backward()  # type: ignore[no-untyped-call]
    return -float(loss.detach()), found


def _loss(handle: Attachment, batch: Mapping[str, Tensor], name: str | None) -> Tensor:
    """Mean cross-entropy, float64."""
    call, labels = inputs_of(batch, handle.dispatch.weight.device)
    last = handle.dispatch.last
    try:
        with handle.batch([name] * call["input_ids"].shape[0]):
            return token_losses(handle.model, call, labels).double().mean()
    finally:
        handle.dispatch.last = last


@contextmanager
def _watching(handle: Attachment, adapter: Adapter, watch: Watch) -> Iterator[None]:
    """Calls `watch` after every linear that holds rows of the adapter."""

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, LoraLinear)
        watch(module.path, args[0].reshape(-1, args[0].shape[-1]), output)

    with ExitStack() as stack:
        for path, rows in adapter.rows.items():
            if rows.spans.num_rows:
                stack.callback(handle.linears[path].register_forward_hook(after).remove)
        yield


@contextmanager
def _frozen(adapter: Adapter) -> Iterator[None]:
    """A backward pass inside reaches no parameter, so no gradient is left behind."""
    flags = [(p, p.requires_grad) for p in adapter.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _by_unit(by_row: Mapping[str, Tensor], units: Sequence[Unit]) -> Tensor:
    return torch.stack([by_row[unit.path][list(unit.rows)].sum().cpu() for unit in units])


def _checked(handle: Attachment, name: str | None) -> Adapter:
    adapter = handle._named(name)
    check_scorable(adapter)
    return adapter


def _scales(scale_R: Tensor, like: Tensor) -> Tensor:
    return scale_R.to(like.device, like.dtype)


def _squared(value_ND: Tensor) -> Tensor:
    return value_ND.double().square().sum(1).cpu()
