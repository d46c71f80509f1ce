"""Drives an adapter's controller: builds its moments, keeps what it did, saves and restores it with the run.

Why between loop and controller: our trainer and the callback for the stock Hugging Face trainers call the same two
methods, and a job whose method has no controller calls them for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loramux.core.controller import Edit, Moment
from loramux.core.edits import Editor, ranks_of
from loramux.train.rng import current_states, running_with

if TYPE_CHECKING:
    from loramux.api import Handle
    from loramux.core.adapter import Adapter

Samples = Callable[[int, torch.Generator], list[dict[str, Tensor]]]
GENERATOR = "generator"
OWN_STREAM = (
    0x5EED  # keeps a controller's numbers apart from those that a seed gives the job itself
)


@dataclass(frozen=True)
class Schedule:
    """What a controller may know of the loop it runs in; fields as in `Moment`."""

    num_steps: int
    steps_per_epoch: float
    peak_lr: float


class Control:
    """One adapter's controller in one run; does nothing where the method has none."""

    def __init__(
        self,
        handle: Handle,
        adapter: Adapter,
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, nn.Parameter],
        schedule: Schedule,
        *,
        seed: int = 0,
        samples: Samples | None = None,
    ):
        self.handle = handle
        self.adapter = adapter
        self.controller = adapter.method.controller()
        adapter.is_controlled = True
        self.parameters = parameters
        self.schedule = schedule
        self.samples = samples
        self.generator = torch.Generator().manual_seed(seed ^ OWN_STREAM)
        self.edit = Editor(adapter, optimizer, parameters, self.generator)
        self.has_begun = False
        self.best_ranks: Mapping[str, Sequence[int]] | None = None

    def begin(self) -> list[Edit]:
        """What the controller does before the first step of the run; nothing when asked again."""
        if self.controller is None or self.has_begun:
            return []
        self.has_begun = True
        with self._unnoticed():
            return list(self.controller.before_training(self._moment(0)))

    def after_step(self, step: int) -> list[Edit]:
        """What it does after `step` optimizer steps were taken."""
        if self.controller is None:
            return []
        with self._unnoticed():
            return list(self.controller.after_step(self._moment(step)))

    def _moment(self, step: int) -> Moment:
        return Moment(
            step=step,
            num_steps=self.schedule.num_steps,
            steps_per_epoch=self.schedule.steps_per_epoch,
            peak_lr=self.schedule.peak_lr,
            adapter=self.adapter,
            handle=self.handle,
            optimizer=self.edit.optimizer,
            parameters=self.parameters,
            generator=self.generator,
            edit=self.edit,
            samples=self.samples,
        )

    @contextmanager
    def _unnoticed(self) -> Iterator[None]:
        """What is called or drawn inside changes neither the step's routing nor the training's random numbers."""
        dispatch, model = self.handle.dispatch, self.handle.model
        last, mode = dispatch.last, model.training
        device = dispatch.weight.device
        try:
            with running_with(current_states(device), device):
                yield
        finally:
            dispatch.last = last
            if model.training != mode:
                model.train(mode)

    # --- What is written down -----------------------------------------------------------------------

    def keep_ranks_as_best(self) -> None:
        """The weights of now were the best so far: note their shapes."""
        if self.controller is not None:
            self.best_ranks = ranks_of(self.adapter)

    def best_ranks_if_others(self) -> dict[str, int]:
        """Linear -> rank of the best weights so far; {} where the ranks are the same now."""
        best = self.best_ranks or {}
        now = ranks_of(self.adapter)
        if all(list(ranks) == list(now[path]) for path, ranks in best.items()):
            return {}
        return {path: sum(ranks) for path, ranks in best.items()}

    def resize_to_best(self) -> None:
        if self.best_ranks is not None:
            self.edit.resize(self.best_ranks)

    def state(self) -> dict[str, Any]:
        """Plain JSON values; {} where there is no controller."""
        if self.controller is None:
            return {}
        return {
            "has_begun": self.has_begun,
            "ranks": ranks_of(self.adapter),
            "best_ranks": self.best_ranks,
            "controller": self.controller.state(),
        }

    def tensors(self) -> dict[str, Tensor]:
        if self.controller is None:
            return {}
        own = {f"own.{name}": tensor for name, tensor in self.controller.tensors().items()}
        return {GENERATOR: self.generator.get_state(), **own}

    def resize(self, state: Mapping[str, Any]) -> None:
        """Give all rows the shapes they had when `state` was written."""
        if state:
            self.edit.resize(state["ranks"])

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if self.controller is None or not state:
            return
        self.has_begun = bool(state["has_begun"])
        self.best_ranks = state["best_ranks"]
        self.generator.set_state(tensors[GENERATOR])
        own = {k.removeprefix("own."): t for k, t in tensors.items() if k.startswith("own.")}
        self.controller.restore(state["controller"], own)
