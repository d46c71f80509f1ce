"""Ablation scores of the ranks or modules of an adapter, with prefix reuse and gates that have a batch dimension.

For a unit u (one rank row, or all rows of a linear) and S = minus the mean cross-entropy of the supervised tokens:

    IS(u) = S(M) - S(M\\u) + S(M_u)

M\\u is the adapted model without u, M_u the bare base with u alone (ALoRA, arXiv 2403.16187, Eq. 6). A unit of layer l
cannot change the layers below it: `M\\u` goes on from the hidden states of the adapted model, `M_u` from those of the
base, both recorded once per batch. Each row of a batch carries its own rank mask, so several units run in one forward.

Some models hand on more than hidden states from layer to layer (shared keys and values, several residual streams), so
the reuse is tried once against a whole run; where it fails, every unit takes whole runs.

The model itself runs, unmodified: layers below l return what was recorded. Nothing is trained or drawn: parameters,
gradients, generators and the modes of all modules are left as they were.

Letters: B rows of the batch, T tokens, D width, G units in one forward, R rank rows of a site, S supervised tokens,
U units.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loramux.core.adapter import Adapter
from loramux.core.attach import Attachment
from loramux.core.modes import evaluating
from loramux.core.supervised import token_losses

log = logging.getLogger(__name__)
TOKENS_PER_FORWARD = 8192
SAME = 1e-4  # relative; a run that goes on from recorded states against a whole one
SAME_HALF = 2e-2  # the same, for a base in half precision
Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Unit:
    """What is switched on and off together: some rank rows of one linear."""

    path: str
    rows: tuple[int, ...]


def rank_units(adapter: Adapter) -> list[Unit]:
    """Every rank row of every linear."""
    return [
        Unit(path, (row,))
        for path, rows in adapter.rows.items()
        for row in range(rows.spans.num_rows)
    ]


def module_units(adapter: Adapter) -> list[Unit]:
    """Every linear as a whole."""
    return [
        Unit(path, tuple(range(rows.spans.num_rows)))
        for path, rows in adapter.rows.items()
        if rows.spans.num_rows
    ]


@dataclass(frozen=True, eq=False)
class Scores:
    """S of the adapted model, of the bare base, and of both ablations of every unit, float64.

    num_tokens: supervised tokens behind the means. layer_runs: decoder layers that were run, one batch of rows through
    one layer counting once; naive_layer_runs: how many the plain double loop takes.
    """

    units: tuple[Unit, ...]
    full: float
    base: float
    without: Tensor
    alone: Tensor
    num_tokens: int
    layer_runs: int = 0
    naive_layer_runs: int = 0

    @property
    def weight(self) -> int:
        """What this batch counts for in a mean over several."""
        return self.num_tokens

    @property
    def removal(self) -> Tensor:
        """S(M) - S(M\\u): what the model loses with the unit."""
        return self.full - self.without

    @property
    def importance(self) -> Tensor:
        """IS [U]."""
        return self.removal + self.alone

    @classmethod
    def mean(cls, parts: Sequence[Scores]) -> Scores:
        """Scores over several batches as one, weighted by their tokens."""
        total = sum(part.num_tokens for part in parts)
        share = [part.num_tokens / total for part in parts]

        def mixed(name: str) -> Any:
            return sum(w * getattr(part, name) for w, part in zip(share, parts, strict=True))

        return cls(
            units=parts[0].units,
            full=mixed("full"),
            base=mixed("base"),
            without=mixed("without"),
            alone=mixed("alone"),
            num_tokens=total,
            layer_runs=sum(part.layer_runs for part in parts),
            naive_layer_runs=sum(part.naive_layer_runs for part in parts),
        )


def ablation_scores(
    handle: Attachment,
    batch: Mapping[str, Tensor],
    units: Sequence[Unit],
    name: str | None = None,
    *,
    tokens_per_forward: int = TOKENS_PER_FORWARD,
    reuse: bool | None = None,
) -> Scores:
    """Exact scores of `units` of one adapter on one batch.

    `batch` is what `data.collate` makes without packing: input_ids, attention_mask and labels. A unit whose B is zero
    changes nothing and is not run: its score is S(base), exactly. A base in half precision rounds away what a single
    rank does; score in fp32 where single ranks matter. reuse: whether layers below a unit are skipped, as
    `can_reuse_prefix` says; None asks it for this batch.
    """
    adapter = handle._named(name)
    check_scorable(adapter)
    with evaluating(handle.model), torch.no_grad():
        return _Ablation(handle, adapter, batch, tokens_per_forward, reuse).scores(tuple(units))


def can_reuse_prefix(
    handle: Attachment, batch: Mapping[str, Tensor], name: str | None = None
) -> bool:
    """Whether runs of this model may go on from recorded hidden states: tried on one batch against a whole run."""
    adapter = handle._named(name)
    check_scorable(adapter)
    with evaluating(handle.model), torch.no_grad():
        return _Ablation(handle, adapter, batch, TOKENS_PER_FORWARD, None).try_reuse()


def check_scorable(adapter: Adapter) -> None:
    """Refuse what single ranks cannot be switched in, or what looks at layers that are not run again."""
    if adapter.routers:
        raise ValueError(
            f"{adapter.name!r} has routers ({adapter.method.title}); ablation scores are for adapters without"
        )
    if any(rows.magnitude is not None for rows in adapter.rows.values()):
        raise ValueError(
            f"{adapter.name!r} is DoRA, whose ranks do not act one by one; score a LoRA"
        )


def inputs_of(
    batch: Mapping[str, Tensor], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """(arguments of the model call, labels) on the model's device."""
    if "segment_ids" in batch:
        raise ValueError("scores need one example per row; collate the batch without packing")
    call = {key: batch[key].to(device) for key in ("input_ids", "attention_mask") if key in batch}
    return call, batch["labels"].to(device)


