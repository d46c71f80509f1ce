"""One call of the base for the rows of several jobs, and the gradients of each.

A job's rows are collated as in a run of its own and laid one behind the other into a single row, so no job is padded
to another's length. Its loss is the sum over its own supervised tokens divided by those of its own step. Gradients
come back as tensors and are added only when the whole call went well: a call that ran out of memory leaves no trace.

Letters: N tokens of the call, S supervised positions, V vocabulary, B rows of a job, T tokens per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loramux.core import prepass
from loramux.core.batch import IGNORED_LABEL
from loramux.core.state import State
from loramux.core.together import Share, Together
from loramux.train.attention import fastest_attention
from loramux.train.joint.attention import RowAttention, RowBlock
from loramux.train.loss import SupervisedForward, forward_inputs
from loramux.train.objective import Objective
from loramux.train.rng import States, running_with

if TYPE_CHECKING:
    from loramux.api import Handle


@dataclass(frozen=True, eq=False)
class Part:
    """One micro-batch of one job. total: what the whole step weighs; rng: the job's generators, advanced."""

    name: str
    batch: Mapping[str, Any]
    total: int
    parameters: Mapping[str, nn.Parameter]
    rng: States
    objective: Objective

    @property
    def num_tokens(self) -> int:
        """Padding included."""
        return int(self.batch["input_ids"].numel())


@dataclass(frozen=True, eq=False)
class Outcome:
    """Loss, auxiliary loss and figures [K] of a part, each its share of the step, and every parameter's gradient.

    state: the forward pass, whose records say how it was routed.
    """

    loss: Tensor
    aux: Tensor
    figures: Tensor
    grads: tuple[Tensor | None, ...]
    state: State


