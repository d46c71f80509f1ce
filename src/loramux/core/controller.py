"""Controllers: what a method does between optimizer steps, beyond what gradients do.

Why an object of its own: methods that prune, copy or re-allocate ranks need to see the step number, the optimizer and
some examples, and what they keep (snapshots, ledgers, scores) must survive a killed run. A training loop calls
`before_training` once and `after_step` after every optimizer step, and writes `state()` and `tensors()` beside the
weights; a controller whose moments depend on nothing else resumes to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from loramux.core.adapter import Adapter
from loramux.core.edits import Editor

if TYPE_CHECKING:
    from loramux.core.attach import Attachment

Edit = dict[str, Any]  # plain JSON values: {"step": 40, "what": "prune", "site": path or "", ...}


@dataclass(frozen=True, eq=False)
class Moment:
    """What a controller sees between two steps.

    step             optimizer steps done so far; 0 in `before_training`
    steps_per_epoch  optimizer steps that see every training example once
    peak_lr          the learning rate at the top of the schedule
    parameters       name -> trained parameter, in declared order; follows the edits
    generator        a stream of random numbers of this controller's own; it is saved with the run
    edit             moves rank rows with everything that belongs to them
    samples          samples(num, generator) -> that many held-out examples as collated micro-batches (input_ids,
                     attention_mask, labels, ...), rows of `pad` length each; examples of the training set where there
                     is no validation set. None where the loop cannot give any (the stock trainers without an eval set)
    handle           runs the model: `handle.model(**batch)` with `handle.use(adapter.name)`, `handle.masking(...)`
    """

    step: int
    num_steps: int
    steps_per_epoch: float
    peak_lr: float
    adapter: Adapter
    handle: Attachment
    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, nn.Parameter]
    generator: torch.Generator
    edit: Editor
    samples: Callable[[int, torch.Generator], list[dict[str, Tensor]]] | None


class Controller:
    """One adapter's controller. What the methods return is added to the run's edits, in order.

    Both hooks run in training mode without any guard: use `torch.no_grad()`, put back the mode you change. Draw
    from `moment.generator` only; torch's global generators are put back afterwards, so drawing from them changes
    nothing that is trained.

    needs_loop: whether the method misses something in a training loop that does not call the hooks.
    """

    needs_loop: ClassVar[bool] = True

    def before_training(self, moment: Moment) -> Sequence[Edit]:
        """Once, before the first step of a run (not again when it is resumed)."""
        return ()

    def after_step(self, moment: Moment) -> Sequence[Edit]:
        """After every optimizer step that was taken, before a validation that is due."""
        return ()

    def state(self) -> dict[str, Any]:
        """What to keep besides tensors, as plain JSON values."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors to keep, by names of the controller's own."""
        return {}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` and `tensors` gave; the adapter's rows have their saved shapes by then."""
