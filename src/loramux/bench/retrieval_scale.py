"""A pool of 100,000 adapters: CPU time of a hybrid search, recall against brute force, and that nothing leaks.

    python -m loramux.bench.retrieval_scale --adapters 100000 --calls 100000

Why made up: nobody has 100,000 real adapters at hand. Profiles have the length of real ones (about 450 buckets), words
follow Zipf's law, so the commonest are in every adapter, and tenants are of Zipf size. Encoding a prompt is not timed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loramux.retrieval.background import Query
from loramux.retrieval.exact import ExactIndex
from loramux.retrieval.index import Entry
from loramux.retrieval.profile import Profile
from loramux.retrieval.rank import standardised
from loramux.retrieval.retriever import Retriever
from loramux.retrieval.text import NUM_BUCKETS, Sparse, unit
from loramux.retrieval.where import EVERYTHING, Where

DIM = 384
WORDS_PER_ADAPTER = 520  # drawn with repetition; about 450 differ
WORDS_PER_PROMPT = 100
CHUNK = 1000
ENCODER = "made-up-384"


@dataclass(frozen=True)
class Pool:
    entries: list[Entry]
    retriever: Retriever


class Words:
    """Buckets by Zipf's law: the rank of a word decides how often it is drawn."""

    def __init__(self, draw: np.random.Generator) -> None:
        self._draw = draw
        shares = 1.0 / (np.arange(NUM_BUCKETS) + 20.0)
        self._edges = np.cumsum(shares / shares.sum())
        self._bucket_of = draw.permutation(NUM_BUCKETS).astype(np.int32)

    def sparse(self, num: int) -> Sparse:
        ranks = np.searchsorted(self._edges, self._draw.random(num))
        buckets, counts = np.unique(
            self._bucket_of[np.minimum(ranks, NUM_BUCKETS - 1)], return_counts=True
        )
        return Sparse(buckets, unit(1.0 + np.log(counts)))


