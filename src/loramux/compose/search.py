"""The search behind `lorahub`: weights of adapters by a few loss evaluations, no gradient.

The candidate lives on the base as one plain adapter whose rows are overwritten for every evaluation; the base itself is
never written to, and the adapter is taken off at the end.

Letters: N adapters.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loramux.compose.mergers.lorahub import LoraHubOptions, merge
from loramux.compose.parts import Merged
from loramux.compose.sources import Source, parts_at, union
from loramux.errors import LoramuxError

if TYPE_CHECKING:
    from loramux.recipe import DataSource

log = logging.getLogger(__name__)
BATCH_SIZE = 8
FIRST_STEP, GROW, SHRINK = (
    0.5,
    1.5,
    1.5**-0.25,
)  # of the (1+1) evolution strategy: the 1/5 success rule; ours
Objective = Callable[[Sequence[float]], float]
Advance = Callable[[str], None]


class NothingBetterError(LoramuxError):
    """No weights were found under which the adapters are better than the bare base."""


def find_weights(
    sources: Sequence[Source],
    loaded: Any,
    data: Sequence[str | DataSource],
    rows: int,
    options: LoraHubOptions,
    seed: int,
    advance: Advance,
) -> tuple[list[float], dict[str, Any]]:
    """(weights, {"search": ...}): the best of `budget` evaluations on the first `rows` rows of every file.

    A DataSource in `data` says its own rows.
    """
    if loaded is None or not data:
        raise LoramuxError(
            "lorahub searches weights on examples; give a base and data (task files)"
        )
    check_alike(sources, options)
    with Candidate(sources, loaded, data, rows, options) as candidate:
        found = search(candidate.objective, len(sources), options, seed, advance)
        best = [float(weight) for weight in found["weights"]]
        record = {**found, "weights": best, "rows": candidate.num_rows}
    if not any(best):
        raise NothingBetterError(
            f"the search over {options.budget} evaluations found nothing better than the bare base (all weights 0); "
            "raise the budget, give more rows, or choose other adapters"
        )
    return best, {"search": record}


def check_alike(sources: Sequence[Source], options: LoraHubOptions) -> None:
    """Adding up A and B apart needs one shape and one scale."""
    if options.combine == "delta":
        return
    first = sources[0]
    for source in sources[1:]:
        same = source.ranks == first.ranks and all(
            abs(source.scales[path] - scale) <= 1e-9 * abs(scale)
            for path, scale in first.scales.items()
        )
        if not same:
            raise LoramuxError(
                f"{first.given} and {source.given} differ in targets, ranks or scale, so their factors cannot be "
                "added; use combine='delta', which takes any ranks"
            )


def search(
    objective: Objective, num: int, options: LoraHubOptions, seed: int, advance: Advance
) -> dict[str, Any]:
    """{"weights", "objective", "evaluations": [objective of each], "optimizer"}; the first evaluation is w = 0."""
    seen: list[float] = []
    best: tuple[float | None, list[float]] = (None, [0.0] * num)

    def evaluate(weights: Sequence[float]) -> float:
        nonlocal best
        value = objective(weights) + options.penalty * sum(abs(w) for w in weights) / num
        seen.append(value)
        if best[0] is None or value < best[0]:
            best = value, [float(w) for w in weights]
        advance("search")
        return value

    name = _optimizer(options)
    if options.budget > 0:
        run = _nevergrad if name == "nevergrad" else _evolve
        run(evaluate, num, options, seed)
    return {
        "weights": best[1],
        "objective": best[0],
        "evaluations": seen,
        "optimizer": name,
        "budget": options.budget,
    }


def _optimizer(options: LoraHubOptions) -> str:
    """Which one runs: nevergrad where it can be imported, else the built-in one."""
    if options.optimizer == "es":
        return "es"
    try:
        importlib.import_module("nevergrad")
    except ImportError as error:
        if options.optimizer == "nevergrad":
            raise LoramuxError(
                f"optimizer='nevergrad' cannot be used ({error}); install it with: pip install nevergrad, or use 'es'"
            ) from None
        if not isinstance(error, ModuleNotFoundError):
            log.warning("nevergrad is there but cannot be imported (%s); using 'es'", error)
        return "es"
    return "nevergrad"


def _evolve(evaluate: Objective, num: int, options: LoraHubOptions, seed: int) -> None:
    """(1+1) evolution strategy: a normal step from the best so far, wider after a success, else narrower."""
    draws = np.random.default_rng(seed)
    here = np.zeros(num)
    value, step = evaluate(here.tolist()), FIRST_STEP * options.bound
    for _ in range(options.budget - 1):
        there = np.clip(here + step * draws.standard_normal(num), -options.bound, options.bound)
        found = evaluate(there.tolist())
        if found < value:
            here, value, step = there, found, step * GROW
        else:
            step *= SHRINK


def _nevergrad(evaluate: Objective, num: int, options: LoraHubOptions, seed: int) -> None:
    """NGOpt, as the published code uses it."""
    import nevergrad

    evaluate([0.0] * num)
    if options.budget < 2:
        return
    weights = nevergrad.p.Array(init=np.zeros(num)).set_bounds(-options.bound, options.bound)
    weights.random_state.seed(seed)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=weights, budget=options.budget - 1)
    for _ in range(options.budget - 1):
        asked = optimizer.ask()
        optimizer.tell(asked, evaluate(asked.value.tolist()))


class Candidate:
    """One plain adapter on the base, rewritten for every weight vector, and the few-shot loss under it."""

    def __init__(
        self,
        sources: Sequence[Source],
        loaded: Any,
        data: Sequence[str | DataSource],
        rows: int,
        options: LoraHubOptions,
    ):
        self.sources = list(sources)
        self.options = options
        self.model = loaded.model
        self.paths = union(sources)
        self.batches, self.num_rows = _batches(loaded, data, rows)
        self.handle = _attached(loaded.model, self._merged([1.0] * len(sources)))

    def __enter__(self) -> Candidate:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.detach()

    @torch.no_grad()
    def objective(self, weights: Sequence[float]) -> float:
        """The few-shot loss, without the penalty on the weights."""
        rows = self.handle.adapters["candidate"].rows
        for path, merged in self._merged(weights).items():
            rows[path].a.data.copy_(merged.a)
            rows[path].b.data.copy_(merged.b)
        return self._loss()

    def _merged(self, weights: Sequence[float]) -> dict[str, Merged]:
        return {
            path: merge(parts_at(self.sources, path, weights), self.options, 0)
            for path in self.paths
        }

    def _loss(self) -> float:
        from loramux.train.loss import SupervisedForward

        forward = SupervisedForward(self.model)
        sums: list[tuple[float, int]] = []
        with forward.hooked():
            for batch in self.batches:
                total, count = forward(batch)
                sums.append((float(total), count))
        if self.options.loss_norm == "lorahub":
            return sum(total / count for total, count in sums) / self.num_rows
        return sum(total for total, _ in sums) / sum(count for _, count in sums)


def _batches(loaded: Any, data: Sequence[str | DataSource], rows: int) -> tuple[list[Any], int]:
    from loramux.data import load_examples
    from loramux.data.collate import collate
    from loramux.recipe import DataSource

    sources = [
        given if isinstance(given, DataSource) else DataSource(path=str(given), rows=rows)
        for given in data
    ]
    examples = [one for source in sources for one in load_examples(source, loaded.tokenizer)]
    pad = loaded.tokenizer.pad_token_id
    pad = loaded.tokenizer.eos_token_id if pad is None else pad
    parts = [examples[at : at + BATCH_SIZE] for at in range(0, len(examples), BATCH_SIZE)]
    return [collate(part, pad) for part in parts], len(examples)


def _attached(model: Any, merged: dict[str, Merged]) -> Any:
    """A plain adapter with these rows, attached."""
    from loramux.api import Handle
    from loramux.core.adapter import Adapter
    from loramux.core.bank import Rows
    from loramux.core.sites import find_sites
    from loramux.methods.lora import LoraConfig, LoraMethod
    from loramux.ops.contract import Spans

    sites = find_sites(model)
    found = {site.path: site for site in sites if site.path in merged}
    rows = {
        path: Rows(Spans.packed([m.rank], [1.0]), m.a.float().clone(), m.b.float().contiguous())
        for path, m in merged.items()
    }
    config = LoraConfig(target_modules=tuple(found))
    ordered = {path: rows[path] for path in found}
    handle = Handle(model, sites)
    handle.put(Adapter("candidate", LoraMethod(config), found, ordered, {}))
    return handle
