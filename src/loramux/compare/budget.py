"""Equal trainable parameters: the rank of every method is searched so that it meets one budget.

Parameters are counted on a base without storage, so a count costs a fraction of a second and no memory. They are
affine in the rank: two counts give the slope, a few more the nearest rank. Where one rank is too coarse a step (a
mixture of eight experts gains eight ranks at a time) some layers, spread evenly, get one more than the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

from loramux.compare.schema import Budget, Entry, Suite, SuiteError

BUDGET = "budget"  # a field of this name takes the number of parameters itself
NEAR = 3  # values tried on each side of the estimate
Fields = dict[str, Any]
Count = Callable[[str, Fields], int]
"""(method, fields) -> trainable parameters; raises ValueError where the method refuses the fields."""


@dataclass(frozen=True)
class Matched:
    """What a method gets: its fields in full, what they amount to, and how that was reached."""

    fields: Fields
    parameters: int
    budget: int
    how: str

    @property
    def deviation(self) -> float:
        return self.parameters / self.budget - 1


class Counter:
    """Counts trainable parameters of methods on one base; the base has no storage."""

    def __init__(self, base: str, dtype: str):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from loramux.core.sites import find_sites
        from loramux.fetch import reading_base, resolve_base

        with reading_base(base):
            config = AutoConfig.from_pretrained(resolve_base(base, dtype=dtype))
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        self.layers = list(dict.fromkeys(site.layer_path for site in find_sites(self.model)))
        self._known: dict[str, int] = {}

    def __call__(self, name: str, fields: Fields) -> int:
        import json

        import torch

        import loramux

        key = json.dumps([name, fields], sort_keys=True)
        if key not in self._known:
            config = loramux.config_from_dict({"name": name, **fields})
            with torch.device("meta"):
                handle = loramux.attach(self.model, config)
            try:
                trainable = handle.trainable_parameters()
                self._known[key] = sum(parameter.numel() for parameter in trainable.values())
            finally:
                handle.detach()
        return self._known[key]


def match_all(suite: Suite, count: Count, layers: Sequence[str]) -> dict[str, Matched]:
    """Fields of every method of the suite. Raises SuiteError, naming all that cannot meet the budget."""
    budget = _budget(suite, count)
    found = {
        label: match(entry, suite, budget, count, layers) for label, entry in suite.methods.items()
    }
    missed = [
        f"{label}: {result.parameters:,} ({result.deviation:+.1%}, {result.how})"
        for label, result in found.items()
        if abs(result.deviation) > suite.budget.tolerance and not suite.methods[label].unmatched
    ]
    if missed:
        raise SuiteError(
            f"the budget of {budget:,} trainable parameters, give or take {suite.budget.tolerance:.0%}, cannot be met "
            f"by {'; '.join(missed)}. Change their fields or the budget, or mark them `unmatched: true`"
        )
    return found


def match(entry: Entry, suite: Suite, budget: int, count: Count, layers: Sequence[str]) -> Matched:
    """The fields of one method that come nearest to the budget."""
    name, given, scale = entry.method.name, entry.method.fields, entry.scale or suite.scale
    if entry.match is None:
        fields = given if entry.scale is None else {**_scaled(given, "r", entry.scale), **given}
        return Matched(fields, count(name, fields), budget, "as written")

    if (
        entry.match == BUDGET
    ):  # the method itself chooses what meets it, once it knows where its ranks are
        fields = {**_scaled(given, "r", scale), **given, BUDGET: budget}
        return Matched(fields, count(name, fields), budget, "chosen by the method")

    def at(value: int) -> Fields:
        fields = {**given, str(entry.match): value}
        return {**_scaled(fields, str(entry.match), scale), **fields}

    even = _nearest(name, at, budget, count)
    if even is None:
        raise SuiteError(
            f"{name}: no value of {entry.match} near the budget of {budget:,} parameters is allowed with {given}"
        )
    value, parameters = even
    best = Matched(at(value), parameters, budget, f"{entry.match} = {value}")
    if abs(best.deviation) <= suite.budget.tolerance:
        return best
    if entry.match != "r" or "rank_pattern" in given:
        return best
    return _uneven(name, at, value, best, count, layers)


def _budget(suite: Suite, count: Count) -> int:
    wanted: Budget = suite.budget
    if wanted.of is None:
        assert wanted.parameters is not None
        return wanted.parameters
    spec = suite.methods[wanted.of].method
    return count(spec.name, spec.fields)


def _scaled(fields: Mapping[str, Any], key: str, scale: float) -> Fields:
    """lora_alpha so that alpha over `key` is `scale`."""
    return {"lora_alpha": scale * fields[key]} if key in fields else {}


def _nearest(
    name: str, at: Callable[[int], Fields], budget: int, count: Count
) -> tuple[int, int] | None:
    """(value, parameters) closest to the budget among the values that the method allows."""

    def counted(value: int) -> int | None:
        try:
            return count(name, at(value))
        except ValueError:
            return None

    known = {v: c for v in (2, 4, 8, 16, 32, 64) if (c := counted(v)) is not None}
    if not known:
        return None
    low, high = min(known), max(known)
    slope = (known[high] - known[low]) / (high - low) if high > low else float(known[low])
    guess = max(1, floor(low + (budget - known[low]) / max(slope, 1.0)))
    for value in range(max(1, guess - NEAR), guess + NEAR + 1):
        parameters = known.get(value, counted(value))
        if parameters is not None:
            known[value] = parameters
    value = min(known, key=lambda v: (abs(known[v] - budget), v))
    return value, known[value]


def _uneven(
    name: str,
    at: Callable[[int], Fields],
    value: int,
    best: Matched,
    count: Count,
    layers: Sequence[str],
) -> Matched:
    """The nearest of ranks that differ by one step between layers; `best` where that is refused or no nearer."""
    below = best.parameters < best.budget
    for step in (1, 2, 4, 8):
        other = value + step if below else value - step
        if other < 1:
            return best
        try:
            gap = count(name, at(other)) - best.parameters
        except ValueError:
            continue
        num = round(len(layers) * (best.budget - best.parameters) / gap) if gap else 0
        for n in (num - 1, num, num + 1):
            if not 0 < n < len(layers):
                continue
            fields = _with_layers(at(value), at(other), _spread(layers, n))
            try:
                found = Matched(
                    fields,
                    count(name, fields),
                    best.budget,
                    f"r = {value}, {other} in {n} of {len(layers)} layers",
                )
            except ValueError:
                continue
            best = min(best, found, key=lambda m: abs(m.deviation))
        return best
    return best


def _spread(layers: Sequence[str], n: int) -> list[str]:
    """n of the layers, spread evenly from the first to the last."""
    return [layers[floor((i + 0.5) * len(layers) / n)] for i in range(n)]


def _with_layers(fields: Fields, other: Fields, chosen: Sequence[str]) -> Fields:
    """`fields`, with rank and alpha of `other` in the chosen layers."""
    key = rf"({'|'.join(re.escape(layer) for layer in chosen)})\..*"
    patterns: Fields = {"rank_pattern": {key: other["r"]}}
    if other.get("lora_alpha") != fields.get("lora_alpha"):
        patterns["alpha_pattern"] = {key: other["lora_alpha"]}
    return fields | patterns
