"""Adapters that each make a small random base say one token of their own: an answer shows whose rows made it.

Why built and not trained: hundreds of contents in a second, the same on every machine. The base keeps its first
residual number constant. In its last layer an adapter's gate and up rows turn that constant on in one inner number,
the adapter's own, and its down rows turn that number into the output row of its token. Rows of three linears must come
from one content for the token to win. All other rows are random: what they add shows in the log-probabilities.

Letters: O output width, I input width, V vocabulary.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loramux.core.sites import find_sites
from loramux.core.types import Site
from loramux.formats.scaling import peft_config

WORDS = 64  # tokens that prompts are made of; markers follow
WIDTH, LAYERS, HEADS, KV_HEADS = 64, 2, 4, 2
CONSTANT = 4.0  # the first residual number
GATE = 3.5  # times the constant, about what an adapter adds to its gate and its up
LOUD = 0.8  # length of what its down rows then add to the residual
NOISE = 0.05  # spread of its other rows
FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Marked:
    """One content: version `version` of the adapter `name`, and the token it makes the base say."""

    name: str
    version: int
    marker: int
    folder: Path


def build_base(num_markers: int, seed: int = 0) -> Any:
    """A Llama with one inner number per marker, whose first residual number no layer changes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=WORDS + num_markers,
        hidden_size=WIDTH,
        intermediate_size=max(WIDTH, -(-num_markers // 32) * 32),
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
            embedding.weight.normal_()
            embedding.weight[:, 0] = CONSTANT
            head.weight.copy_(2 * nn.functional.normalize(head.weight, dim=1))
            for site in find_sites(model):
                if _writes_residual(site):
                    model.get_submodule(site.path).weight[0] = 0
    return model.eval()


def write_marked(
    model: nn.Module, root: Path, names: Sequence[str], versions: int, seed: int = 0
) -> list[Marked]:
    """PEFT folders of all versions of all names. Versions of a name differ in every row, not in rank or sites."""
    sites = find_sites(model)
    found = []
    for place, name in enumerate(names):
        for version in range(versions):
            number = place * versions + version
            draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
            marker = WORDS + number
            rank, alpha = (1, 2, 4, 8, 16)[place % 5], float(1 + place % 3)
            tensors = _rows(model, sites, marker, rank, alpha / rank, draw)
            folder = root / f"{name}-{version}"
            folder.mkdir(parents=True)
            save_file(tensors, folder / FILES[0], metadata={"format": "pt"})
            targets = sorted({site.path.rpartition(".")[2] for site in sites})
            config = peft_config(rank, alpha, target_modules=targets)
            (folder / FILES[1]).write_text(json.dumps(config), encoding="utf-8")
            found.append(Marked(name, version, marker, folder))
    return found


def overwrite(folder: Path, source: Path) -> None:
    """Put another content into a folder in place, file by file, as somebody who trains again would."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(source / name, folder / f".{name}")
        os.replace(folder / f".{name}", folder / name)


@torch.no_grad()
def merge(model: nn.Module, mix: Mapping[Path, float]) -> dict[str, Tensor]:
    """Add a mix of contents to the weights of a base; returns the weights it had, by module, to be put back."""
    kept: dict[str, Tensor] = {}
    for folder, weight in mix.items():
        config = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
        tensors = load_file(folder / FILES[0])
        for key, a_RI in tensors.items():
            if not key.endswith(".lora_A.weight"):
                continue
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            own = model.get_submodule(path).weight
            assert isinstance(own, Tensor)
            kept.setdefault(path, own.clone())
            b_OR = tensors[key.replace("lora_A", "lora_B")]
            scale = weight * config["lora_alpha"] / config["r"]
            own += scale * (b_OR @ a_RI)
    return kept


@torch.no_grad()
def restore(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Undo `merge`."""
    for path, weight in kept.items():
        own = model.get_submodule(path).weight
        assert isinstance(own, Tensor)
        own.copy_(weight)


def _rows(
    model: Any, sites: Sequence[Site], marker: int, rank: int, scale: float, draw: torch.Generator
) -> dict[str, Tensor]:
    last = f".{LAYERS - 1}.mlp."
    neuron = marker - WORDS
    say_O = nn.functional.normalize(model.get_output_embeddings().weight[marker].detach(), dim=0)
    tensors = {}
    for site in sites:
        a_RI = NOISE * torch.randn(rank, site.d_in, generator=draw)
        b_OR = NOISE * torch.randn(site.d_out, rank, generator=draw)
        if last in site.path:
            # The first rank row is the marker's alone, so that nothing random reaches its inner number.
            a_RI[0], b_OR[:, 0] = 0, 0
            if _writes_residual(site):
                a_RI[0, neuron] = 1
                b_OR[:, 0] = LOUD * say_O / scale
            else:
                a_RI[0, 0] = 1
                b_OR[neuron, 0] = GATE / scale
        if _writes_residual(site):
            b_OR[0] = 0
        prefix = f"base_model.model.{site.path}"
        tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = a_RI, b_OR
    return tensors


def _writes_residual(site: Site) -> bool:
    return site.path.rpartition(".")[2] in ("o_proj", "down_proj")
