"""What the conformance suite runs on: every method in small variants, and batches of requests for them.

Why a table with a default: methods are found by themselves. One without an entry here is run with `r=4` and its own
defaults, so a new file is tested before its author writes a test.

Letters: B requests, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loramux
from loramux.core.adapter import Adapter
from loramux.core.method import Method, MethodConfig
from loramux.methods import load_method, method_names
from pico import VOCAB, build_pico

# Dropout and jitter are random: off, except where a test is about them.
_ALL = {"r": 4, "lora_alpha": 6.0, "lora_dropout": 0.0}
_EXPERTS = {"num_experts": 4, "jitter_noise": 0.0}

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        "plain": {},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "patterns": {"rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {r".*\.1\..*": 3.0}},
    },
    "milora": {
        "ste": {"top_k": 2},
        "prob-last": {"top_k": 3, "gate": "prob", "pooler": "last"},
        "renorm-max": {"top_k": 2, "gate": "renorm", "pooler": "max", "activation": "gelu"},
        "dora": {"top_k": 2, "use_dora": True},
    },
    "mixlora": {
        "top2": {**_EXPERTS},
        "dora": {**_EXPERTS, "use_dora": True},
        "dynamic": {**_EXPERTS, "routing_strategy": "mixlora-dynamic", "top_p": 0.6},
        "switch": {**_EXPERTS, "routing_strategy": "mixlora-switch"},
        "every-other-layer": {**_EXPERTS, "sparse_step": 2, "expert_r": 2, "expert_alpha": 3.0},
    },
    "beamlora": {
        "default": {},
        "cool": {"temperature": 0.03, "rank_pattern": {r".*\.0\..*": 2}, "use_rslora": True},
    },
    "alora": {"default": {"rank_pattern": {r".*\.0\..*": 2}}, "rslora": {"use_rslora": True}},
    "fanlora": {
        "probe": {},
        "placed": {"scorer": "random", "n_keep": 2, "match_r": 3},
        "dora": {"scorer": "random", "use_dora": True},
    },
    "smora": {
        "ranks": {"r": 6, "activate_r": 2},
        "units": {"r": 8, "activate_r": 4, "rank_partition": 2, "score": "softmax"},
        # Cleared gradients count as a step there, and the biases that then move are part of the gates.
        "biased": {
            "activate_r": 3,
            "gate_from_biased": True,
            "bias_step": 0.0,
            "alpha_pattern": {r".*\.1\..*": 3.0},
        },
    },
    "hydralora": {"default": {}},
    "loramoe": {"default": {"num_experts": 4}},
    "midora": {"default": {"top_k": 2}},
    "mixdora": {"default": {**_EXPERTS}},
    "moelora": {"mean": {"num_experts": 2, "tasks": ("ask", "tell"), "fallback": "mean"}},
    "mola": {"default": {}, "steps": {"experts_per_layer": (2, 3)}},
    "molora": {"default": {"num_experts": 3}},
    "mole": {
        "layer": {"granularity": "layer"},
        "matrix": {"granularity": "matrix", "share_tau": True},
        "network": {"granularity": "network", "weight_sum": "N"},
        "prompt": {"granularity": "block", "pool": "prompt_mean"},
    },
    "loraflow": {
        "layer": {"init": "anchor:green"},
        "module": {"granularity": "module"},
        "step": {"granularity": "step", "sum_penalty_coef": 0.1},
    },
    "xlora": {
        "plain": {},
        "layerwise": {
            "layerwise_scalings": True,
            "top_k_lora": 2,
            "xlora_depth": 2,
            "xlora_size": 16,
            "xlora_dropout_p": 0.0,
        },
    },
    "arrow": {"top2": {"top_k": 2}},
    # Leaving adapters out of a step is random: off, as dropout is.
    "ramole": {
        "default": {"adapter_dropout": 0.0},
        "null": {"adapter_dropout": 0.0, "null_expert": True, "normalise_keys": True},
    },
}
# The raw top-p weights of a token do not sum to 1, so untrained experts scale the FFN: the published rule.
NOT_THE_BASE_AT_FIRST = ("mixlora-dynamic",)
# Trained adapters for the methods that gate them: other ranks and scales, and one that leaves layer 1 out.
EXPERTS: dict[str, dict[str, Any]] = {
    "red": {"r": 4, "lora_alpha": 4.0},
    "green": {"r": 2, "lora_alpha": 3.0},
    "blue": {"r": 3, "lora_alpha": 6.0, "layers_to_transform": (0,)},
}


@dataclass(frozen=True)
class Variant:
    """One method under one config."""

    method: str
    label: str
    settings: Mapping[str, Any] = field(hash=False, default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method}-{self.label}"

    @property
    def method_class(self) -> type[Method]:
        return load_method(self.method)

    @property
    def starts_as_base(self) -> bool:
        return self.name not in NOT_THE_BASE_AT_FIRST


def every_variant() -> list[Variant]:
    """All variants of all methods that can be found."""
    return [
        Variant(name, label, settings)
        for name in method_names()
        for label, settings in VARIANTS.get(name, {"default": {}}).items()
    ]


def variants_of(*methods: str) -> list[Variant]:
    return [variant for variant in every_variant() if variant.method in methods]


def first_variants() -> list[Variant]:
    """One of each method, for claims that cost more."""
    found: dict[str, Variant] = {}
    for variant in every_variant():
        found.setdefault(variant.method, variant)
    return list(found.values())


def crossed(*families: str) -> list[tuple[Variant, str]]:
    """Every variant on Llama, and one of each method on the other families: for parametrize."""
    return [
        *((variant, "llama") for variant in every_variant()),
        *((variant, family) for family in families for variant in first_variants()),
    ]


def learning(cases: list[Any]) -> list[Any]:
    """Those that have something to train: variants, or (variant, family)."""
    return [c for c in cases if (c if isinstance(c, Variant) else c[0]).method_class.learns]


def named(value: object) -> str:
    """Test ids for variants and families."""
    return str(getattr(value, "name", value))


class Maker:
    """Builds handles for variants; keeps the folders of adapters that gates need."""

    def __init__(self, root: Path):
        self.root = root

    def config(self, variant: Variant, family: str = "llama", **overrides: Any) -> MethodConfig:
        config_class = variant.method_class.config_class
        known = {f.name for f in fields(config_class)}
        settings = {key: value for key, value in _ALL.items() if key in known}
        if variant.method_class.needs_adapters:
            settings["adapters"] = self.expert_folders(family)
        return config_class(**{**settings, **variant.settings, **overrides})

    def attach(
        self,
        model: nn.Module,
        variant: Variant,
        family: str = "llama",
        *,
        trained: bool = True,
        backend: str = "reference",
        seed: int = 0,
        **overrides: Any,
    ) -> loramux.Handle:
        torch.manual_seed(seed)
        handle = loramux.attach(model, self.config(variant, family, **overrides), backend=backend)
        if trained:
            nudge(handle.adapters["default"], seed)
        return handle

    def attach_all(
        self, model: nn.Module, variants: Sequence[Variant], family: str = "llama"
    ) -> loramux.Handle:
        """All of them on one model, each under its variant's name."""
        first, *others = variants
        torch.manual_seed(0)
        handle = loramux.attach(
            model, self.config(first, family), name=first.name, backend="reference"
        )
        for variant in others:
            handle.add(self.config(variant, family), name=variant.name)
        for seed, adapter in enumerate(handle.adapters.values()):
            nudge(adapter, seed)
        return handle

    def expert_folders(self, family: str) -> tuple[str, ...]:
        folders = [self.root / family / name for name in EXPERTS]
        for seed, (folder, settings) in enumerate(zip(folders, EXPERTS.values(), strict=True)):
            if not folder.exists():
                handle = loramux.attach(build_pico(family), loramux.LoraConfig(**settings))
                nudge(handle.adapters["default"], 10 + seed)
                handle.save(folder)
        return tuple(map(str, folders))


