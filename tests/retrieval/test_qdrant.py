"""The Qdrant index behind the same interface: same candidates, same scores, filters inside the query."""

from __future__ import annotations

import numpy as np
import pytest

from loramux.errors import MissingExtraError
from loramux.retrieval.errors import ProfileError, RetrievalError
from loramux.retrieval.exact import ExactIndex
from loramux.retrieval.index import Entry, Scored
from loramux.retrieval.qdrant import QdrantIndex
from loramux.retrieval.rank import Ranking
from loramux.retrieval.retriever import Retriever
from loramux.retrieval.where import EVERYTHING, Where
from retrieval.pools import DIM, random_entries, random_profile, random_query

pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
NUM = 80


def both(dim: int | None = DIM) -> tuple[ExactIndex, QdrantIndex]:
    encoder = None if dim is None else "r"
    exact, qdrant = ExactIndex(encoder, dim), QdrantIndex.connect(":memory:", encoder, dim)
    for index in (exact, qdrant):
        index.upsert(random_entries(NUM, dim=dim))
        index.refresh()
    return exact, qdrant


@pytest.fixture(scope="module")
def pair() -> tuple[ExactIndex, QdrantIndex]:
    return both()


def as_dict(scored: Scored) -> dict[str, tuple[float, float, str]]:
    dense = np.zeros(len(scored)) if scored.dense is None else scored.dense
    return {
        scored.id(i): (float(scored.lexical[i]), float(dense[i]), scored.owner(i))
        for i in range(len(scored))
    }


@pytest.mark.parametrize("dim", [DIM, None])
def test_candidates_and_scores_are_those_of_the_exact_index(dim: int | None) -> None:
    exact, qdrant = both(dim)
    some = {entry.id for entry in random_entries(NUM)[::5]}
    for seed, (where, ids) in enumerate(
        [(EVERYTHING, None), (Where.visible_to("tenant1", "base0"), None), (EVERYTHING, some)]
    ):
        query = random_query(np.random.default_rng(seed), dim)
        expected, found = (
            as_dict(exact.search(query, where, ids)),
            as_dict(qdrant.search(query, where, ids)),
        )
        assert found.keys() == expected.keys()
        for id, (lexical, dense, owner) in expected.items():
            np.testing.assert_allclose(found[id][:2], (lexical, dense), atol=1e-5)
            assert found[id][2] == owner


def test_a_retriever_gives_the_same_hits_with_either(pair: tuple[ExactIndex, QdrantIndex]) -> None:
    for ranking in (Ranking(), Ranking(per_owner=1), Ranking(max_nearness=0.5)):
        retrievers = [Retriever(index, ranking=ranking) for index in pair]
        for seed in range(3):
            query = random_query(np.random.default_rng(seed))
            one, two = (
                r.retrieve(query, 5, allowed=Where().tagged(base="base1")) for r in retrievers
            )
            assert one.ids == two.ids


def test_a_small_shortlist_still_finds_the_best_of_a_small_tenant() -> None:
    qdrant = QdrantIndex.connect(":memory:", "r", DIM, shortlist=8)
    exact = ExactIndex("r", DIM)
    mine = [Entry(f"me/{i}", random_profile(np.random.default_rng(i)), "me") for i in range(3)]
    for index in (exact, qdrant):
        index.upsert([*random_entries(NUM), *mine])
        index.refresh()
    for seed in range(5):
        query = random_query(np.random.default_rng(seed))
        one, two = (
            Retriever(index).retrieve(query, 10, allowed=Where().tagged(owner="me"))
            for index in (exact, qdrant)
        )
        assert one.ids == two.ids and len(one.ids) == 3


def test_deleted_and_replaced_entries() -> None:
    exact, qdrant = both()
    entries = random_entries(NUM)
    gone, changed = entries[0], entries[1]
    for index in (exact, qdrant):
        assert index.delete([gone.id, "never there"]) == 1
        index.upsert([Entry(changed.id, random_profile(np.random.default_rng(99)), "other")])
        assert index.count() == NUM - 1 and gone.id not in index.ids()
        assert index.count(Where().tagged(owner="other")) == 1
    query = random_query(np.random.default_rng(1))
    expected, found = as_dict(exact.search(query)), as_dict(qdrant.search(query))
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(found[changed.id][:2], expected[changed.id][:2], atol=1e-5)


def test_vectors_that_cannot_be_compared_are_refused() -> None:
    index = QdrantIndex.connect(":memory:", "r", DIM)
    with pytest.raises(ProfileError, match="encoder 'other'"):
        index.upsert(
            [Entry("x", random_profile(np.random.default_rng(0), encoder_id="other"), "x")]
        )
    assert index.count() == 0
    with pytest.raises(RetrievalError, match="made again from the registry"):
        index.snapshot("anywhere")


def test_a_second_client_finds_what_the_first_wrote() -> None:
    qdrant = both()[1]
    again = QdrantIndex(qdrant._client, "r", DIM)
    query = random_query(np.random.default_rng(5))
    assert as_dict(again.search(query)) == as_dict(qdrant.search(query))


def test_a_missing_client_says_which_extra_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "qdrant_client", None)
    with pytest.raises(MissingExtraError, match=r"loramux\[qdrant\]"):
        QdrantIndex.connect(":memory:")
