"""Unlike jobs over one tiny base: other methods, ranks, rates, batches and lengths."""

from functools import cache
from typing import Any

import torch
from torch import nn

import loramux
from loramux.core.method import MethodConfig
from loramux.train import Job, Listener, StepEvent, Trainer, TrainingConfig
from pico import PAD, build_pico
from train.toys import examples

METHODS: dict[str, MethodConfig] = {
    "lora": loramux.LoraConfig(r=4, lora_dropout=0.1),
    "dora": loramux.LoraConfig(r=3, use_dora=True, lora_dropout=0.05),
    "milora": loramux.MiLoRAConfig(r=4, lora_alpha=16),
    "mixlora": loramux.MixLoRAConfig(r=2, num_experts=4, jitter_noise=0.1, lora_dropout=0.1),
    "smora": loramux.SMoRAConfig(r=8, activate_r=2, bias_step=1e-3),
}
# Batch, accumulation, rate and packing of each.
TRAININGS: dict[str, dict[str, Any]] = {
    "lora": {"micro_batch_size": 2},
    "dora": {"micro_batch_size": 4, "learning_rate": 3e-3},
    "milora": {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "scheduler": "cosine"},
    "mixlora": {"micro_batch_size": 2, "max_grad_norm": 0.3},
    "smora": {"micro_batch_size": 3, "weight_decay": 0.01},
}


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A base; a Llama of one layer is all that most claims need."""
    layers = {"num_hidden_layers": 1} if family == "llama" else {}
    return build_pico(family, dtype=dtype, **layers)


def job(name: str, method: str = "", *, steps: int = 8, **changes: Any) -> Job:
    """A job of this method (its name says which, without one); its seed and data differ from the others'."""
    method = method or name
    seed = list(METHODS).index(method)
    training = {"learning_rate": 1e-2, "warmup_ratio": 0.0, **TRAININGS[method], "steps": steps}
    options: dict[str, Any] = {"train": examples(24, seed=seed), "seed": seed}
    options |= {k: changes.pop(k) for k in list(changes) if k in Job.__dataclass_fields__}
    return Job(name, training=TrainingConfig(**training | changes), pad_token_id=PAD, **options)


def attached(
    base: nn.Module, names: list[str], dtype: torch.dtype = torch.float32
) -> loramux.Handle:
    """Adapters that already do something, each from its own seed."""
    handle: loramux.Handle | None = None
    for name in names:
        config = METHODS[name.split("-")[0]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(list(METHODS).index(name.split("-")[0]))
            if handle is None:
                handle = loramux.attach(base, config, name=name)
            else:
                handle.add(config, name=name)
            adapter = handle.adapters[name].to(dtype)
            with torch.no_grad():
                for parameter in adapter.trainable().values():
                    parameter.add_(0.05 * torch.randn(parameter.shape))
    assert handle is not None
    return handle


class Seen(Listener):
    """Losses and gradient norms of every step, by job."""

    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = {}
        self.norms: dict[str, list[float]] = {}

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        self.losses.setdefault(event.job, []).append(event.loss)
        self.norms.setdefault(event.job, []).append(event.grad_norm)


def weights(handle: loramux.Handle, name: str) -> dict[str, torch.Tensor]:
    adapter = handle.adapters[name]
    return {
        key: value.detach().clone()
        for key, value in [*adapter.named_parameters(), *adapter.named_buffers()]
    }


@cache
def solo_of(
    name: str, steps: int, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, torch.Tensor], Seen]:
    """The solo run of `job(name, steps=steps)`; several tests compare with it."""
    return solo(job(name, steps=steps), dtype=dtype)


def solo(
    each: Job, family: str = "llama", dtype: torch.dtype = torch.float32
) -> tuple[dict[str, torch.Tensor], Seen]:
    """(weights, what was seen) of a job trained by the solo trainer on a base of its own."""
    base = tiny(family, dtype)
    handle = attached(base, [each.name], dtype)
    seen = Seen()
    Trainer(base, handle, [each], listeners=(seen,)).run()
    return weights(handle, each.name), seen