def make_entries(num: int, seed: int = 0, dim: int = DIM) -> Iterator[Entry]:
    """Adapters of about num / 100 tenants, some shared with all."""
    draw = np.random.default_rng(seed)
    words = Words(draw)
    centres = draw.standard_normal((48, dim)).astype(np.float32)
    owners = np.minimum(draw.zipf(1.3, num), max(2, num // 100))
    for i in range(num):
        lexical = words.sparse(WORDS_PER_ADAPTER)
        seen = np.minimum(20, 1 + (lexical.values * 100)).astype(np.uint16)
        # Mixed from few centres, so that many are near each other.
        mixed = draw.dirichlet([0.3] * 3) @ centres[draw.integers(0, 48, 3)]
        dense = 0.8 * unit(mixed + 0.5 * draw.standard_normal(dim))
        profile = Profile(lexical, seen, dense.astype(np.float32), ENCODER, 20)
        owner = f"tenant{owners[i]}"
        readers = ("*",) if draw.random() < 0.02 else ()
        yield Entry(f"{owner}/a{i}@1", profile, owner, {"base": "one", "readers": readers})


def make_pool(num: int, seed: int = 0, dim: int = DIM) -> Pool:
    entries = list(make_entries(num, seed, dim))
    retriever = Retriever(ExactIndex(ENCODER, dim), refresh_at=None, reject_central=False)
    retriever.index.upsert(entries)
    retriever.refresh()
    return Pool(entries, retriever)


def make_queries(pool: Pool, num: int, seed: int = 1) -> list[Query]:
    """Prompts near some adapter: most of their words and their direction are its own."""
    draw = np.random.default_rng(seed)
    found = []
    for i in draw.integers(0, len(pool.entries), num):
        profile = pool.entries[i].profile
        assert profile.dense is not None
        size = min(WORDS_PER_PROMPT, len(profile.lexical.buckets))
        share = profile.lexical.values / profile.lexical.values.sum()
        kept = np.sort(draw.choice(len(share), size, replace=False, p=share))
        lexical = Sparse(profile.lexical.buckets[kept], unit(np.ones(size)))
        noise = draw.standard_normal(len(profile.dense)) * 0.05
        found.append(Query(lexical, unit(unit(profile.dense) + noise)))
    return found


def brute_force(pool: Pool, query: Query, where: Where) -> list[tuple[float, str]]:
    """Hybrid scores of every fitting entry, one by one in float64; best first."""
    background = pool.retriever.background
    assert background.mean is not None and query.dense is not None
    idf, mean = background.idf.astype(np.float64), background.mean.astype(np.float64)
    table = np.zeros(NUM_BUCKETS)
    table[query.lexical.buckets] = query.lexical.values * idf[query.lexical.buckets]
    length = np.linalg.norm(table)
    prompt = query.dense - mean
    found = []
    for entry in (e for e in pool.entries if where.holds(e.marks)):
        lexical, direction = entry.profile.lexical, entry.profile.direction
        assert direction is not None
        weighted = lexical.values * idf[lexical.buckets]
        words = (table[lexical.buckets] @ weighted) / (length * np.linalg.norm(weighted))
        away = direction - mean
        found.append(
            (words, prompt @ away / (np.linalg.norm(prompt) * np.linalg.norm(away)), entry.id)
        )
    both = np.array([row[:2] for row in found])
    if len(found) >= 50:
        both = np.stack([standardised(column.astype(np.float32)) for column in both.T], axis=1)
    return sorted(
        zip(both.mean(1).tolist(), (row[2] for row in found), strict=True),
        key=lambda p: (-p[0], p[1]),
    )


def recall(pool: Pool, queries: Sequence[Query], k: int = 10) -> tuple[float, float]:
    """Share of brute force's top k that was found under a tenant's filter, and the largest difference of a score."""
    draw = random.Random(2)
    hits, total, worst = 0, 0, 0.0
    for query in queries:
        where = Where.visible_to(draw.choice(pool.entries).owner, "one")
        expected = brute_force(pool, query, where)[:k]
        found = pool.retriever.retrieve(query, k, allowed=where)
        limit = expected[-1][0] - 1e-4  # a near tie at the end may fall either way
        known = {id: score for score, id in brute_force(pool, query, where)}
        hits += sum(known.get(hit.id, -9.0) >= limit for hit in found.hits)
        total += len(expected)
        worst = max(worst, *(abs(known[hit.id] - hit.score) for hit in found.hits))
    return hits / total, worst


def leaks(num: int, calls: int, seed: int = 3) -> int:
    """Calls that returned something outside what was allowed, with random conditions and sets of ids."""
    pool = make_pool(num, seed, 16)
    draw = random.Random(seed)
    queries = make_queries(pool, 50, seed)
    ids = [entry.id for entry in pool.entries]
    marks = {entry.id: entry.marks for entry in pool.entries}
    owners = sorted({entry.owner for entry in pool.entries})
    wrong = 0
    for call in range(calls):
        query, k = queries[call % len(queries)], 1 + call % 5
        if call % 2:
            where = Where.visible_to(draw.choice(owners), draw.choice(("one", "two", None)))
            found = pool.retriever.retrieve(query, k, allowed=where)
            wrong += not all(where.holds(marks[id]) for id in found.ids)
        else:
            allowed = set(draw.sample(ids, draw.randrange(0, 30)))
            found = pool.retriever.retrieve(query, k, allowed=allowed)
            wrong += not set(found.ids) <= allowed
    return wrong


def cpu_ms(call: Callable[[Query], Any], queries: Sequence[Query]) -> dict[str, float]:
    """Milliseconds of this process's CPU time per call."""
    times: list[float] = []
    for query in queries:
        start = time.process_time()
        call(query)
        times.append(1e3 * (time.process_time() - start))
    found: NDArray[np.float64] = np.array(times)
    return {
        "mean_ms": round(float(found.mean()), 2),
        "p95_ms": round(float(np.quantile(found, 0.95)), 2),
        "max_ms": round(float(found.max()), 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    start = time.process_time()
    pool = make_pool(options.adapters)
    say(
        what="pool",
        adapters=options.adapters,
        cpu_s=round(time.process_time() - start, 1),
        **_size(pool),
    )
    queries = make_queries(pool, options.queries)
    retrieve = pool.retriever.retrieve
    retrieve(queries[0], 10, allowed=EVERYTHING)  # builds the postings
    say(what="all allowed", **cpu_ms(lambda q: retrieve(q, 10, allowed=EVERYTHING), queries))
    draw = random.Random(0)
    wheres = {id(q): Where.visible_to(draw.choice(pool.entries).owner, "one") for q in queries}
    say(what="one tenant", **cpu_ms(lambda q: retrieve(q, 10, allowed=wheres[id(q)]), queries))
    share, worst = recall(pool, queries[: options.checked])
    say(
        what="recall under a tenant's filter",
        queries=options.checked,
        recall=share,
        worst_score=worst,
    )
    if options.calls:
        found = leaks(500, options.calls)
        say(what="outside the allowed", calls=options.calls, found=found)
        return int(found > 0)
    return 0


def _size(pool: Pool) -> dict[str, Any]:
    sizes = [len(entry.profile.lexical.buckets) for entry in pool.entries]
    owners = len({entry.owner for entry in pool.entries})
    return {"buckets_per_adapter": round(float(np.mean(sizes))), "tenants": owners}


def say(**row: Any) -> None:
    """One row of the report, as JSON."""
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loramux.bench.retrieval_scale")
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=100, help="timed searches")
    parser.add_argument(
        "--checked", type=int, default=20, help="searches compared with brute force"
    )
    parser.add_argument("--calls", type=int, default=0, help="random calls that must not leak")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
