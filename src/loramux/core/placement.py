"""Which linears of each layer hold LoRA: module scores, the choice among them, and the setting as plain JSON values.

A setting belongs to a backbone: the names of the linears in a layer and the number of layers must be its own. Scores of
different depths are not on one scale, so the choice is made within each layer unless asked otherwise.

Letters: L layers, M scored linears of a layer, U units (here: linears).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from loramux.core.ablation import (
    Scores,
    Unit,
    ablation_scores,
    can_reuse_prefix,
    check_scorable,
    inputs_of,
    module_units,
)
from loramux.core.attach import Attachment
from loramux.core.estimates import (
    Criterion,
    output_norm_scores,
    sensitivity_scores,
    taylor_scores,
)
from loramux.core.modes import evaluating
from loramux.core.supervised import token_losses
from loramux.core.types import Site
from loramux.core.values import check_whole

Per = Literal["layer", "model"]
Batch = Mapping[str, Tensor]
SCHEMA_VERSION = 1
KIND = "fanlora setting"
NUM_PARTS = 3  # disjoint parts of the data whose choices are compared
Part = Scores | Criterion  # what a scorer says of one batch, with the weight of the batch
# Every scorer: (handle, batch, units, adapter name) -> Part; higher is more important.
MODULE_SCORERS: Mapping[str, Callable[..., Part]] = {
    "ablation": ablation_scores,
    "taylor": taylor_scores,
    "output_norm": output_norm_scores,
    "relative_output_norm": partial(output_norm_scores, relative=True),
    "sensitivity": sensitivity_scores,
}


@dataclass(frozen=True)
class Module:
    """One linear of one layer. removal and alone: the two terms of an ablation score."""

    score: float
    removal: float | None = None
    alone: float | None = None


@dataclass(frozen=True)
class Setting:
    """Scores and choice for one backbone; `layers[l]` maps a linear's name inside layer l, in running order.

    agreement: per layer, mean Jaccard index between the choices that three disjoint parts of the data lead to.
    losses: mean cross-entropy of the base, of the probe, and of the probe with only the kept linears.
    probe: folder of the probe's adapter, relative to the file. about: base, data and seed, for the reader.
    """

    layers: tuple[Mapping[str, Module], ...]
    n_keep: int
    scorer: str
    per: Per = "layer"
    agreement: tuple[float, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    probe: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def mask(self, n_keep: int | None = None, per: Per | None = None) -> list[dict[str, bool]]:
        """Per layer, which linears are kept. Ties go to the linear that runs first."""
        scores = [{name: m.score for name, m in layer.items()} for layer in self.layers]
        num, how = self.n_keep if n_keep is None else n_keep, self.per if per is None else per
        return choose(scores, num, how)

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse a model whose targeted linears are not the ones that were scored."""
        found = names_by_layer(sites)
        if len(found) != len(self.layers):
            raise ValueError(
                f"the setting is for {len(self.layers)} layers, the model has {len(found)} with targeted linears; "
                "probe this model, or name the setting that was made for it"
            )
        for number, (layer, names) in enumerate(zip(self.layers, found, strict=True)):
            if set(layer) != set(names):
                raise ValueError(
                    f"the setting scored {sorted(layer)} in layer {number}, the model's targeted linears there are "
                    f"{sorted(names)}; probe this model, or use the target_modules of the setting"
                )

    def to_json(self) -> dict[str, Any]:
        mask = self.mask()
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "scorer": f"{self.scorer} (reconstruction)",
            "n_keep": self.n_keep,
            "per": self.per,
            "losses": dict(self.losses),
            "agreement": list(self.agreement),
            "probe": self.probe,
            **self.about,
            "layers": [
                {name: {"keep": kept[name], **_terms(m)} for name, m in layer.items()}
                for layer, kept in zip(self.layers, mask, strict=True)
            ],
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> Setting:
        """Raises ValueError for anything else than what `to_json` gives."""
        if not isinstance(value, dict) or value.get("kind") != KIND:
            raise ValueError(f"{where} is not a FanLoRA setting; make one by training without it")
        if value.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{where} has schema version {value.get('schema_version')!r}, this version reads {SCHEMA_VERSION}; "
                "probe again"
            )
        try:
            setting = _read(value)
            said = [{name: m["keep"] for name, m in layer.items()} for layer in value["layers"]]
        except KeyError as error:
            raise ValueError(
                f"{where} is not a complete setting (it has no {error}); probe again"
            ) from None
        except ValueError as error:
            raise ValueError(f"{where} is not a complete setting ({error}); probe again") from None
        if said != setting.mask():
            raise ValueError(
                f"{where} keeps other linears than its scores say; change n_keep in the method's config instead"
            )
        return setting