class _Ablation:
    """One batch, and the two recorded runs that every unit goes on from."""

    def __init__(
        self,
        handle: Attachment,
        adapter: Adapter,
        batch: Mapping[str, Tensor],
        budget: int,
        reuse: bool | None,
    ):
        self.handle = handle
        self.model = handle.model
        self.adapter = adapter
        self.call, self.labels = inputs_of(batch, handle.dispatch.weight.device)
        self.num_rows, width = self.call["input_ids"].shape
        self.copies = max(1, budget // (self.num_rows * width))
        stack = next(iter(handle.sites.values())).layer_path.rpartition(".")[0]
        self.layers = list(self.model.get_submodule(stack).children())
        self.reuse = reuse
        self.layer_runs = 0
        self._skipped = 0  # layers that the current run does not compute
        self._is_tuple = False  # what a layer of this model returns

    def scores(self, units: tuple[Unit, ...]) -> Scores:
        last = self.handle.dispatch.last
        try:
            with self._recording() as above_full:
                full = self._run(self.adapter.name, 1)
            with self._recording() as above_base:
                base = self._run(None, 1)
            if self.reuse is None and self._by_layer(units):
                self.reuse = self._reuses(above_full, full)
            without = full.repeat(len(units))
            alone = base.repeat(len(units))
            for layer, found in self._by_layer(units).items():
                for start in range(0, len(found), self.copies):
                    some = found[start : start + self.copies]
                    chosen = [units[i] for i in some]
                    without[some] = self._ablated(chosen, layer, above_full, keep=False)
                    alone[some] = self._ablated(chosen, layer, above_base, keep=True)
        finally:
            self.handle.dispatch.last = last
        return Scores(
            units, float(full), float(base), without, alone, self._num_tokens(),
            layer_runs=self.layer_runs, naive_layer_runs=(1 + 2 * len(units)) * len(self.layers),
        )  # fmt: skip

    def try_reuse(self) -> bool:
        last = self.handle.dispatch.last
        try:
            with self._recording() as above:
                full = self._run(self.adapter.name, 1)
            return self._reuses(above, full)
        finally:
            self.handle.dispatch.last = last

    def _reuses(self, prefix: Sequence[Tensor], full: Tensor) -> bool:
        """Whether runs from the second and from the last layer on give the S of the whole run."""
        copies = min(2, self.copies)
        near = SAME_HALF if prefix[0].dtype.itemsize < 4 else SAME
        try:
            for layer in {1, len(self.layers) - 1} - {0, len(self.layers)}:
                with self._skipping(layer, prefix, copies):
                    again = self._run(self.adapter.name, copies)
                if not torch.allclose(again, full.expand_as(again), rtol=near, atol=0):
                    why = f"from layer {layer} on S is {float(again[0]):.4g}, in whole {float(full):.4g}"
                    break
            else:
                return True
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            why = repr(error)
        log.warning(
            "%s cannot go on from recorded hidden states (%s): scores take whole runs, which are exact too but slower",
            type(self.model).__name__, why,
        )  # fmt: skip
        return False

    def _by_layer(self, units: Sequence[Unit]) -> dict[int, list[int]]:
        """Layer -> numbers of its units that change something at all."""
        found: dict[int, list[int]] = {}
        for number, unit in enumerate(units):
            if bool(self.adapter.rows[unit.path].b[list(unit.rows)].any()):
                found.setdefault(self.adapter.sites[unit.path].layer, []).append(number)
        return dict(sorted(found.items()))

    def _ablated(
        self, units: Sequence[Unit], layer: int, prefix: Sequence[Tensor], keep: bool
    ) -> Tensor:
        """S [G] with only (`keep`) or without each unit, from its layer on."""
        masks = self._masks(units, layer, keep)
        with (
            self.handle.masking(masks, self.adapter.name),
            self._skipping(layer, prefix, len(units)),
        ):
            return self._run(self.adapter.name, len(units))

    def _masks(self, units: Sequence[Unit], layer: int, keep: bool) -> Masks:
        """Rank masks [G * B, R]: of the units' layer and, where units act alone, of all others that run."""
        device = self.labels.device
        masks: Masks = {}
        for path, rows in self.adapter.rows.items():
            place = self.adapter.sites[path].layer
            is_skipped = place < layer and self.reuse
            if is_skipped or (place != layer and not keep) or not rows.spans.num_rows:
                continue
            mask_GR = torch.full((len(units), rows.spans.num_rows), float(not keep), device=device)
            for g, unit in enumerate(units):
                if unit.path == path:
                    mask_GR[g, list(unit.rows)] = float(keep)
            masks[path] = mask_GR.repeat_interleave(self.num_rows, dim=0)
        return masks

    def _run(self, name: str | None, copies: int) -> Tensor:
        """S [G] of `copies` copies of the batch under the masks that hold now."""
        call = {key: value.repeat(copies, 1) for key, value in self.call.items()}
        self.layer_runs += copies * (len(self.layers) - self._skipped)
        with self.handle.batch([name] * (copies * self.num_rows)):
            loss_S = token_losses(self.model, call, self.labels.repeat(copies, 1))
        return -loss_S.double().view(copies, -1).mean(1)

    def _num_tokens(self) -> int:
        return int((self.labels[:, 1:] != -100).sum())

    # --- Hidden states below a layer --------------------------------------------------------------

    @contextmanager
    def _recording(self) -> Iterator[list[Tensor]]:
        """The list that is yielded holds the input of every layer after the run inside."""
        inputs: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(args[0] if args else kwargs["hidden_states"])

        with ExitStack() as stack:
            for layer in self.layers:
                hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
                stack.callback(hook.remove)
            stack.callback(self.layers[0].register_forward_hook(self._note_form).remove)
            yield inputs

    def _note_form(self, _: nn.Module, args: Any, output: Any) -> None:
        self._is_tuple = isinstance(output, tuple)

    @contextmanager
    def _skipping(self, layer: int, prefix: Sequence[Tensor], copies: int) -> Iterator[None]:
        """Layers below `layer` return what enters it, that many copies of it."""
        if layer == 0 or self.reuse is False:
            yield
            return
        hidden = prefix[layer].repeat(copies, 1, 1)
        output = (hidden,) if self._is_tuple else hidden
        own = [vars(module).get("forward") for module in self.layers[:layer]]
        self._skipped = layer
        try:
            for module in self.layers[:layer]:
                module.forward = lambda *_, **__: output  # type: ignore[method-assign]
            yield
        finally:
            self._skipped = 0
            for module, forward in zip(self.layers, own, strict=False):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward  # type: ignore[method-assign]
