"""`compose_adapters`: read, check, merge linear by linear, measure, write.

What comes out is an ordinary PEFT adapter: it can be loaded, served, merged again. `compose.json` beside it says which
adapters went in with which weights, what each linear's rank and error are, and how alike the inputs were.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loramux.compose.algebra import distance, norm, stack
from loramux.compose.mergers import load_merger
from loramux.compose.parts import Merged, Merger, Part
from loramux.compose.similarity import similarity
from loramux.compose.sources import Source, parts_at, read_sources, union
from loramux.compose.write import (
    PROVENANCE,
    check_out,
    joint_record,
    merged_tensors,
    versions,
    write_folder,
)
from loramux.core.values import check_booleans, check_whole, is_number
from loramux.errors import LoramuxError, suggest

if TYPE_CHECKING:
    from loramux.formats.tensors import AdapterTensors
    from loramux.recipe import DataSource

log = logging.getLogger(__name__)
MAX_SEED = 2**31
ROWS = 5  # of each file, where a search reads examples
Advance = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Composed:
    """The merged adapter, and what there is to say about it (JSON-able, what `compose.json` holds)."""

    tensors: AdapterTensors
    facts: dict[str, Any]
    record: dict[str, Any] | None


def compose_adapters(
    method: str,
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    lam: float = 1.0,
    seed: int = 0,
    base: Any = None,
    data: Sequence[str | DataSource] = (),
    rows: int | None = None,
    force: bool = False,
    advance: Advance | None = None,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Merge saved LoRAs of one base into one plain PEFT adapter in `out`; returns what `compose.json` there holds.

    method: a name of `compose.mergers`; its own options (rank, density, ...) are given by name, or as a mapping.
    weights: one per adapter, the method's default without. lam multiplies the merged change. base (folder, fetch name
    or hub id): also checks that the adapters belong to it; needed, with data (task files, the first `rows` (5) rows of
    each, or a DataSource that says its own rows), by methods that search.
    Raises LoramuxError (a ValueError) before anything is written.
    """
    start = time.perf_counter()
    merger = load_merger(method)
    folder = check_out(out, force, adapters)
    made = compose_tensors(
        merger,
        read_sources(adapters),
        weights=weights,
        lam=lam,
        seed=seed,
        base=base,
        data=data,
        rows=rows,
        advance=advance or _quiet,
        options={**(options or {}), **more},
    )
    made.facts["seconds"] = round(time.perf_counter() - start, 3)
    write_folder(folder, made.tensors, made.record, made.facts)
    return {"out": str(folder), **made.facts}


def compose_tensors(
    merger: Merger,
    sources: Sequence[Source],
    *,
    weights: Sequence[float] | None = None,
    lam: float = 1.0,
    seed: int = 0,
    base: Any = None,
    data: Sequence[str | DataSource] = (),
    rows: int | None = None,
    advance: Advance,
    options: Mapping[str, Any],
) -> Composed:
    """The merge without the disk."""
    chosen = make_options(merger, options)
    check_whole("seed", seed, least=0)
    if not is_number(lam):
        raise LoramuxError(f"lambda must be a finite number, got {lam!r}")
    if not merger.searches and (data or rows is not None):
        given = "data" if data else "rows"
        raise LoramuxError(
            f"{merger.name} reads no examples; leave out {given} (lorahub searches on them)"
        )
    model = _base_model(base, sources)
    search: dict[str, Any] = {}
    if merger.searches:
        from loramux.compose.search import find_weights

        if weights is not None or lam != 1:
            raise LoramuxError(
                f"{merger.name} finds the weights itself; leave out weights and lambda"
            )
        weights, search = find_weights(
            sources, model, data, ROWS if rows is None else rows, chosen, seed, advance
        )
    used = _weights(merger, sources, weights)
    merged, table = _merge_all(merger, sources, used, lam, chosen, seed, advance)
    paths = list(merged)
    _say_clamped(merger, chosen, table)
    facts = {
        "schema_version": 1,
        "method": merger.name,
        "title": merger.title,
        "paper": merger.paper,
        "servability": "static",
        "weights": list(used),
        "lambda": lam,
        "seed": seed,
        "options": dataclasses.asdict(chosen),
        "inputs": [_input(source) for source in sources],
        **_summary(table),
        "sites": table,
        "similarity": similarity(sources, paths),
        "versions": versions(),
        **search,
    }
    return Composed(merged_tensors(sources, merged), facts, _record(model, sources, paths))


def make_options(merger: Merger, given: Mapping[str, Any]) -> Any:
    """The method's options; what it does not know is refused with the nearest name."""
    known = [field.name for field in dataclasses.fields(merger.options)]
    for name in given:
        if name not in known:
            what = suggest(name, known) if known else "it has no options"
            raise LoramuxError(f"{merger.name} has no option {name!r}; {what}")
    made = merger.options(**given)
    check_booleans(made)
    return made


