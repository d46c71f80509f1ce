"""A small base and plain adapters for it as bytes, made without torch: what checks them can be measured alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from loramux.registry.checks import BaseShape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
WIDTHS = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 16),
    "mlp.up_proj": (32, 48),
    "mlp.down_proj": (48, 32),
}
LINEARS = {f"model.layers.{i}.{name}": widths for i in (0, 1) for name, widths in WIDTHS.items()}
BASE = BaseShape("b" * 64, "tiny", LINEARS, dict.fromkeys(LINEARS, 10.0))
SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I8": 1, "F8_E4M3": 1}

Entry = tuple[str, tuple[int, ...], bytes]  # dtype, shape, bytes


def number(values: np.ndarray[Any, Any], dtype: str = "F32") -> Entry:
    """An array as an entry of a safetensors file."""
    if dtype == "BF16":
        bits = values.astype("<f4").view("<u4") >> 16
        return dtype, values.shape, bits.astype("<u2").tobytes()
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "<i1", "F8_E4M3": "<u1"}
    return dtype, values.shape, values.astype(kinds[dtype]).tobytes()


def pack(tensors: Mapping[str, Entry], metadata: Any = None) -> bytes:
    """A safetensors file; nothing is checked, so that it can be a broken one."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    return with_header(header, b"".join(data for _, _, data in tensors.values()))


def with_header(header: Any, body: bytes) -> bytes:
    text = json.dumps(header, ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, tensor bytes) of an intact file."""
    length = struct.unpack("<Q", file[:8])[0]
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def tensors(
    seed: int = 0,
    rank: int = 4,
    dtype: str = "F32",
    paths: tuple[str, ...] = tuple(LINEARS),
    dora: bool = False,
    ranks: Mapping[str, int] | None = None,
) -> dict[str, Entry]:
    """A trained-looking adapter, under PEFT's names."""
    rng = np.random.default_rng(seed)
    made: dict[str, Entry] = {}
    for path in paths:
        d_in, d_out = LINEARS[path]
        r = (ranks or {}).get(path, rank)
        made[f"{PREFIX}{path}.lora_A.weight"] = number(rng.normal(0, 0.2, (r, d_in)), dtype)
        made[f"{PREFIX}{path}.lora_B.weight"] = number(rng.normal(0, 0.1, (d_out, r)), dtype)
        if dora:
            magnitude = rng.uniform(0.5, 1.5, d_out)
            made[f"{PREFIX}{path}.lora_magnitude_vector"] = number(magnitude, dtype)
    return made


def config(rank: int = 4, **changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        **changes,
    }


def parcel(
    made: Mapping[str, Entry] | None = None, settings: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """The two files of an adapter."""
    settings = config() if settings is None else settings
    return {
        CONFIG: json.dumps(settings).encode(),
        WEIGHTS: pack(tensors() if made is None else made, {"format": "pt"}),
    }
