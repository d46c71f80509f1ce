"""For users of the stock Hugging Face trainers: an attached model needs nothing, this callback adds the routing.

    handle = loramux.attach(model, loramux.MixLoRAConfig(r=8))
    trainer = transformers.Trainer(
        model=model, args=args, train_dataset=rows, data_collator=collator, callbacks=[RouterCallback(handle)]
    )
    trainer.train()

The router's loss reaches the trainer through the model's outputs by itself. Prompt routers take the tokens before the
first label as the prompt; pass `prompt_mask` in the batch, with `remove_unused_columns=False`, to say it otherwise.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loramux.train.metrics import router_metrics

if TYPE_CHECKING:
    from loramux.api import Handle


class RouterCallback(TrainerCallback):
    """Logs what the routers do, and saves the adapter to `OUTPUT_DIR/adapter` when training ends.

    With every log of the trainer come `router/ADAPTER/entropy` and, with `shares`, the share of every expert per layer:
    in `trainer.state.log_history`, in the logs handed to the callbacks after this one, and as TensorBoard files in
    `tensorboard` if that folder is given. `name` chooses one adapter; None is all of them.

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
    ):
        self.handle = handle
        self.name = name
        self.shares = shares
        self.save = save
        self.tensorboard = tensorboard
        self._writer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True is not possible here: the stock Trainer cannot read adapters back; set it "
                "to False, or use `loramux train`, which keeps the adapter of the best validation"
            )
        if self.tensorboard is not None and state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.tensorboard))

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