class JointForward:
    """Runs parts of several jobs in one call. Use inside `SupervisedForward.hooked()`, the model in training mode."""

    def __init__(self, model: nn.Module, handle: Handle, forward: SupervisedForward):
        self.model = model
        self.handle = handle
        self.forward = forward
        self.attention = RowAttention(model)
        some = next(model.parameters())
        self.device, self.dtype = some.device, some.dtype
        self._dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]

    def __call__(self, parts: Sequence[Part]) -> list[Outcome]:
        """Gradients of the parts; their generators are advanced, nothing else is changed."""
        # Rows of one length, and adapters with as many tokens, are worked on in one product where they are neighbours.
        order = sorted(range(len(parts)), key=lambda i: tuple(parts[i].batch["input_ids"].shape))
        found = dict(zip(order, self._call([parts[i] for i in order]), strict=True))
        return [found[i] for i in range(len(parts))]

    def _call(self, parts: Sequence[Part]) -> list[Outcome]:
        inputs = [forward_inputs(part.batch, self.device) for part in parts]
        shares = [self._share(part, dict(call)) for part, call in zip(parts, inputs, strict=True)]
        blocks = [_block(call, share.draws) for call, share in zip(inputs, shares, strict=True)]
        targets = [_targets(part.batch["labels"]) for part in parts]
        with ExitStack() as stack:
            together = stack.enter_context(self._open(shares))
            stack.enter_context(self.attention.over(blocks))
            where_S = _where(targets, blocks).to(self.device)
            logits_SV = self.forward.logits(
                _flat(inputs, blocks), (torch.zeros_like(where_S), where_S)
            )
            together.is_forward = False
            losses, figures = self._losses(parts, shares, targets, logits_SV)
            grads = self._backward(parts, losses)
        for share in shares:
            share.state.tell_routers()
        return [
            Outcome(loss.detach(), aux.detach(), found, own, share.state)
            for (loss, aux), found, own, share in zip(losses, figures, grads, shares, strict=True)
        ]

    def alone(self, part: Part) -> Outcome:
        """The same by an ordinary call: what a job does when it is the only one, and when a shared call failed."""
        self.handle.use(part.name)
        width = part.batch["input_ids"].shape[1]
        with (
            running_with(part.rng, self.device),
            fastest_attention(self.device, self.dtype, width),
        ):
            loss_sum, figures_K = part.objective.loss(
                part.batch, *self.forward.predictions(part.batch)
            )
            state = self.handle.dispatch.last
            assert state is not None
            aux = self._auxiliary(part, state, loss_sum)
            losses = [(loss_sum / part.total, aux)]
            (grads,) = self._backward([part], losses)
        figures_K = figures_K / part.total
        return Outcome(losses[0][0].detach(), aux.detach(), figures_K, grads, state)

    def _auxiliary(self, part: Part, state: State, like: Tensor) -> Tensor:
        """The auxiliary losses of a part, as much of them as its share of the step."""
        fraction = part.objective.share(part.batch, part.total)
        method = state.members[0].adapter.method
        found = method.aux_losses(state.recorder.of(part.name))
        return fraction * sum(found.values(), like.new_zeros(()))

    def _losses(
        self,
        parts: Sequence[Part],
        shares: Sequence[Share],
        targets: Sequence[tuple[Tensor, Tensor]],
        logits_SV: Tensor,
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """(loss and auxiliary loss, figures) of every part."""
        counts = [target.shape[0] for target, _ in targets]
        losses, figures = [], []
        for part, share, (target_S, _), own_SV in zip(
            parts, shares, targets, logits_SV.split(counts), strict=True
        ):
            loss_sum, figures_K = part.objective.loss(part.batch, own_SV, target_S.to(self.device))
            loss = loss_sum / part.total
            losses.append((loss, self._auxiliary(part, share.state, loss)))
            figures.append(figures_K / part.total)
        return losses, figures

    def _backward(
        self, parts: Sequence[Part], losses: Sequence[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor | None, ...]]:
        """One backward pass; every loss reaches the parameters of its own job only."""
        owned = [list(part.parameters.values()) for part in parts]
        roots = [loss + aux for loss, aux in losses]
        found = torch.autograd.grad(
            roots,
            [parameter for own in owned for parameter in own],
            grad_outputs=[torch.ones_like(root) for root in roots],
            allow_unused=True,
        )
        each = iter(found)
        return [tuple(next(each) for _ in own) for own in owned]

    # --- What surrounds the call ------------------------------------------------------------------

    def _share(self, part: Part, call: dict[str, Any]) -> Share:
        """The job's own forward pass, opened as a call of it alone would."""
        dispatch = self.handle.dispatch
        self.handle.use(part.name)

        def draws() -> AbstractContextManager[None]:
            return running_with(part.rng, self.device)

        with draws():
            dispatch.open(call, training=True)
            try:
                prepass.run(self.model, dispatch, call)
                state = dispatch.state
            finally:
                dispatch.state = None
        assert state is not None
        return Share(state, draws, lambda: _again(part.rng))

    @contextmanager
    def _open(self, shares: Sequence[Share]) -> Iterator[Together]:
        dispatch = self.handle.dispatch
        together = Together(dispatch, shares)
        dispatch.together = together
        dispatch.listen(any(not share.state.is_settled for share in shares))
        for module in self._dropouts:
            vars(module)["forward"] = _by_shares(together, module)
        try:
            yield together
        finally:
            dispatch.together = None
            for module in self._dropouts:
                vars(module).pop("forward", None)


def _by_shares(together: Together, module: nn.Dropout) -> Callable[[Tensor], Tensor]:
    def drop(x: Tensor) -> Tensor:
        if not module.training:
            return x
        return together.each(x, lambda own: nn.functional.dropout(own, module.p))

    return drop


def _again(rng: States) -> AbstractContextManager[None]:
    """A context that draws what is drawn from here on once more, and then forgets that it did."""
    frozen = dict(rng)

    @contextmanager
    def rewound() -> Iterator[None]:
        later = dict(rng)
        rng.update(frozen)
        try:
            yield
        finally:
            rng.update(later)

    return _Repeated(rewound)


class _Repeated(AbstractContextManager[None]):
    """A context manager that may be entered several times, one after the other: backward may come twice."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]):
        self._make = make
        self._open: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        inner = self._make()
        inner.__enter__()
        self._open.append(inner)

    def __exit__(self, *error: Any) -> None:
        self._open.pop().__exit__(*error)


def _block(call: Mapping[str, Any], draws: Callable[[], AbstractContextManager[None]]) -> RowBlock:
    b, t = call["input_ids"].shape
    return RowBlock((b, t), call.get("attention_mask"), call.get("segment_ids"), draws)


def _flat(inputs: Sequence[Mapping[str, Any]], blocks: Sequence[RowBlock]) -> dict[str, Tensor]:
    """What the model is called with: [1, N], every job's positions as in its own call."""
    ids = torch.cat([call["input_ids"].reshape(-1) for call in inputs])
    positions = [
        call["position_ids"].reshape(-1)
        if "position_ids" in call
        else torch.arange(block.shape[1], device=ids.device).repeat(block.shape[0])
        for call, block in zip(inputs, blocks, strict=True)
    ]
    return {
        "input_ids": ids.unsqueeze(0),
        "position_ids": torch.cat(positions).unsqueeze(0),
        # Without a mask transformers would look for packed rows in the positions.
        "attention_mask": torch.ones(1, ids.shape[0], dtype=torch.long, device=ids.device),
    }


def _targets(labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(target of every supervised position [S], where it is predicted: its place in the job's flattened rows [S])."""
    target_BT = labels_BT[:, 1:]
    rows, columns = (target_BT != IGNORED_LABEL).nonzero(as_tuple=True)
    return target_BT[rows, columns], rows * labels_BT.shape[1] + columns


def _where(targets: Sequence[tuple[Tensor, Tensor]], blocks: Sequence[RowBlock]) -> Tensor:
    """The places of all supervised positions in the flat row."""
    found, first = [], 0
    for (_, place_S), block in zip(targets, blocks, strict=True):
        found.append(place_S + first)
        first += block.num_tokens
    return torch.cat(found)