def _read(value: Mapping[str, Any]) -> Setting:
    """A setting of values whose types are checked. KeyError for what is missing, ValueError for what is wrong."""
    probe, per = value["probe"], value["per"]
    if probe is not None:
        parts = PurePosixPath(_typed("probe", probe, str)).parts
        if not parts or parts[0] == "/" or ".." in parts or "\\" in probe or ":" in probe:
            raise ValueError(f"probe must be a folder beside the setting, got {probe!r}")
    check_whole("n_keep", value["n_keep"])
    if per not in get_args(Per):
        raise ValueError(f"per must be one of {get_args(Per)}, got {per!r}")
    layers = tuple(
        {name: _module(name, m) for name, m in _typed("a layer", layer, dict).items()}
        for layer in _typed("layers", value["layers"], list)
    )
    if not all(layers) or not layers:
        raise ValueError("layers must hold scored linears, every one of them")
    losses = _typed("losses", value["losses"], dict)
    return Setting(
        layers=layers,
        n_keep=value["n_keep"],
        scorer=_typed("scorer", value["scorer"], str).removesuffix(" (reconstruction)"),
        per=per,
        agreement=tuple(
            _number("agreement", a) for a in _typed("agreement", value["agreement"], list)
        ),
        losses={name: _number(f"losses.{name}", loss) for name, loss in losses.items()},
        probe=probe,
    )


def _module(name: str, value: Any) -> Module:
    terms = _typed(name, value, dict)
    _typed(f"{name}.keep", terms["keep"], bool)
    optional = {
        term: _number(f"{name}.{term}", terms[term])
        for term in ("removal", "alone")
        if term in terms
    }
    return Module(_number(f"{name}.score", terms["score"]), **optional)


