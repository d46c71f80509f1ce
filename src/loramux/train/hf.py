"""For users of the stock Hugging Face trainers: an attached model needs nothing, this callback adds the routing.

    handle = loramux.attach(model, loramux.MixLoRAConfig(r=8))
    trainer = transformers.Trainer(
        model=model, args=args, train_dataset=rows, data_collator=collator, callbacks=[RouterCallback(handle)]
    )
    trainer.train()

The router's loss reaches the trainer through the model's outputs by itself. Prompt routers take the tokens before the
first label as the prompt; pass `prompt_mask` in the batch, with `remove_unused_columns=False`, to say it otherwise.

Methods that act between steps (BeamLoRA, ALoRA, SMoRA's balance) need the callback: it drives their controllers.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loramux.train.control import Control, Samples, Schedule
from loramux.train.metrics import router_metrics

if TYPE_CHECKING:
    from loramux.api import Handle
    from loramux.core.controller import Edit


class RouterCallback(TrainerCallback):
    """Logs what the routers do, drives controllers, and saves the adapter to `OUTPUT_DIR/adapter` when training ends.

    With every log of the trainer come `router/ADAPTER/entropy` and, with `shares`, the share of every expert per layer:
    in `trainer.state.log_history`, in the logs handed to the callbacks after this one, and as TensorBoard files in
    `tensorboard` if that folder is given. `name` chooses one adapter; None is all of them. What controllers edited is
    in `edits`, by adapter. `seed` is their chance; `samples(num, generator)` gives collated examples to those that
    score ranks on data.

    The stock Trainer cannot read adapters back: `load_best_model_at_end` is refused, and `resume_from_checkpoint` is
    not covered. `loramux train` does both.
    """

    def __init__(
        self,
        handle: Handle,
        name: str | None = None,
        *,
        shares: bool = True,
        save: bool = True,
        tensorboard: str | os.PathLike[str] | None = None,
        seed: int = 0,
        samples: Samples | None = None,
    ):
        self.handle = handle
        self.name = name
        self.shares = shares
        self.save = save
        self.tensorboard = tensorboard
        self.seed = seed
        self.samples = samples
        self.edits: dict[str, list[Edit]] = {}
        self._controls: dict[str, Control] = {}
        self._writer: Any = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True is not possible here: the stock Trainer cannot read adapters back; set it "
                "to False, or use `loramux train`, which keeps the adapter of the best validation"
            )
        if self.tensorboard is not None and state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.tensorboard))
        per_epoch = _steps_per_epoch(args, state, train_dataloader)
        self._take_control(args, state, getattr(optimizer, "optimizer", optimizer), per_epoch)

    def _take_control(
        self, args: TrainingArguments, state: TrainerState, optimizer: Any, per_epoch: float
    ) -> None:
        names = [n for n in self._names() if self.handle.adapters[n].method.controller()]
        if names and state.global_step:
            raise ValueError(
                f"adapters {names} are edited between steps, and the stock Trainer keeps no state of that, so it "
                "cannot resume them; start anew, or use `loramux train`"
            )
        schedule = Schedule(state.max_steps, per_epoch, args.learning_rate)
        for name in names:
            self._controls[name] = Control(
                self.handle, self.handle.adapters[name], optimizer,
                self.handle.trainable_parameters(name), schedule,
                seed=self.seed, samples=self.samples,
            )  # fmt: skip
            self.edits[name] = self._controls[name].begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        for name, own in self._controls.items():
            self.edits[name] += own.after_step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        metrics = router_metrics(self.handle.routing(self.name), shares=self.shares)
        logs.update(metrics)
        if state.log_history:  # the trainer has copied its logs there already
            state.log_history[-1].update(metrics)
        if self._writer is not None:
            for key, value in metrics.items():
                self._writer.add_scalar(key, value, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self.save and args.output_dir and state.is_world_process_zero:
            for name in self._names():
                folder = Path(args.output_dir) / "adapter"
                self.handle.save(folder if len(self._names()) == 1 else folder / name, name=name)

    def _names(self) -> list[str]:
        return list(self.handle.adapters) if self.name is None else [self.name]


def _steps_per_epoch(args: TrainingArguments, state: TrainerState, dataloader: Any) -> float:
    """Optimizer steps per pass over the data; the trainer steps on an epoch's last, short accumulation too."""
    try:
        batches = len(dataloader)
    except (
        TypeError
    ):  # a stream, or none given: what the trainer planned, whose last epoch may be cut short
        return state.max_steps / max(state.num_train_epochs, 1)
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1)