@torch.no_grad()
def nudge(adapter: Adapter, seed: int = 0) -> None:
    """Move every trainable parameter off its start, as training would: B is not zero, routers have an opinion."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in adapter.trainable().values():
        # A short vector holds polynomial coefficients, and high powers multiply what is added to them.
        std = 0.01 if parameter.dim() == 1 and parameter.numel() < 16 else 0.15
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parameter.add_((std * noise).to(parameter.dtype))


def routes_on_prompt(handle: loramux.Handle) -> bool:
    return any(adapter.routes_on_prompt for adapter in handle.adapters.values())


# -- requests ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One sequence and who answers it (None: the bare base)."""

    adapter: str | None
    ids: tuple[int, ...]


def random_requests(
    adapters: Sequence[str | None], count: int, seed: int, longest: int = 11
) -> list[Request]:
    draw = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    return [
        Request(
            adapters[whole(0, len(adapters))],
            tuple(whole(4, VOCAB) for _ in range(whole(2, longest + 1))),
        )
        for _ in range(count)
    ]


def padded(requests: Sequence[Request], side: str = "right") -> dict[str, Tensor]:
    """Model inputs [B, T] with positions that do not count padding."""
    width = max(len(request.ids) for request in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        num = len(request.ids)
        at = slice(0, num) if side == "right" else slice(width - num, width)
        ids[row, at] = torch.tensor(request.ids)
        mask[row, at] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def packed(requests: Sequence[Request]) -> dict[str, Tensor]:
    """All requests in one row, kept apart by a block-diagonal causal mask [1, 1, T, T] and segment ids [1, T]."""
    ids = torch.tensor([[token for request in requests for token in request.ids]])
    segment = torch.tensor([[i for i, request in enumerate(requests) for _ in request.ids]])
    positions = torch.tensor([[place for request in requests for place in range(len(request.ids))]])
    num = ids.shape[1]
    same = segment[0][:, None] == segment[0][None, :]
    mask = (same & torch.ones(num, num, dtype=torch.bool).tril())[None, None]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "segment_ids": segment,
    }


IDS = torch.tensor([[5, 17, 40, 61, 8, 29, 44, 12], [90, 33, 12, 7, 70, 52, 9, 20]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
LABELS = torch.where(
    (torch.arange(8) < 3) | (MASK == 0), torch.full_like(IDS, -100), IDS
)  # three prompt tokens each


def logits_of(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**{"input_ids": IDS, "attention_mask": MASK, **inputs}).logits


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything `attach` could leave behind, by identity."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "forwards": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "hooks": {
            name: [len(getattr(module, kind)) for kind in hooks]
            for name, module in model.named_modules()
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "checkpointing": {
            name: getattr(module, "_gradient_checkpointing_func", None)
            for name, module in model.named_modules()
        },
        "training": {name: module.training for name, module in model.named_modules()},
        "keys": list(model.state_dict()),
    }
