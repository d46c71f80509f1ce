"""Training steps of every method that mixes experts, against PEFT's LoRA of equal active rank on the same linears.

Active rank: the rank of the change that one token gets at a linear, so what a plain LoRA would need to make such a
change. k for SMoRA, k r for top-k of experts of rank r, E r where all E experts are weighed, r where they share one A.
The mixtures still compute all their rows, and their gates read the input; the ratio is what that costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import loramux
from loramux.bench.progress import Begin
from loramux.bench.rounds import Measure, interleave
from loramux.bench.shape import Effort, build_base, twin_of
from loramux.bench.table import Compared, Measured, compare
from loramux.bench.train import Trainer, make_batch
from loramux.core.method import MethodConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANKS = (8, 16, 32)
COPY = "peft 8 copy"
TASK = "bench"


@dataclass(frozen=True)
class Mixture:
    """A method under the settings it is timed with, and the rank of the change that a token gets."""

    title: str
    active_rank: int
    config: Callable[[], MethodConfig]


def _shared(rank: int) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2.0 * rank, "lora_dropout": 0.0, "target_modules": TARGETS}


MIXTURES: Mapping[str, Mixture] = {
    "smora": Mixture(
        "SMoRA r=64, 8 active", 8, lambda: loramux.SMoRAConfig(**_shared(64), activate_r=8)
    ),
    "mola": Mixture(
        "MoLA r=8, 8 experts top-2",
        16,
        lambda: loramux.MoLAConfig(**_shared(8), experts_per_layer=(8,), top_k=2),
    ),
    "loramoe": Mixture(
        "LoRAMoE r=4, 8 experts", 32, lambda: loramux.LoRAMoEConfig(**_shared(4), num_experts=8)
    ),
    "molora": Mixture(
        "MoLoRA r=4, 8 experts", 32, lambda: loramux.MoLoRAConfig(**_shared(4), num_experts=8)
    ),
    "hydralora": Mixture(
        "HydraLoRA r=8, 4 heads", 8, lambda: loramux.HydraLoRAConfig(**_shared(8), num_experts=4)
    ),
    "moelora": Mixture(
        "MOELoRA r=16 in 8 experts",
        16,
        lambda: loramux.MOELoRAConfig(**_shared(16), num_experts=8, tasks=(TASK,)),
    ),
    "mixlora": Mixture(
        "MixLoRA r=8, 8 experts top-2",
        16,
        lambda: loramux.MixLoRAConfig(**_shared(8), num_experts=8, top_k=2),
    ),
}


def _title(key: str) -> str:
    if key in MIXTURES:
        return MIXTURES[key].title
    kind, rank, *copy = key.split()
    assert kind == "peft"
    return f"{'a second copy of ' if copy else ''}PEFT LoRA r={rank} on all seven linears"


def _attach(model: PreTrainedModel, key: str) -> Any:
    torch.manual_seed(0)
    if key in MIXTURES:
        loramux.attach(model, MIXTURES[key].config())
        return model
    from peft import LoraConfig, get_peft_model

    rank = int(key.split()[1])
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS))
    return get_peft_model(model, config)


class TaskTrainer(Trainer):
    """A step of a model whose gates want to know each request's task."""

    def step(self) -> None:
        handle = loramux.handle_of(self.model)
        named = (
            nullcontext()
            if handle is None
            else handle.batch(tasks=[TASK] * self.batch["input_ids"].shape[0])
        )
        with named:
            super().step()


def measure(effort: Effort, folder: str | None, begin: Begin) -> Measured:
    """Paired rounds of one training step each; the control is a second PEFT LoRA."""
    base = build_base(effort.shape, folder)
    batch = make_batch(effort, base.config.vocab_size)
    keys = [*(f"peft {rank}" for rank in RANKS), COPY, *MIXTURES]
    trainers = {key: TaskTrainer(_attach(twin_of(base), key), batch) for key in keys}
    measures: dict[str, Measure] = dict(trainers)
    advance = begin("training steps", (effort.train_rounds + 1) * len(keys))
    seconds = interleave(measures, effort.train_rounds, done=advance)
    wanted = [
        Compared("training step", key, f"peft {each.active_rank}", "method step/peft", COPY)
        for key, each in MIXTURES.items()
    ]
    wanted.append(Compared("control", COPY, "peft 8", None, COPY))
    titles = {key: _title(key) for key in keys}
    choices: dict[str, str] = {}
    for trainer in trainers.values():
        handle = loramux.handle_of(trainer.model)
        if handle is not None:
            choices.update(handle.dispatch.choices)
    rows = compare(seconds, titles, wanted, batch=effort.train_batch, per_call=1)
    return Measured(rows=rows, choices=choices)