def _typed(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__}, got {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def choose(scores: Sequence[Mapping[str, float]], n_keep: int, per: Per) -> list[dict[str, bool]]:
    """The `n_keep` best linears of each layer, or as many in all over the whole model."""
    least = min(map(len, scores))
    if n_keep > least:
        raise ValueError(
            f"n_keep={n_keep}, but a layer has only {least} targeted linears; lower n_keep or target more"
        )
    places = [(number, name) for number, layer in enumerate(scores) for name in layer]
    # A stable sort: of equal scores the one that runs first comes first.
    ranked = sorted(places, key=lambda place: -scores[place[0]][place[1]])
    if per == "model":
        kept = set(ranked[: n_keep * len(scores)])
    else:
        own = [[place for place in ranked if place[0] == number] for number in range(len(scores))]
        kept = {place for layer in own for place in layer[:n_keep]}
    return [{name: (n, name) in kept for name in layer} for n, layer in enumerate(scores)]


def make_setting(
    handle: Attachment,
    batches: Sequence[Batch],
    *,
    n_keep: int,
    scorer: str = "ablation",
    per: Per = "layer",
    name: str | None = None,
) -> Setting:
    """Score every linear of a trained probe on held-out batches and choose among them."""
    adapter = handle._named(name)
    check_scorable(adapter)
    units = module_units(adapter)
    score = MODULE_SCORERS[scorer]
    if scorer == "ablation":
        score = partial(score, reuse=can_reuse_prefix(handle, batches[0], adapter.name))
    parts = [score(handle, batch, units, adapter.name) for batch in batches]
    setting = Setting(
        _layers(adapter.sites, units, parts), n_keep, scorer, per,
        agreement=_agreement(adapter.sites, units, parts, n_keep, per),
    )  # fmt: skip
    return replace(setting, losses=_losses(handle, batches, setting, adapter.name))


def names_by_layer(sites: Sequence[Site]) -> list[list[str]]:
    """Names of the linears inside their layer, in running order, for layers that have any."""
    found: dict[int, list[str]] = {}
    for site in sites:
        found.setdefault(site.layer, []).append(site.name)
    return [found[layer] for layer in sorted(found)]


def _layers(
    sites: Mapping[str, Site], units: Sequence[Unit], parts: Sequence[Part]
) -> tuple[Mapping[str, Module], ...]:
    weights = torch.tensor([part.weight for part in parts], dtype=torch.float64)
    share = weights / weights.sum()

    def mean(values: Sequence[Tensor]) -> list[float]:
        return [float(value) for value in share @ torch.stack(list(values)).double()]

    exact = [part for part in parts if isinstance(part, Scores)]
    score_U = mean([part.importance for part in parts])
    terms: list[list[float]] = []
    if exact:
        terms = [mean([part.removal for part in exact]), mean([part.alone for part in exact])]
    found: dict[int, dict[str, Module]] = {}
    for u, unit in enumerate(units):
        site = sites[unit.path]
        module = Module(score_U[u], *(values[u] for values in terms))
        found.setdefault(site.layer, {})[site.name] = module
    return tuple(found[layer] for layer in sorted(found))


def _agreement(
    sites: Mapping[str, Site],
    units: Sequence[Unit],
    parts: Sequence[Part],
    n_keep: int,
    per: Per,
) -> tuple[float, ...]:
    if len(parts) < NUM_PARTS:
        return ()
    masks = []
    for number in range(NUM_PARTS):
        own = slice(number, None, NUM_PARTS)
        layers = _layers(sites, units, parts[own])
        masks.append(Setting(layers, n_keep, "", per).mask())
    pairs = list(itertools.combinations(masks, 2))
    return tuple(
        sum(_jaccard(one[layer], two[layer]) for one, two in pairs) / len(pairs)
        for layer in range(len(masks[0]))
    )


def _jaccard(one: Mapping[str, bool], two: Mapping[str, bool]) -> float:
    both = sum(one[name] and two[name] for name in one)
    either = sum(one[name] or two[name] for name in one)
    return both / either if either else 1.0


@torch.no_grad()
def _losses(
    handle: Attachment, batches: Sequence[Batch], setting: Setting, name: str
) -> dict[str, float]:
    """Removing many linears at once is not the sum of single removals, hence "masked"."""
    adapter = handle.adapters[name]
    numbers = sorted({site.layer for site in adapter.sites.values()})
    kept = dict(zip(numbers, setting.mask(), strict=True))
    out = [path for path, site in adapter.sites.items() if not kept[site.layer][site.name]]
    total = {"base": 0.0, "probe": 0.0, "masked": 0.0}
    last = handle.dispatch.last
    with evaluating(handle.model):
        for batch in batches:
            call, labels = inputs_of(batch, handle.dispatch.weight.device)
            num = call["input_ids"].shape[0]
            masks = {
                path: torch.zeros(num, adapter.rows[path].spans.num_rows, device=labels.device)
                for path in out
            }
            for what, who, off in (
                ("base", None, {}), ("probe", name, {}), ("masked", name, masks)
            ):  # fmt: skip
                with handle.batch([who] * num), handle.masking(off, name):
                    total[what] += float(token_losses(handle.model, call, labels).double().sum())
    handle.dispatch.last = last
    tokens = sum(_tokens(batch) for batch in batches)
    return {what: value / tokens for what, value in total.items()}


def _tokens(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def _terms(module: Module) -> dict[str, float]:
    terms = {"score": module.score, "removal": module.removal, "alone": module.alone}
    return {name: value for name, value in terms.items() if value is not None}
