"""Adapters that a lenient loader would take and that would then do less than they say, each with the code it gets.

Every kind is made in several forms (module, seed, dtype), as what hides a fault differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from fuzz.parcels import (
    CONFIG,
    LINEARS,
    PREFIX,
    WEIGHTS,
    Entry,
    config,
    number,
    pack,
    parcel,
    split,
    tensors,
    with_header,
)

PATHS = tuple(LINEARS)
FORMS = [
    (PATHS[at], seed, dtype)
    for seed, (at, dtype) in enumerate([(0, "F32"), (2, "BF16"), (5, "F16"), (7, "F32")])
]
Tensors = dict[str, Entry]


class Broken(NamedTuple):
    label: str
    code: str
    files: dict[str, bytes]


def a_of(path: str) -> str:
    return f"{PREFIX}{path}.lora_A.weight"


def b_of(path: str) -> str:
    return f"{PREFIX}{path}.lora_B.weight"


def renamed(made: Tensors, old: str, new: str) -> Tensors:
    return {new if name == old else name: entry for name, entry in made.items()}


def every(made: Tensors, change: Callable[[str], str]) -> Tensors:
    return {change(name): entry for name, entry in made.items()}


def without(made: Tensors, *names: str) -> Tensors:
    return {name: entry for name, entry in made.items() if name not in names}


def zeroed(made: Tensors, part: str) -> Tensors:
    return {
        n: (d, s, b"\0" * len(data)) if part in n else (d, s, data)
        for n, (d, s, data) in made.items()
    }


def filled(made: Tensors, part: str, value: float) -> Tensors:
    return {
        n: number(np.full(s, value), d) if part in n else (d, s, data)
        for n, (d, s, data) in made.items()
    }


def turned(made: Tensors, name: str) -> Tensors:
    dtype, shape, data = made[name]
    return made | {name: (dtype, shape[::-1], data)}


def poked(made: Tensors, name: str, value: float, dtype: str) -> Tensors:
    found = number(np.full((1,), value), dtype)[2]
    kind, shape, data = made[name]
    return made | {name: (kind, shape, data[: -len(found)] + found)}


def names_to_tensors(path: str, made: Tensors, dtype: str) -> Iterator[tuple[str, str, Tensors]]:
    """Faults of the weights file: (label, code, tensors)."""
    a, b = a_of(path), b_of(path)
    block = path.rpartition(".")[2]
    yield "a renamed A", "unexpected_tensor", renamed(made, a, a.replace("lora_A", "lora_a"))
    yield "a renamed B", "unexpected_tensor", renamed(made, b, b.replace(".weight", ".data"))
    yield (
        "an adapter's name in a key",
        "unexpected_tensor",
        renamed(made, a, a.replace("lora_A", "lora_A.default")),
    )
    yield "a stray tensor", "unexpected_tensor", made | {f"{PREFIX}scale": made[a]}
    yield "a missing A", "missing_tensor", without(made, a)
    yield "a missing B", "missing_tensor", without(made, b)
    yield "a missing module", "missing_module", without(made, a, b)
    yield (
        "a missing layer",
        "missing_module",
        {n: t for n, t in made.items() if ".layers.1." not in n},
    )
    yield "every B zero", "no_op", zeroed(made, "lora_B")
    yield "every A zero", "no_op", zeroed(made, "lora_A")
    yield "every B negative zero", "no_op", filled(made, "lora_B", -0.0)
    if dtype != "F16":
        yield "every B lost in rounding", "no_op", filled(made, "lora_B", 1e-20)
    other = path.replace("layers.0", "layers.9").replace("layers.1", "layers.9")
    yield (
        "a layer the base lacks",
        "unknown_module",
        made | {a_of(other): made[a], b_of(other): made[b]},
    )
    odd = path.replace(block, f"{block}.linear")
    yield (
        "a module inside a linear",
        "unknown_module",
        made | {a_of(odd): made[a], b_of(odd): made[b]},
    )
    yield (
        "another family's names",
        "unknown_module",
        every(made, lambda n: n.replace("layers", "h")),
    )
    yield (
        "the output head",
        "unknown_module",
        made | {a_of("lm_head"): made[a], b_of("lm_head"): made[b]},
    )
    yield "no prefix", "wrong_prefix", every(made, lambda n: n.removeprefix(PREFIX))
    yield "half a prefix", "unknown_module", every(made, lambda n: n.replace(PREFIX, "base_model."))
    yield (
        "diffusers' prefix",
        "wrong_prefix",
        every(made, lambda n: n.replace(PREFIX, "transformer.")),
    )
    yield "the prefix twice", "unknown_module", every(made, lambda n: PREFIX + n)
    yield "A transposed", "transposed", turned(made, a)
    yield "B transposed", "transposed", turned(made, b)
    if LINEARS[path][0] != LINEARS[path][1]:  # at a square linear nobody could tell
        yield "A and B exchanged", "shape", made | {a: turned(made, b)[b], b: turned(made, a)[a]}
    rank = made[a][1][0]
    yield "A of another width", "shape", made | {a: number(np.ones((rank, 40)), dtype)}
    yield "B of another width", "shape", made | {b: number(np.ones((40, rank)), dtype)}
    yield "A with three dimensions", "shape", made | {a: (dtype, (*made[a][1], 1), made[a][2])}
    yield "A with one dimension", "shape", made | {a: number(np.ones(64), dtype)}
    yield "an empty A", "shape", made | {a: (dtype, (0, made[a][1][1]), b"")}
    yield (
        "ranks of A and B differ",
        "rank",
        made | {b: number(np.ones((LINEARS[path][1], rank + 1)), dtype)},
    )
    yield "another rank at one module", "rank", made | {
        a: number(np.ones((2, LINEARS[path][0])), dtype), b: number(np.ones((LINEARS[path][1], 2)), dtype)
    }  # fmt: skip
    for name, value in (("NaN", np.nan), ("inf", np.inf), ("-inf", -np.inf)):
        yield f"{name} in A", "nonfinite", poked(made, a, value, dtype)
        yield f"{name} in B", "nonfinite", poked(made, b, value, dtype)
    yield "quantised numbers", "dtype", made | {a: number(np.ones(made[a][1]), "I8")}
    yield "fp8", "dtype", made | {a: number(np.ones(made[a][1]), "F8_E4M3")}
    yield "fp64", "dtype", made | {a: number(np.ones(made[a][1]), "F64")}
    yield (
        "a bias on B",
        "unsupported",
        made | {b.replace("weight", "bias"): number(np.ones(3), dtype)},
    )
    yield "embeddings", "unsupported", made | {f"{PREFIX}model.embed_tokens.weight": made[a]}
    yield (
        "LoRA on embeddings",
        "unsupported",
        made | {f"{PREFIX}model.embed_tokens.lora_embedding_A": made[a]},
    )
    yield (
        "a saved module",
        "unsupported",
        made | {f"{PREFIX}model.norm.modules_to_save.weight": number(np.ones(3))},
    )
    yield (
        "two cases of one name",
        "duplicate_tensor",
        made | {a.replace("layers", "Layers"): made[a]},
    )
    yield (
        "two Unicode forms of one name",
        "duplicate_tensor",
        made | {a.replace("layers", "ｌayers"): made[a]},
    )
    yield (
        "a Cyrillic letter",
        "unexpected_tensor",
        renamed(made, a, a.replace("o", "о")),
    )
    yield "magnitudes without use_dora", "unexpected_tensor", made | {
        f"{PREFIX}{path}.lora_magnitude_vector": number(np.ones(LINEARS[path][1]), dtype)
    }  # fmt: skip
    yield (
        "an update that drowns the base",
        "norm",
        filled(filled(made, "lora_A", 100.0), "lora_B", 100.0),
    )
    yield "nothing at all", "missing_tensor", {}


SETTINGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("another rank", "rank", {"r": 8}),
    ("rank 0", "bad_value", {"r": 0}),
    ("alpha 0", "bad_value", {"lora_alpha": 0}),
    ("alpha NaN", "bad_json", {"lora_alpha": float("nan")}),
    ("alpha infinite", "bad_json", {"lora_alpha": float("inf")}),
    ("alpha beyond reason", "norm", {"lora_alpha": 1e9}),
    ("alpha as text", "bad_value", {"lora_alpha": "16"}),
    ("a rank pattern for nobody", "dead_pattern", {"rank_pattern": {"o_proj": 4}}),
    ("a rank pattern with a typing error", "dead_pattern", {"rank_pattern": {"q_porj": 4}}),
    ("an alpha pattern for nobody", "dead_pattern", {"alpha_pattern": {"lm_head": 4}}),
    ("an alpha pattern behind another", "dead_pattern", {"alpha_pattern": {"q_proj": 4, r".*q_proj": 8}}),
    ("a rank pattern that disagrees", "rank", {"rank_pattern": {"q_proj": 2}}),
    ("an explosive pattern", "bad_pattern", {"rank_pattern": {"(a+)+$": 4}}),
    ("optional parts without end", "bad_pattern", {"rank_pattern": {".?" * 40 + "Z": 4}}),
    ("many costly patterns", "bad_pattern", {"alpha_pattern": {f".*.*[{i}]": 4 for i in range(3000)}}),
    ("more names than modules", "bad_value", {"target_modules": ["q_proj"] * 5000}),
    ("a broken pattern", "bad_pattern", {"target_modules": "[q_proj"}),
    ("targets that miss a module", "unexpected_tensor", {"target_modules": ["q_proj", "k_proj", "up_proj"]}),
    ("targets of one layer", "unexpected_tensor", {"layers_to_transform": [0]}),
    ("targets that are excluded", "unexpected_tensor", {"exclude_modules": ["k_proj"]}),
    ("modules_to_save", "unsupported", {"modules_to_save": ["lm_head"]}),
    ("trained tokens", "unsupported", {"trainable_token_indices": [1, 2]}),
    ("trained biases", "unsupported", {"bias": "lora_only"}),
    ("lora_bias", "unsupported", {"lora_bias": True}),
    ("replicated layers", "unsupported", {"layer_replication": [[0, 2]]}),
    ("bare parameters", "unsupported", {"target_parameters": ["experts.w1"]}),
    ("aLoRA", "unsupported", {"alora_invocation_tokens": [1]}),
    ("PiSSA", "unsupported", {"init_lora_weights": "pissa"}),
    ("LoftQ", "unsupported", {"init_lora_weights": "loftq"}),
    ("Megatron", "unsupported", {"megatron_config": {"x": 1}}),
    ("DoRA without magnitudes", "missing_tensor", {"use_dora": True}),
    ("an unknown switch", "unknown_key", {"use_dorra": True}),
    ("another method", "peft_type", {"peft_type": "LOHA"}),
    ("a prompt", "peft_type", {"peft_type": "PROMPT_TUNING"}),
    ("no method", "peft_type", {"peft_type": None}),
    ("a switch as text", "bad_value", {"use_rslora": "false"}),
    ("targets as a number", "bad_value", {"target_modules": 7}),
)  # fmt: skip


def broken_adapters() -> Iterator[Broken]:
    """All of them."""
    for path, seed, dtype in FORMS:
        for label, code, made in names_to_tensors(path, tensors(seed, 4, dtype), dtype):
            yield Broken(f"{label} ({path}, {dtype})", code, parcel(made))
    for seed, dtype in enumerate(("F32", "BF16", "F16")):
        for label, code, changes in SETTINGS:
            yield Broken(
                f"{label} ({dtype})", code, parcel(tensors(seed, 4, dtype), config(**changes))
            )
    yield from _files()


def _files() -> Iterator[Broken]:
    sound = parcel()
    header, body = split(sound[WEIGHTS])
    first, second, *_ = (name for name in header if name != "__metadata__")
    yield Broken("rank 300", "rank_limit", parcel(tensors(0, 300), config(300)))
    yield Broken(
        "a header over the limit",
        "header_too_large",
        sound | {WEIGHTS: pack(tensors(), {"x": "y" * 5 * 2**20})},
    )
    many = {f"{PREFIX}m{i}.lora_A.weight": number(np.ones((1, 1))) for i in range(20_001)}
    yield Broken("more tensors than anybody has", "too_many_tensors", parcel(many))
    yield Broken("cut", "corrupt", sound | {WEIGHTS: sound[WEIGHTS][:-1]})
    yield Broken("longer than it says", "corrupt", sound | {WEIGHTS: sound[WEIGHTS] + b"\0"})
    yield Broken("empty weights", "corrupt", sound | {WEIGHTS: b""})
    same = header | {second: header[second] | {"data_offsets": header[first]["data_offsets"]}}
    yield Broken(
        "two tensors on the same bytes", "corrupt", sound | {WEIGHTS: with_header(same, body)}
    )
    huge = header | {first: header[first] | {"shape": [2**40, 2**40]}}
    yield Broken(
        "a shape whose product overflows", "corrupt", sound | {WEIGHTS: with_header(huge, body)}
    )
    text = json.dumps(header)[:-1] + "," + json.dumps({first: header[first]})[1:]
    doubled = len(text).to_bytes(8, "little") + text.encode() + body
    yield Broken("a tensor listed twice", "duplicate_key", sound | {WEIGHTS: doubled})
    yield Broken(
        "a key given twice", "duplicate_key", sound | {CONFIG: sound[CONFIG][:-1] + b', "r": 8}'}
    )
    yield Broken("a list as config", "bad_json", sound | {CONFIG: b"[]"})
    yield Broken("no config", "missing_file", {WEIGHTS: sound[WEIGHTS]})
    yield Broken("no weights", "missing_file", {CONFIG: sound[CONFIG]})
    yield Broken(
        "a pickle in its place",
        "pickle",
        {CONFIG: sound[CONFIG], "adapter_model.bin": b"\x80\x04."},
    )
    yield Broken("a pickle beside it", "pickle", sound | {"optimizer.pt": b"\x80\x04."})
    yield Broken("code beside it", "extra_file", sound | {"modeling.py": b"import os"})
    yield Broken(
        "a second adapter inside",
        "extra_file",
        sound | {"checkpoint-10/adapter_config.json": b"{}"},
    )
    record = {"schema_version": 1, "base_name": "other", "base_sites": {PATHS[0]: "0" * 16}}
    yield Broken(
        "the note of another base",
        "base_mismatch",
        sound | {"loramux.json": json.dumps(record).encode()},
    )
    yield Broken("a config over the limit", "too_large", sound | {CONFIG: b" " * (2**20 + 1)})
