"""The adapter_config.json of published MixLoRA adapters, current and legacy, brought to one form.

What the published writers leave out (the loss coefficient, jitter, the router's initial range) gets the published
defaults, with a warning: such a file says enough to run the adapter, not to go on training it as before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from loramux.formats.errors import FormatError, listed
from loramux.formats.fields import is_alpha, is_number, is_rank, is_whole
from loramux.formats.jsonio import check_keys

logger = logging.getLogger(__name__)

STRATEGIES = ("mixlora", "mixlora-dynamic", "mixlora-switch")
LEGACY_STRATEGIES = {"mixtral": "mixlora"}
LEGACY_PROJECTIONS = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}

_LORA = {"use_dora": False, "use_rslora": False, "lora_init": "original"}
_SHARED = {"router_aux_loss_coef": 0.001, "router_loss": True}
_ROUTER = {"router_init_range": 0.02, "jitter_noise": 0.0}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixlora": {"top_k": 2, **_ROUTER, **_SHARED},
    "mixlora-dynamic": {"top_p": 0.8, "temperature": 0.0, **_ROUTER, **_SHARED},
    "mixlora-switch": {
        "expert_capacity": 32,
        "sparse_step": None,
        "ffn_dropout": 0.0,
        "router_z_loss_coef": 0.001,
        "router_init_range": 1.0,
        "jitter_noise": 0.01,
        **_SHARED,
    },
}
# The published writers never say these.
_NOT_EXPORTED = frozenset({*_ROUTER, *_SHARED, "router_z_loss_coef", "ffn_dropout"})
_REQUIRED = ("r", "lora_alpha", "lora_dropout", "target_modules", "num_experts", "routing_strategy")
_LABELS = {
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "act_fn": None,
}
_STRATEGY_KEYS = frozenset(key for defaults in _DEFAULTS.values() for key in defaults)
_KNOWN = (
    frozenset({"peft_type", "expert_lora", *_REQUIRED, *_LABELS, *_LORA, *_SHARED}) | _STRATEGY_KEYS
)
# What `expert_lora` may override; the rest of it repeats labels of the whole.
_EXPERT_FIELDS = ("r", "lora_alpha", "lora_dropout", *_LORA)


def normal_config(config: Mapping[str, Any], where: str, *, warns: bool = True) -> dict[str, Any]:
    """The config under current names with every default filled in (null counts as not said); raises FormatError."""
    config = {key: value for key, value in config.items() if value is not None}
    if config.get("peft_type") != "MIXLORA":
        raise FormatError(
            f"{where}: peft_type is {config.get('peft_type')!r}, expected 'MIXLORA'; plain adapters are "
            "read with read_peft",
            code="peft_type",
        )
    check_keys(dict(config), _KNOWN, where)
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise FormatError(f"{where} lacks {listed(missing)}", code="bad_value")
    strategy = _strategy(config["routing_strategy"], where)
    defaults = {**_LABELS, **_LORA, **_DEFAULTS[strategy]}
    foreign = [key for key in config if key in _STRATEGY_KEYS and key not in defaults]
    if foreign and warns:
        logger.warning("%s: %s has no effect with %r", where, listed(foreign), strategy)
    lost = [key for key in _DEFAULTS[strategy] if key in _NOT_EXPORTED and key not in config]
    if lost and warns:
        logger.warning(
            "%s does not say %s (published MixLoRA files never do): the defaults are used, so training cannot be "
            "resumed faithfully from it",
            where,
            ", ".join(lost),
        )
    result = {key: config[key] for key in _REQUIRED if key in config} | {
        key: config.get(key, default) for key, default in defaults.items()
    }
    result |= {
        "peft_type": "MIXLORA",
        "routing_strategy": strategy,
        "target_modules": _targets(config["target_modules"], where),
        "expert_lora": _expert_lora(config.get("expert_lora"), where),
    }
    _check_values(result, where)
    return dict(sorted(result.items()))


def expert_setting(config: Mapping[str, Any], field: str) -> Any:
    """A LoRA field of the FFN experts: what `expert_lora` says, else what holds for the whole adapter."""
    return (config.get("expert_lora") or {}).get(field, config[field])


def _strategy(name: object, where: str) -> str:
    current = LEGACY_STRATEGIES.get(name, name) if isinstance(name, str) else name
    if current not in STRATEGIES:
        raise FormatError(
            f"{where}: routing_strategy is {name!r}, expected one of {', '.join(STRATEGIES)}",
            code="bad_value",
        )
    return str(current)


def _targets(value: object, where: str) -> list[str]:
    """Both published spellings: a list of names, or every name mapped to true or false."""
    if isinstance(value, dict) and all(isinstance(on, bool) for on in value.values()):
        value = [name for name, on in value.items() if on]
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise FormatError(f"{where}: target_modules is not a list of names", code="bad_value")
    return sorted({LEGACY_PROJECTIONS.get(str(name), str(name)) for name in value})


def _expert_lora(value: object, where: str) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expert_lora is not an object", code="bad_value")
    check_keys(value, frozenset({*_EXPERT_FIELDS, *_LABELS}), f"{where}, expert_lora")
    kept = {key: value[key] for key in _EXPERT_FIELDS if key in value}
    for key, entry in kept.items():
        _check_value(key, entry, f"{where}, expert_lora")
    return kept


def _check_values(config: Mapping[str, Any], where: str) -> None:
    for key, value in config.items():
        _check_value(key, value, where)
    if config.get("bias") not in (None, "none"):
        raise FormatError(
            f"{where}: bias is {config['bias']!r}, only 'none' is supported", code="unsupported"
        )
    if config.get("top_k") is not None and config["top_k"] > config["num_experts"]:
        raise FormatError(
            f"{where}: top_k {config['top_k']} exceeds num_experts {config['num_experts']}",
            code="bad_value",
        )


def _check_value(key: str, value: Any, where: str) -> None:
    test, expected = _TYPES.get(key, (_anything, ""))
    if not test(value):
        raise FormatError(
            f"{where}: {key} is {value!r:.200}, expected {expected}", code="bad_value"
        )


def _anything(value: object) -> bool:
    return True


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1  # type: ignore[operator]


def _not_negative(value: object) -> bool:
    return is_number(value) and value >= 0  # type: ignore[operator]


def _positive(value: object) -> bool:
    return is_whole(value) and 0 < value < 2**31  # type: ignore[operator]


def _text_or_none(value: object) -> bool:
    return value is None or isinstance(value, str)


_Test = Callable[[object], bool]
_TYPES: dict[str, tuple[_Test, str]] = {
    "r": (is_rank, "a positive whole number"),
    "lora_alpha": (is_alpha, "a number other than 0"),
    "lora_dropout": (_is_share, "a number in [0, 1)"),
    "num_experts": (lambda v: _positive(v) and v <= 4096, "a whole number from 1 to 4096"),  # type: ignore[operator]
    "top_k": (_positive, "a positive whole number"),
    "top_p": (lambda v: is_number(v) and 0 < v <= 1, "a number in (0, 1]"),  # type: ignore[operator]
    "expert_capacity": (_positive, "a positive whole number"),
    "sparse_step": (lambda v: v is None or _positive(v), "null or a positive whole number"),
    "temperature": (_not_negative, "a number from 0"),
    "jitter_noise": (_not_negative, "a number from 0"),
    "router_init_range": (_not_negative, "a number from 0"),
    "router_aux_loss_coef": (_not_negative, "a number from 0"),
    "router_z_loss_coef": (_not_negative, "a number from 0"),
    "ffn_dropout": (_is_share, "a number in [0, 1)"),
    "router_loss": (_is_bool, "true or false"),
    "use_dora": (_is_bool, "true or false"),
    "use_rslora": (_is_bool, "true or false"),
    "lora_init": (lambda v: v in ("original", "gaussian"), "'original' or 'gaussian'"),
    "act_fn": (_text_or_none, "a name or null"),
    "task_type": (_text_or_none, "a name or null"),
    "base_model_name_or_path": (_text_or_none, "a name or null"),
}
