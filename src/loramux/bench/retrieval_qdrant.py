"""The Qdrant index on Qdrant's own engine against the exact index: what is missed, and what a search costs.

    python -m loramux.bench.retrieval_qdrant --adapters 100000

The pool is that of `retrieval_scale`. After `optimize` every segment over a server's thresholds has its graph (HNSW),
so `exact` and `graph` differ as they do there. The CPU time is that of engine and client together, in one process,
without JSON and HTTP; `engine_ms` is the engine's share. Recall is that of the exact index's own 256 best by meaning
(`nearest`) and of its 10 hits.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loramux.bench.qdrant_edge import EdgeClient
from loramux.bench.retrieval_scale import DIM, ENCODER, Pool, cpu_ms, make_pool, make_queries, say
from loramux.retrieval.background import Query
from loramux.retrieval.index import Scored
from loramux.retrieval.qdrant import SHORTLIST, WHOLE, QdrantIndex
from loramux.retrieval.retriever import Retriever
from loramux.retrieval.where import EVERYTHING, Where

K = 10
NEAR_TIE = 1e-4  # either of two scores that are this close may be the one that is left out


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    pool = make_pool(options.adapters)
    queries = make_queries(pool, options.queries)
    draw = random.Random(0)
    owners = {id(q): Where.visible_to(draw.choice(pool.entries).owner, "one") for q in queries}
    with tempfile.TemporaryDirectory() as folder:
        client = EdgeClient(Path(folder), through_json=False)
        index = _filled(pool, client)
        for allowed, wheres in (("all", {}), ("one tenant", owners)):
            for exact in (True, False):
                index.exact, index.whole = exact, options.whole
                before = client.engine_s
                row = _compared(pool, index, queries, wheres)
                # Each prompt is searched three times: for what is nearest, for the hits, for the time.
                spent = 1e3 * (client.engine_s - before) / (3 * len(queries))
                say(allowed=allowed, search=_how(exact), **row, engine_ms=round(spent, 2))
    return 0


def _how(exact: bool) -> str:
    return "exact" if exact else "graph"


def _filled(pool: Pool, client: EdgeClient) -> QdrantIndex:
    index = QdrantIndex(client, ENCODER, DIM)
    start = time.process_time()
    index.upsert(pool.entries)
    index.refresh()
    filled = time.process_time()
    indexed = client.optimize(index.collection)
    say(
        what="pool",
        adapters=len(pool.entries),
        written_and_refreshed_cpu_s=round(filled - start, 1),
        optimized_cpu_s=round(time.process_time() - filled, 1),
        indexed_vectors=indexed,
        segments=client.shards[index.collection].info().segments_count,
    )
    return index


def _compared(
    pool: Pool, index: QdrantIndex, queries: Sequence[Query], wheres: dict[int, Where]
) -> dict[str, Any]:
    """Recall of the shortlist and of the hits, and the cost; wheres: by the query's id, else everything."""
    ours = Retriever(index, refresh_at=None, reject_central=False)
    nearest, hits, sizes = [], [], []
    for query in queries:
        where = wheres.get(id(query), EVERYTHING)
        every = pool.retriever.index.search(query, where)
        sizes.append(len(every))
        nearest.append(_nearest_found(every, index.search(query, where)))
        hits.append(_hits_found(pool, ours, query, where))
    spent = cpu_ms(lambda q: ours.retrieve(q, K, allowed=wheres.get(id(q), EVERYTHING)), queries)
    return {
        "candidates": int(np.median(sizes)),
        "nearest": _said(nearest),
        "hits": _said(hits),
        **spent,
    }


def _nearest_found(every: Scored, found: Scored) -> float:
    """Share of the best by meaning that came back."""
    assert every.dense is not None
    best = np.argsort(-every.dense)[:SHORTLIST]
    there = {found.id(i) for i in range(len(found))}
    return float(np.mean([every.id(int(i)) in there for i in best]))


def _hits_found(pool: Pool, ours: Retriever, query: Query, where: Where) -> float:
    """Share of our hits that are as good as the exact index's."""
    expected = pool.retriever.retrieve(query, 4 * K, allowed=where).hits
    limit = expected[:K][-1].score - NEAR_TIE
    good = {hit.id for hit in expected if hit.score >= limit}
    return float(np.mean([id in good for id in ours.retrieve(query, K, allowed=where).ids]))


def _said(shares: Sequence[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(shares)), 4), "least": round(min(shares), 4)}


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loramux.bench.retrieval_qdrant")
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=40, help="searches compared and timed")
    parser.add_argument("--whole", type=int, default=WHOLE, help="that of QdrantIndex")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
