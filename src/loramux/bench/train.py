"""Training steps: forward, backward and an AdamW step, of fresh adapters over the same random batch.

The first half of every row is the prompt and is not supervised, as in instruction tuning; what decides the time is the
number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

import loramux
from loramux.bench.adapters import RANK, configs
from loramux.bench.progress import Begin
from loramux.bench.rounds import Measure, cpu_seconds, interleave
from loramux.bench.shape import Effort, build_base, copy_of
from loramux.bench.table import Compared, Row, compare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PEFT, PEFT_COPY, LORA, MILORA, MIXLORA = "peft", "peft copy", "lora", "milora", "mixlora"
CHECKPOINTED = " checkpointed"
TITLES = {
    PEFT: "PEFT LoRA r=8 on all seven linears",
    PEFT_COPY: "a second copy of PEFT LoRA r=8",
    LORA: "LoRA r=8 on all seven linears",
    MILORA: "MiLoRA r=8 top-3 of 7",
    MIXLORA: "MixLoRA r=8, 8 experts top-2",
}
ROWS = (
    Compared("training step", MIXLORA, PEFT, "mixlora step/peft", PEFT_COPY),
    Compared("training step", LORA, PEFT, None, PEFT_COPY),
    Compared("training step", MILORA, PEFT, None, PEFT_COPY),
    Compared("control", PEFT_COPY, PEFT, None, PEFT_COPY),
)


class Trainer:
    """One subject with its optimizer; a call gives the seconds of one step."""

    def __init__(self, model: Any, batch: dict[str, torch.Tensor]):
        self.model, self.batch = model.train(), batch
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def step(self) -> None:
        self.model(**self.batch, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self) -> float:
        return cpu_seconds(self.step)


def attach_for_training(model: PreTrainedModel, kind: str) -> Any:
    """`model` with a fresh adapter of this kind."""
    torch.manual_seed(0)
    kind, checkpointed = kind.removesuffix(CHECKPOINTED), kind.endswith(CHECKPOINTED)
    trained: Any = model
    if kind in (PEFT, PEFT_COPY):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        trained = get_peft_model(model, config)
    else:
        loramux.attach(model, configs()[kind])
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return trained


def make_batch(effort: Effort, vocab: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (effort.train_batch, effort.train_length)
    input_ids = torch.randint(vocab, shape, generator=generator)
    labels = input_ids.clone()
    labels[:, : effort.train_length // 2] = -100
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
    }


def train_rows(
    effort: Effort, folder: str | None, begin: Begin
) -> tuple[list[Row], dict[str, str]]:
    base = build_base(effort.shape, folder)
    batch = make_batch(effort, base.config.vocab_size)
    trainers: dict[str, Callable[[], float]] = {}
    choices: dict[str, str] = {}
    for kind in TITLES:
        model = attach_for_training(copy_of(base), kind)
        trainers[kind] = Trainer(model, batch)
    measures: dict[str, Measure] = dict(trainers)
    advance = begin("training steps", (effort.train_rounds + 1) * len(measures))
    seconds = interleave(measures, effort.train_rounds, done=advance)
    for trainer in trainers.values():
        handle = loramux.handle_of(trainer.model)  # type: ignore[attr-defined]
        if handle is not None:
            choices.update(handle.dispatch.choices)
    return compare(seconds, TITLES, ROWS, batch=effort.train_batch, per_call=1), choices
