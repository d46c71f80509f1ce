"""The keys of PEFT's adapter_config.json: which are read, which must be off, which only mattered in training.

Why a list of our own: PEFT warns about keys it does not know and loads anyway, and importing it takes seconds. A test
compares this list with the installed PEFT's dataclass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loramux.formats.errors import FormatError, listed
from loramux.formats.jsonio import check_keys
from loramux.formats.tensors import MAX_RANK

# Read by us.
_USED = frozenset(
    {
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "fan_in_fan_out",
        "init_lora_weights",
    }
)
# No influence on what a finished adapter computes: labels, initialisation, run-time hints.
_NEUTRAL = frozenset(
    {
        "task_type",
        "inference_mode",
        "revision",
        "auto_mapping",
        "peft_version",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "megatron_core",
        "runtime_config",
        "qalora_group_size",
        "ensure_weight_tying",
        "merge_weights",  # PEFT 0.2
    }
)
# Change what the adapter computes or holds, and are not built here: fine while off.
_OFF = {
    "bias": "trained base biases; re-train with bias='none'",
    "modules_to_save": "whole trained modules; re-train without modules_to_save, or merge them into the base",
    "layer_replication": "a base with repeated layers; build that base as a model of its own",
    "target_parameters": "LoRA on bare parameters; re-train with target_modules",
    "trainable_token_indices": "trained token embeddings; re-train without them",
    "lora_bias": "a bias on B; re-train with lora_bias=false",
    "use_qalora": "QA-LoRA's pooled inputs; re-train with use_qalora=false",
    "alora_invocation_tokens": "activated LoRA, which starts in mid-prompt; re-train without it",
    "alora_invocation_string": "activated LoRA, which starts in mid-prompt; re-train without it",
    "megatron_config": "Megatron's parallel linears; convert the adapter to plain linears",
    "use_bdlora": "block-diagonal factors; expand them to full matrices",
    "arrow_config": "Arrow routing; load its experts one by one",
    "velora_config": "VeLoRA's compressed backward; set it to null to load the adapter for inference",
    "kasa_config": "KaSA, which changes the base weights; re-train without it",
    "monteclora_config": "Monte Carlo sampling; re-train without it",
    "enable_lora": "merged-linear LoRA of PEFT 0.2; save it again with a current PEFT",
}
KNOWN_KEYS = _USED | _NEUTRAL | frozenset(_OFF)

# These subtract from the base weights before training: without the changed base the adapter means nothing.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
LARGEST = 1e30
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a LoRA config with unknown keys, values of the wrong type, or features that are not built here."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise FormatError(
            f"{where}: peft_type is {kind!r:.100}; {_other_kind(kind)}", code="peft_type"
        )
    check_keys(dict(config), KNOWN_KEYS, where)
    for key, (test, expected) in _TYPES.items():
        if config.get(key) is not None and not test(config[key]):
            raise FormatError(
                f"{where}: {key} is {config[key]!r:.200}, expected {expected}", code="bad_value"
            )
    on = [key for key in _OFF if _is_on(key, config.get(key))]
    if on:
        raise FormatError(
            f"{where} uses {listed(on)}, which is not supported: {'; '.join(_OFF[key] for key in on)}",
            code="unsupported",
        )
    _check_initialisation(config.get("init_lora_weights"), where)


def _is_on(key: str, value: Any) -> bool:
    if key == "bias":
        return value not in (None, "none")
    return value not in (None, False, [], {}, "")


def _check_initialisation(value: Any, where: str) -> None:
    if value is None or isinstance(value, bool) or value in _KEEPS_BASE:
        return
    if isinstance(value, str) and value.startswith(_CHANGES_BASE):
        raise FormatError(
            f"{where}: init_lora_weights is {value!r:.100}, which also changed the base weights; save the adapter "
            "with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it a "
            "plain LoRA",
            code="unsupported",
        )
    raise FormatError(
        f"{where}: init_lora_weights is {value!r:.100}, expected true, false or one of {', '.join(_KEEPS_BASE)}",
        code="bad_value",
    )


def _other_kind(kind: object) -> str:
    if kind == "MIXLORA":
        return "read it with loramux.formats.mixlora.read_mixlora"
    return "only 'LORA' adapters are read"


def is_whole(value: object) -> bool:
    return type(value) is int


def is_number(value: object) -> bool:
    # Bounded: an integer of hundreds of digits is legal JSON, but no float.
    return type(value) in (int, float) and abs(value) < LARGEST  # type: ignore[operator, arg-type]


def is_rank(value: object) -> bool:
    return is_whole(value) and 0 < value <= MAX_RANK  # type: ignore[operator]


def is_alpha(value: object) -> bool:
    return is_number(value) and value != 0


def _is_names(value: object) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_layers(value: object) -> bool:
    return is_whole(value) or (isinstance(value, list) and all(map(is_whole, value)))


def _maps_to(test: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(test, value.values()))


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_Test = Callable[[object], bool]
_TYPES: dict[str, tuple[_Test, str]] = {
    "r": (is_rank, f"a whole number from 1 to {MAX_RANK}"),
    "lora_alpha": (is_alpha, "a number other than 0"),
    "lora_dropout": (
        lambda value: type(value) in (int, float) and 0 <= value < 1,  # type: ignore[operator]
        "a number in [0, 1)",
    ),
    "target_modules": (_is_names, "a list of module names or one regular expression"),
    "exclude_modules": (_is_names, "a list of module names or one regular expression"),
    "layers_to_transform": (_is_layers, "a layer index or a list of them"),
    "layers_pattern": (_is_names, "a name or a list of names"),
    "rank_pattern": (_maps_to(is_rank), f"names mapped to whole numbers from 1 to {MAX_RANK}"),
    "alpha_pattern": (_maps_to(is_alpha), "names mapped to numbers other than 0"),
    "use_rslora": (_is_bool, "true or false"),
    "use_dora": (_is_bool, "true or false"),
    "fan_in_fan_out": (_is_bool, "true or false"),
    "base_model_name_or_path": (_is_text, "a name"),
    "task_type": (_is_text, "a name"),
    "bias": (_is_text, "'none'"),
}
