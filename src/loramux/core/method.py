"""A method: what is allocated at the sites, who routes, what is trained, how well the result can be served.

Why a class and not a registry of functions: `Adapter` asks it a handful of questions and never looks at its type.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from loramux.core.bank import Rows
from loramux.core.router import Router
from loramux.core.types import Expert, RouteRecord, Servability, Site
from loramux.core.values import (
    check_booleans,
    check_positive,
    check_regex,
    check_share,
    check_whole,
)

if TYPE_CHECKING:
    from loramux.core.attach import Attachment
    from loramux.core.controller import Controller


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Fields every method has, under PEFT's names.

    target_modules: None for every linear of the decoder layers, a list of name endings, or one regular expression.
    rank_pattern / alpha_pattern: {name ending or regex: value} for sites that differ.
    """

    method: ClassVar[str]

    r: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: Literal[True, "gaussian"] = True

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_to_transform"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.layers_to_transform, int):
            object.__setattr__(self, "layers_to_transform", (self.layers_to_transform,))
        for name, allowed in _choices(type(self)).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        check_booleans(self)
        check_whole("r", self.r)
        if self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", self.default_alpha())
        check_positive("lora_alpha", self.lora_alpha)
        check_share("lora_dropout", self.lora_dropout)
        self._check_targets()
        self._check_pattern_values()

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_regex(name, value)
            elif value is not None and not _all_of(value, str):
                raise ValueError(
                    f"{name} must be a list of names or one regular expression, got {value!r}"
                )
        layers = self.layers_to_transform
        if layers is None:
            return
        if not _all_of(layers, int):
            raise ValueError(
                f"layers_to_transform must be a layer number or a list of them, got {layers!r}"
            )
        for layer in layers:
            check_whole("layers_to_transform", layer, least=0)

    def _check_pattern_values(self) -> None:
        for name, check in (("rank_pattern", check_whole), ("alpha_pattern", check_positive)):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping) or not _all_of(tuple(pattern), str):
                raise ValueError(f"{name} must map names of linears to values, got {pattern!r}")
            for key, value in pattern.items():
                check_regex(f"the key {key!r} of {name}", key, _at_end(key))
                check(f"{name}[{key!r}]", value)

    def check_patterns(self, paths: Sequence[str]) -> None:
        """Refuse a key of rank_pattern or alpha_pattern that none of the targeted `paths` matches."""
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                if not any(re.match(_at_end(key), path) for path in paths):
                    raise ValueError(
                        f"{name} names {key!r}, which no targeted linear matches; keys are ends of paths at a dot, or "
                        f"regular expressions, as for {paths[0] if paths else 'no linear'!r}"
                    )

    def default_alpha(self) -> float:
        """lora_alpha when none is given."""
        return 16.0

    def rank_at(self, path: str) -> int:
        return int(_by_pattern(self.rank_pattern, path, self.r))

    def scale_at(self, path: str, rank: int | None = None) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA; PEFT's arithmetic."""
        rank = self.rank_at(path) if rank is None else rank
        alpha = _by_pattern(self.alpha_pattern, path, self.lora_alpha)
        return float(alpha / rank**0.5 if self.use_rslora else alpha / rank)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of every field."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def _choices(config_class: type[MethodConfig]) -> dict[str, tuple[object, ...]]:
    """The fields that take one of a few values, by their Literal annotation."""
    hints = get_type_hints(config_class)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _by_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regex, matches the end of the path at a dot."""
    for key, value in pattern.items():
        if re.match(_at_end(key), path):
            return value
    return default


def _at_end(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _all_of(values: Any, kind: type) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, kind) for value in values)


@dataclass(frozen=True)
class Probe:
    """What a method wants trained first: the adapter, for how many steps (None: as the job), scored on how many rows.

    The method's config takes what comes out as the name of a file, in its field `setting`.
    """

    config: MethodConfig
    steps: int | None
    rows: int


class Method:
    """One paper. Subclasses override what differs from a plain LoRA."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    granularity: ClassVar[str]
    routing_unit: ClassVar[str]
    servability: (
        Servability  # of the class, for listings; an instance may be better under its config
    )
    config_class: ClassVar[type[MethodConfig]]
    default_learning_rate: ClassVar[float] = 1e-4
    needs_adapters: ClassVar[bool] = False
    trains_rows: ClassVar[bool] = True
    learns: ClassVar[bool] = True  # False: there is nothing to train, it is ready once attached
    # On disk: a PEFT folder per expert, or one that holds all ranks, for experts that are single ranks.
    folder_layout: ClassVar[Literal["experts", "one"]] = "experts"

    def __init__(self, config: MethodConfig):
        self.config = config

    def experts(self, site: Site) -> list[Expert]:
        """The experts to allocate at this site."""
        return [Expert(self.config.rank_at(site.path), self.config.scale_at(site.path))]

    def usual_sites(self, sites: Sequence[Site]) -> list[Site]:
        """Those of the model's linears that are meant where the config names no target_modules."""
        return list(sites)

    def kept_sites(self, sites: Sequence[Site]) -> list[Site]:
        """Those of the targeted linears that get rows."""
        return list(sites)

    def probe(self) -> Probe | None:
        """An adapter to train and score before this one, where a run is to find out what this one is made of."""
        return None

    def check_probe(self, sites: Sequence[Site]) -> None:
        """Refuse, before the probe is trained, a config that no outcome of it could serve. sites: the targeted ones."""

    def score_probe(self, handle: Attachment, batches: Sequence[Mapping[str, Tensor]]) -> Any:
        """The `setting` that a trained probe leads to, as plain JSON values."""
        raise NotImplementedError(f"{self.name} has no probe")

    def identity(self) -> dict[str, Any]:
        """The config as a run must share it with the one it goes on from: files by their content, not their place."""
        return {"name": self.config.method, **self.config.to_dict()}

    def start_rows(self, site: Site, rows: Rows) -> None:
        """Change fresh rows in place, where a paper starts A otherwise than PEFT."""

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Refuse a model whose sites this method cannot use."""

    def routers(self, sites: Sequence[Site]) -> dict[str, Router]:
        """Routers by the path of the module whose input they read; late routers by the path of their site."""
        return {}

    def unit_of(self, site: Site) -> str | None:
        """For late gates: the path of the site whose router governs this site; None where nothing gates it."""
        return None

    def row_gate(self, site: Site, num_rows: int) -> nn.Module | None:
        """A factor per rank row of this site, folded into A: a module without arguments that gives fp32 [num_rows]."""
        return None

    def tied_experts(self, site: Site) -> int:
        """How many experts of this site share one A; 0: every expert has its own."""
        return 0

    def controller(self) -> Controller | None:
        """A new object that acts between the optimizer steps of one training run; None: gradients do it all."""
        return None

    def governor_of(self, site: Site) -> str | None:
        """Path of a router that governs this site though it need not lie above it; None: the nearest one above."""
        return None

    def check_task(self, task: str | None) -> None:
        """Refuse a request that names this task (None: names none), where the routing goes by tasks."""

    def check_training_task(self, task: str | None) -> None:
        """Refuse a training row of this task; asked before a run starts."""
        self.check_task(task)

    def aux_losses(self, records: Sequence[RouteRecord]) -> dict[str, Tensor]:
        """Named auxiliary losses of one forward pass, coefficients applied."""
        return {}
