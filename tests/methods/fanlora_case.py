"""Probes with known rows, settings made of them, and placed adapters: what the tests of FanLoRA share."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import loramux
from conformance.cases import nudge
from loramux.core.placement import Module, Setting, make_setting
from loramux.data import collate
from loramux.methods.fanlora import FanLoRAConfig
from methods.alora_case import logits_of
from methods.bridge import adapter_of, copy_lora
from oracles.fanlora import Batch
from oracles.lora import LowRank
from oracles.random_params import lora_params
from pico import PAD, build_pico
from train.toys import examples

LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
RANK = 3


def batches_of(num: int, count: int = 1, seed: int = 2) -> list[dict[str, Tensor]]:
    rows = examples(num * count, seed=seed)
    return [collate(rows[i * num : (i + 1) * num], PAD) for i in range(count)]


def dense(batch: Mapping[str, Tensor]) -> Batch:
    return Batch(batch["input_ids"], batch["attention_mask"], batch["labels"])


def probe(
    family: str = "llama", strength: Mapping[str, float] | None = None, seed: int = 0
) -> tuple[nn.Module, loramux.Handle, dict[str, LowRank]]:
    """LoRA on all linears with random rows; `strength` stretches the update of linears by the end of their name."""
    model = build_pico(family)
    params = lora_params(model, RANK, seed)
    if strength is not None:
        params = {
            path: e._replace(B=e.B * strength.get(path.rpartition(".")[2], 0.0))
            for path, e in params.items()
        }
    handle = loramux.attach(model, FanLoRAConfig(r=RANK), backend="reference")
    copy_lora(handle, params)
    return model, handle, params


def planted(strength: Mapping[str, float]) -> tuple[loramux.Handle, list[dict[str, Tensor]]]:
    """Labels that these linears' updates make likely; the other updates are noise that does no good."""
    model, handle, _ = probe(strength=strength)
    batches = batches_of(12, 3, seed=6)
    for batch in batches:
        said = logits_of(model, batch).argmax(-1).roll(1, 1)
        batch["labels"] = torch.where(batch["labels"] == -100, -100, said)
    noise = {name.rpartition(".")[2]: 0.02 for name in LLAMA}
    _, _, params = probe(strength={**noise, **strength})
    copy_lora(handle, params)
    return handle, batches


def setting_file(
    path: Path, handle: loramux.Handle, batches: Sequence[Any], **options: Any
) -> Path:
    options = {"n_keep": 2, **options}
    path.write_text(json.dumps(make_setting(handle, batches, **options).to_json()))
    return path


def handmade(path: Path, layers: Sequence[Sequence[str]], n_keep: int = 2, **more: Any) -> Path:
    """A setting that keeps exactly these linears of each layer of the tiny Llama."""
    scored = tuple(
        {name: Module(1.0 - 0.1 * kept.index(name) if name in kept else -1.0) for name in LLAMA}
        for kept in layers
    )
    path.write_text(json.dumps(Setting(scored, n_keep, "ablation", **more).to_json()))
    return path


def placed(setting: Path, seed: int = 0, **options: Any) -> tuple[nn.Module, loramux.Handle]:
    """A trained-looking adapter at the linears that the setting keeps."""
    model = build_pico("llama")
    config = FanLoRAConfig(r=RANK, setting=str(setting), **options)
    handle = loramux.attach(model, config, backend="reference")
    nudge(adapter_of(handle), seed)
    return model, handle


def in_peft(handle: loramux.Handle, targets: Sequence[str], family: str = "llama") -> nn.Module:
    """PEFT's LoRA at these module paths, with the rows of the adapter."""
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(targets))
    model = peft.get_peft_model(build_pico(family), config).eval()
    theirs = dict(model.named_parameters())
    for path, rows in adapter_of(handle).rows.items():
        where = f"base_model.model.{path}."
        theirs[where + "lora_A.default.weight"].data = rows.a.detach().clone()
        theirs[where + "lora_B.default.weight"].data = rows.b.detach().T.clone()
    return model
