"""Finds the linears of a transformers model that can hold experts, and what each is for.

Nothing here knows a model family by name: a site is a linear inside a decoder layer (an entry of a module list), its
block is the module that holds it, and the last linear of an FFN is known by the names the field uses.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from loramux.core.method import MethodConfig
from loramux.core.types import Role, Site

FFN_EXITS = ("down_proj", "fc2", "c_proj", "w2", "dense_4h_to_h", "fc_out", "wo", "linear2")
ATTENTION_EXITS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj")
FFN_BLOCKS = re.compile(r"(^|[._])(mlp|ffn|ff|feed_forward|feedforward)", re.IGNORECASE)
ATTENTION_BLOCKS = re.compile(r"attn|attention", re.IGNORECASE)


def find_sites(model: nn.Module) -> list[Site]:
    """Every linear of every decoder layer, in the order in which they run: a block's last linear comes last.

    Module order alone is not that: Phi-3 registers o_proj before qkv_proj.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            "encoder-decoder models are not supported: loramux attaches to decoder-only models"
        )
    sites: list[Site] = []
    prefix = _layer_list(model)
    widths: dict[str, int] = {}
    for path, module in _running_order(model):
        if not path.startswith(prefix):
            continue
        index, _, name = path[len(prefix) :].partition(".")
        layer_path = prefix + index
        block, _, last = path.rpartition(".")
        kind = _kind(block.rpartition(".")[2] if "." in name else last)
        d_in, d_out, transposed = _shape(module)
        # The first linear of a layer reads the (normed) residual stream.
        d_model = widths.setdefault(layer_path, d_in)
        sites.append(
            Site(
                path, name, int(index), layer_path, block, kind,
                _role(kind, name), d_in, d_out, d_model, transposed,
            )
        )  # fmt: skip
    return sites


def _running_order(model: nn.Module) -> list[tuple[str, nn.Module]]:
    linears = [(path, module) for path, module in model.named_modules() if _is_linear(module)]
    blocks: dict[str, int] = {}
    for path, _ in linears:
        blocks.setdefault(path.rpartition(".")[0], len(blocks))

    def order(entry: tuple[str, nn.Module]) -> tuple[int, bool]:
        block, _, name = entry[0].rpartition(".")
        last = FFN_EXITS if FFN_BLOCKS.search(block.rpartition(".")[2]) else ATTENTION_EXITS
        return blocks[block], name in last

    return sorted(linears, key=order)


def select_sites(sites: Sequence[Site], config: MethodConfig) -> list[Site]:
    """The sites a config targets. Raises ValueError when a name matches nothing."""
    chosen = list(sites)
    if config.target_modules is not None and config.target_modules != "all-linear":
        chosen = _matching(chosen, config.target_modules, "target_modules")
    if config.exclude_modules is not None:
        out = {s.path for s in _matching(chosen, config.exclude_modules, "exclude_modules")}
        chosen = [s for s in chosen if s.path not in out]
    if config.layers_to_transform is not None:
        wanted = set(config.layers_to_transform)
        missing = wanted - {s.layer for s in sites}
        if missing:
            raise ValueError(f"layers_to_transform names layers the model lacks: {sorted(missing)}")
        chosen = [s for s in chosen if s.layer in wanted]
    if not chosen:
        raise ValueError(
            "no linear of the model is targeted; loosen target_modules or exclude_modules"
        )
    return chosen


def _matching(sites: list[Site], names: Sequence[str] | str, field: str) -> list[Site]:
    tests: list[tuple[str, Callable[[str], bool]]]
    if isinstance(names, str):
        pattern = re.compile(names)
        tests = [(names, lambda path: pattern.fullmatch(path) is not None)]
    else:
        tests = [(n, lambda path, n=n: path == n or path.endswith("." + n)) for n in names]  # type: ignore[misc]
    for name, test in tests:
        if not any(test(site.path) for site in sites):
            raise ValueError(
                f"{field} names {name!r}, which no linear of the model matches; it has "
                f"{sorted({s.name for s in sites})}"
            )
    return [site for site in sites if any(test(site.path) for _, test in tests)]


def _layer_list(model: nn.Module) -> str:
    """Path prefix of the decoder layers: the module list, with linears in it, that is as long as the config says.

    Lists inside another list (a layer's own experts) never count; of several, those of the text decoder do.
    """
    lists = {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(_is_linear(m) for m in module.modules())
    }
    outer = {p: n for p, n in lists.items() if not any(p.startswith(q + ".") for q in lists)}
    decoder = _decoder_path(model)
    inside = {p: n for p, n in outer.items() if p.startswith(decoder)} or outer
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    wanted = getattr(text, "num_hidden_layers", None)
    fitting = {p: n for p, n in inside.items() if n == wanted} or inside
    if not fitting:
        raise ValueError(
            "the model has no list of decoder layers with linears in it; loramux attaches to transformers decoders"
        )
    path = max(fitting, key=lambda p: fitting[p])
    return f"{path}." if path else ""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, first to last."""
    return list(model.get_submodule(_layer_list(model).removesuffix(".")).children())


def _decoder_path(model: nn.Module) -> str:
    """Path prefix of the text decoder, where the model says which part it is; else nothing."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if find is not None else None
    for path, module in model.named_modules():
        if module is decoder and path:
            return f"{path}."
    return ""


def refuse_fused_experts(model: nn.Module, sites: Sequence[Site]) -> None:
    """The base's own experts kept as one 3-D tensor are no linears: leave them out only when asked to."""
    layers = {site.layer_path for site in sites}
    fused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3
        and "expert" in name
        and any(name.startswith(layer + ".") for layer in layers)
    ]
    if fused:
        raise ValueError(
            f"this base keeps its own experts in fused tensors ({fused[0]} and {len(fused) - 1} more), which cannot "
            "hold LoRA here; name the linears you want in target_modules"
        )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _shape(module: nn.Module) -> tuple[int, int, bool]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, False
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return int(weight.shape[0]), int(weight.shape[1]), True


@functools.cache
def _kind(block: str) -> Literal["attention", "ffn", "other"]:
    if ATTENTION_BLOCKS.search(block):
        return "attention"
    return "ffn" if FFN_BLOCKS.search(block) else "other"


def _role(kind: str, name: str) -> Role:
    if kind != "ffn":
        return "plain"
    return "exit" if name.rpartition(".")[2] in FFN_EXITS else "enter"