def merge_site(
    merger: Merger,
    sources: Sequence[Source],
    path: str,
    weights: Sequence[float],
    lam: float,
    options: Any,
    seed: int,
) -> Merged:
    """One linear: the method on its parts, times lambda."""
    parts = parts_at(sources, path, weights)
    return merger.merge(parts, options, site_seed(seed, path)).times(lam)


def site_seed(seed: int, path: str) -> int:
    """Every linear draws its own numbers, whichever other linears there are."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % MAX_SEED


@torch.no_grad()
def _merge_all(
    merger: Merger,
    sources: Sequence[Source],
    weights: Sequence[float],
    lam: float,
    options: Any,
    seed: int,
    advance: Advance,
) -> tuple[dict[str, Merged], list[dict[str, Any]]]:
    merged: dict[str, Merged] = {}
    table = []
    for path in union(sources):
        made = merge_site(merger, sources, path, weights, lam, options, seed)
        wanted = parts_at(sources, path, [lam * weight for weight in weights])
        table.append(
            {
                "site": path,
                "rank": made.rank,
                "error": made.error,
                "distance": _distance(made, wanted) if merger.sums else None,
            }
        )
        merged[path] = made
        advance(path)
    return merged, table


def _distance(made: Merged, parts: Sequence[Part]) -> float | None:
    """From the weighted sum, relative to it."""
    summed = stack(parts)
    size = norm(*summed)
    return distance((made.a, made.b), summed) / size if size > 0 else None


def _say_clamped(merger: Merger, options: Any, table: Sequence[Mapping[str, Any]]) -> None:
    wanted = getattr(options, "rank", None)
    fewer = [row for row in table if wanted is not None and row["rank"] < wanted]
    if fewer:
        log.warning(
            "%s: rank %d was asked for, but %d of %d linears have fewer ranks in all and keep what they have",
            merger.name,
            wanted,
            len(fewer),
            len(table),
        )


def _summary(table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ranks = [row["rank"] for row in table]
    errors = [row["error"] for row in table if row["error"] is not None]
    away = [row["distance"] for row in table if row["distance"] is not None]
    return {
        "rank": {"min": min(ranks), "max": max(ranks), "mean": sum(ranks) / len(ranks)},
        "error": {"mean": sum(errors) / len(errors), "max": max(errors)} if errors else None,
        "distance": {"mean": sum(away) / len(away), "max": max(away)} if away else None,
    }


def _weights(
    merger: Merger, sources: Sequence[Source], given: Sequence[float] | None
) -> list[float]:
    num = len(sources)
    if given is None:
        return [1.0 if merger.weights == "one" else 1.0 / num] * num
    if len(given) != num:
        raise LoramuxError(
            f"{len(given)} weights for {num} adapters; give one per adapter, in their order"
        )
    bad = [weight for weight in given if not is_number(weight)]
    if bad or (not merger.signed and any(weight <= 0 for weight in given)):
        allowed = "finite numbers" if merger.signed else "numbers above 0"
        raise LoramuxError(f"the weights of {merger.name} must be {allowed}, got {list(given)}")
    return [float(weight) for weight in given]


def _input(source: Source) -> dict[str, Any]:
    ranks = list(source.ranks.values())
    return {
        "name": source.name,
        "path": source.given,
        "digest": source.tensors.digest,
        "sites": len(ranks),
        "rank": {"min": min(ranks), "max": max(ranks)},
    }


def _base_model(base: Any, sources: Sequence[Source]) -> Any:
    """The base, loaded if it is a name, once every adapter is known to belong to it; None where none is given."""
    if base is None:
        return None
    from loramux.core.sites import find_sites
    from loramux.eval.loading import Loaded, load_model
    from loramux.persist.base import BaseIdentity
    from loramux.persist.rows import match_sites

    loaded = base if isinstance(base, Loaded) else load_model(base)
    identity = BaseIdentity(loaded.model)
    sites = find_sites(loaded.model)
    for source in sources:
        match_sites(sites, source.tensors, source.given)
        identity.check_record(Path(source.given), source.tensors.sites)
    return loaded


def _record(loaded: Any, sources: Sequence[Source], paths: Sequence[str]) -> dict[str, Any] | None:
    if loaded is None:
        return joint_record(sources, paths)
    from loramux.persist.base import BaseIdentity, base_record

    identity = BaseIdentity(loaded.model)
    name = getattr(loaded.model, "name_or_path", "") or ""
    return base_record(name, identity.sample(paths), identity.marks(paths))


def _quiet(_path: str) -> None:
    return None


__all__ = ["PROVENANCE", "Composed", "compose_adapters", "compose_tensors", "merge_site"]
