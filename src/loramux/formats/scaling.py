"""Rank and scale of every site, from a PEFT config: rank_pattern, alpha_pattern, rsLoRA."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from loramux.formats.errors import FormatError, listed
from loramux.formats.patterns import PatternTable

logger = logging.getLogger(__name__)

# PEFT's own, for configs that leave them out.
DEFAULT_RANK = 8
DEFAULT_ALPHA = 8


def site_scaling(
    config: Mapping[str, Any], ranks: Mapping[str, int], where: str = "adapter"
) -> dict[str, tuple[int, float, float]]:
    """(rank, alpha, scale) of each module path; refuses ranks that differ from what the config says."""
    rank_table = PatternTable[int](config.get("rank_pattern"), "rank_pattern")
    alpha_table = PatternTable[float](config.get("alpha_pattern"), "alpha_pattern")
    r = config.get("r") or DEFAULT_RANK
    alpha = config.get("lora_alpha") or DEFAULT_ALPHA
    expected = {path: rank_table.find(path, r) for path in ranks}
    wrong = [
        f"{path}: tensors {ranks[path]}, config {expected[path]}"
        for path in ranks
        if ranks[path] != expected[path]
    ]
    if wrong:
        raise FormatError(
            f"{where}: the ranks of the tensors are not those of r and rank_pattern in {listed(wrong)}; config and "
            "tensors belong to different adapters, or rank_pattern misses these modules",
            code="rank",
        )
    for table, field in ((rank_table, "rank_pattern"), (alpha_table, "alpha_pattern")):
        if unused := table.unused(ranks):
            keys = list(config[field])
            logger.warning(
                "%s: %s has no effect for %s", where, field, listed(keys[i] for i in unused)
            )
    rslora = bool(config.get("use_rslora"))
    result = {}
    for path, rank in ranks.items():
        value = alpha_table.find(path, alpha)
        result[path] = (rank, value, value / math.sqrt(rank) if rslora else value / rank)
    return result


def rank_and_scale(
    config: Mapping[str, Any], module_path: str, r_from_tensor: int
) -> tuple[int, float, float]:
    """(rank, alpha, scale) of one module; use `site_scaling` for all of an adapter at once."""
    rank_table = PatternTable[int](config.get("rank_pattern"), "rank_pattern")
    alpha_table = PatternTable[float](config.get("alpha_pattern"), "alpha_pattern")
    rank = rank_table.find(module_path, config.get("r") or DEFAULT_RANK)
    if rank != r_from_tensor:
        raise FormatError(
            f"{module_path} has rank {r_from_tensor}, but r and rank_pattern say {rank}",
            code="rank",
        )
    alpha = alpha_table.find(module_path, config.get("lora_alpha") or DEFAULT_ALPHA)
    return rank, alpha, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def peft_config(
    r: int,
    lora_alpha: float,
    *,
    target_modules: Collection[str] | str,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    fan_in_fan_out: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> dict[str, Any]:
    """The content of an adapter_config.json that every PEFT since rank_pattern loads."""
    names = target_modules if isinstance(target_modules, str) else sorted(target_modules)
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _plain(lora_alpha),
        "lora_dropout": lora_dropout,
        "target_modules": names,
        "bias": "none",
        "use_rslora": use_rslora,
        "use_dora": use_dora,
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": {key: _plain(value) for key, value in (alpha_pattern or {}).items()},
    }


def uneven(
    ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> tuple[int, float, dict[str, int], dict[str, float]]:
    """(r, lora_alpha, rank_pattern, alpha_pattern) that give each module path its own values."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return (
        r,
        alpha,
        {path: rank for path, rank in ranks.items() if rank != r},
        {path: value for path, value in alphas.items() if value != alpha},
    )


def target_names(sites: Collection[str], others: Collection[str] = ()) -> list[str]:
    """target_modules for these module paths: last names, or full paths where a name also means one of `others`."""
    taken = {path.rpartition(".")[2] for path in others}
    last = {path: path.rpartition(".")[2] for path in sites}
    return sorted({path if name in taken else name for path, name in last.items()})


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else value
