"""The Qdrant index behind the same interface: same candidates, same scores, filters inside the query.

Each claim on qdrant-client's local mode and on Qdrant's own engine, which every request reaches through its JSON.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic_core import PydanticSerializationError

from loramux.bench.qdrant_edge import UntranslatedError
from loramux.errors import MissingExtraError
from loramux.retrieval.background import Query
from loramux.retrieval.errors import ProfileError, RetrievalError
from loramux.retrieval.exact import ExactIndex
from loramux.retrieval.index import Entry, Scored
from loramux.retrieval.qdrant import QdrantIndex
from loramux.retrieval.qdrant_scores import best_of, in_both
from loramux.retrieval.rank import Ranking, hybrid, moments_of, top
from loramux.retrieval.retriever import Retriever
from loramux.retrieval.text import Sparse
from loramux.retrieval.where import EVERYTHING, Where
from retrieval.edge import DATABASES, database
from retrieval.pools import DIM, random_entries, random_profile, random_query

pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
NUM = 80
CONDITIONS = int(os.environ.get("LORAMUX_QDRANT_CONDITIONS", "40"))


@pytest.fixture(params=DATABASES)
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return database(request.param, tmp_path)


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    return database("engine", tmp_path)


def both(
    client: Any, dim: int | None = DIM, num: int = NUM, **more: Any
) -> tuple[ExactIndex, QdrantIndex]:
    """The exact index and one in the database, of the same entries."""
    encoder = None if dim is None else "r"
    exact, qdrant = ExactIndex(encoder, dim), QdrantIndex(client, encoder, dim, **more)
    for index in (exact, qdrant):
        index.upsert(random_entries(num, dim=dim))
        index.refresh()
    return exact, qdrant


def some_profile(seed: int) -> Any:
    return random_profile(np.random.default_rng(seed))


def queries(num: int, dim: int | None = DIM) -> Iterator[Any]:
    return (random_query(np.random.default_rng(seed), dim) for seed in range(num))


def as_dict(scored: Scored) -> dict[str, tuple[float, float, str]]:
    dense = np.full(len(scored), np.nan) if scored.dense is None else scored.dense
    return {
        scored.id(i): (float(scored.lexical[i]), float(dense[i]), scored.owner(i))
        for i in range(len(scored))
    }


def check_same(found: Scored, expected: Scored) -> None:
    ours, theirs = as_dict(found), as_dict(expected)
    assert ours.keys() == theirs.keys()
    for id, (*scores, owner) in theirs.items():
        np.testing.assert_allclose(ours[id][:2], scores, atol=1e-5)
        assert ours[id][2] == owner


@pytest.mark.parametrize("dim", [DIM, None])
def test_candidates_and_scores_are_those_of_the_exact_index(client: Any, dim: int | None) -> None:
    exact, qdrant = both(client, dim)
    words = some_profile(7).lexical_only()
    for index in (exact, qdrant):
        index.upsert([Entry("words", words, "tenant1", {"base": "base0"})])
    some = {entry.id for entry in random_entries(NUM)[::5]}
    mine = Where.visible_to("tenant1", "base0")
    cases = [(EVERYTHING, None), (mine, None), (EVERYTHING, some), (mine, some)]
    for query, (where, ids) in zip(queries(len(cases), dim), cases, strict=True):
        check_same(qdrant.search(query, where, ids), exact.search(query, where, ids))
        assert qdrant.ids(where) == exact.ids(where) and qdrant.count(where) == exact.count(where)


def test_no_condition_lets_anything_else_through(client: Any) -> None:
    exact, qdrant = both(client)
    draw, entries = random.Random(0), random_entries(NUM)
    marks = sorted({mark for entry in entries for mark in entry.marks})
    query = next(queries(1))
    for _ in range(CONDITIONS):
        num = draw.randrange(3)
        where = Where(tuple(tuple(draw.sample(marks, draw.randrange(4))) for _ in range(num)))
        some = {entry.id for entry in draw.sample(entries, draw.randrange(NUM))}
        ids = draw.choice((None, some, frozenset()))
        found = qdrant.search(query, where, ids)
        allowed = {e.id for e in entries if where.holds(e.marks) and (ids is None or e.id in ids)}
        assert set(as_dict(found)) == allowed == set(as_dict(exact.search(query, where, ids)))
        assert qdrant.count(where) == exact.count(where)


def test_a_clause_without_marks_holds_for_nothing(client: Any) -> None:
    qdrant, nothing = both(client)[1], Where(((),))
    assert len(qdrant.search(next(queries(1)), nothing)) == 0
    assert qdrant.count(nothing) == 0 and qdrant.ids(nothing) == []


def test_a_tag_may_be_called_anything_that_a_path_can_say(client: Any) -> None:
    exact, qdrant = ExactIndex("r", DIM), QdrantIndex(client, "r", DIM)
    entry = Entry("x", some_profile(0), "me", {"team.name": "a", "a[0] b": ("b", "c"), "": "d"})
    for index in (exact, qdrant):
        index.upsert([entry])
        for key, value in sorted(entry.marks):
            assert index.ids(Where().tagged(**{key: value})) == ["x"]
        assert index.ids(Where().tagged(team="a")) == []
    for key in ('"', "\\"):
        with pytest.raises(RetrievalError, match="neither quotes nor backslashes"):
            qdrant.upsert([entry, Entry("y", entry.profile, "me", {key: "d"})])
        with pytest.raises(RetrievalError, match="neither quotes nor backslashes"):
            qdrant.ids(Where().tagged(**{key: "d"}))
    assert qdrant.count() == 1


def test_a_retriever_gives_the_same_hits_with_either(client: Any) -> None:
    pair = both(client)
    for ranking in (Ranking(), Ranking(per_owner=1), Ranking(max_nearness=0.5)):
        retrievers = [Retriever(index, ranking=ranking) for index in pair]
        for query in queries(3):
            one, two = (
                r.retrieve(query, 5, allowed=Where().tagged(base="base1")) for r in retrievers
            )
            assert one.ids == two.ids


def test_of_many_candidates_the_best_come_back_with_the_scores_that_all_would_give(
    client: Any,
) -> None:
    exact, qdrant = both(client, shortlist=12)
    for query in queries(5):
        found, every = qdrant.search(query), exact.search(query)
        assert 12 <= len(found) <= 36 and len(every) == NUM
        ours = dict(zip(as_dict(found), hybrid(found), strict=True))
        theirs = dict(zip(as_dict(every), hybrid(every), strict=True))
        for id, score in ours.items():
            assert score == pytest.approx(theirs[id], abs=1e-4)
        one, two = (Retriever(i).retrieve(query, 3, allowed=EVERYTHING) for i in (exact, qdrant))
        assert one.ids == two.ids


def test_of_a_large_pool_the_moments_are_those_of_all_by_the_best_and_a_sample(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux.retrieval.qdrant.SAMPLE", 120)
    exact, qdrant = both(client, num=160, shortlist=10, whole=60)
    for query in queries(4):
        found, every = qdrant.search(query), exact.search(query)
        known, scores = as_dict(every), dict(zip(as_dict(every), hybrid(every), strict=True))
        for id, (lexical, dense, owner) in as_dict(found).items():
            np.testing.assert_allclose((lexical, dense), known[id][:2], atol=1e-5)
            assert owner == known[id][2]
        assert found.moments is not None and every.dense is not None
        for ours, column in zip(found.moments, (every.lexical, every.dense), strict=True):
            mean, spread = moments_of(column)
            assert ours[0] == pytest.approx(mean, abs=0.1 * spread)
            assert ours[1] == pytest.approx(spread, rel=0.1)
        best = [found.id(i) for i in top(found, hybrid(found), 3)]
        assert {max(known, key=lambda id: known[id][0]), max(scores, key=scores.__getitem__)} <= {
            found.id(i) for i in range(len(found))
        }
        assert best[0] == max(scores, key=scores.__getitem__)


def test_what_is_best_by_both_comes_back_though_it_is_best_by_neither() -> None:
    scores = {"a": 0.9, "m": 0.8}, {"b": 0.9, "m": 0.8}
    assert best_of(scores, in_both(scores), 1) == ["a", "b", "m"]


def test_where_a_prompt_fits_nothing_candidates_come_back_all_the_same(client: Any) -> None:
    qdrant = both(client, None, shortlist=10, whole=60)[1]
    nothing = Query(Sparse(np.array([7], np.int32), np.ones(1, np.float32)), None)
    found = qdrant.search(nothing)
    assert len(found) == 10 and (found.lexical == 0).all() and found.dense is None


def test_a_small_shortlist_still_finds_the_best_of_a_small_tenant(client: Any) -> None:
    exact, qdrant = ExactIndex("r", DIM), QdrantIndex(client, "r", DIM, shortlist=8)
    mine = [Entry(f"me/{i}", some_profile(i), "me") for i in range(3)]
    for index in (exact, qdrant):
        index.upsert([*random_entries(NUM), *mine])
        index.refresh()
    for query in queries(5):
        one, two = (
            Retriever(index).retrieve(query, 10, allowed=Where().tagged(owner="me"))
            for index in (exact, qdrant)
        )
        assert one.ids == two.ids and len(one.ids) == 3


def test_exact_search_misses_nothing_where_the_engine_has_built_its_graph(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, qdrant = both(engine, num=300, shortlist=20, whole=50)
    assert engine.optimize("loramux") >= 300
    asked: list[bool] = []
    ask = engine.query_points

    def asking(name: str, **what: Any) -> Any:
        if what["using"] == "dense":
            asked.append(what["search_params"].exact)
        return ask(name, **what)

    monkeypatch.setattr(engine, "query_points", asking)
    where = Where().tagged(base="base1")
    for query in queries(10):
        every, found = exact.search(query, where), as_dict(qdrant.search(query, where))
        assert every.dense is not None and len(every) == 150
        nearest = np.argsort(-every.dense)[:20]
        assert {every.id(int(i)) for i in nearest} <= found.keys()
    assert asked == 20 * [True]
    qdrant.exact = False
    qdrant.search(next(queries(1)), where)
    assert asked[20:] == [False, True]  # what the graph gave is scored exactly


def test_the_engine_makes_an_index_of_each_mark_that_rights_are_made_of(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # a first start that is stopped before this step
        patch.setattr(engine, "create_payload_index", lambda *_: None)
        both(engine)
    QdrantIndex(engine, "r", DIM)
    schema = engine.shards["loramux"].info().payload_schema
    assert schema.keys() == {"marks.owner", "marks.base", "marks.readers"}
    assert schema["marks.owner"].params.is_tenant and schema["marks.owner"].points == NUM


def test_a_request_that_is_not_translated_or_cannot_travel_is_an_error(engine: Any) -> None:
    from qdrant_client import models

    both(engine)
    there = models.Filter(must=[models.IsEmptyCondition(is_empty=models.PayloadField(key="id"))])
    with pytest.raises(UntranslatedError, match="only marks, ids and filters"):
        engine.count("loramux", count_filter=there)
    point = models.PointStruct(id=1, vector={}, payload={"size": np.float32(1)})
    with pytest.raises(PydanticSerializationError, match="float32"):
        engine.upsert("loramux", points=[point], wait=True)


def test_the_bench_finds_nothing_missed_in_a_small_pool(
    engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from loramux.bench.retrieval_qdrant import main

    assert main(["--adapters", "120", "--queries", "1"]) == 0
    first, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["adapters"] == 120 and len(rows) == 4
    assert all(row["nearest"]["least"] == row["hits"]["least"] == 1.0 for row in rows)


def test_deleted_and_replaced_entries(client: Any) -> None:
    exact, qdrant = both(client)
    entries = random_entries(NUM)
    gone, changed = entries[0], entries[1]
    for index in (exact, qdrant):
        assert index.delete([]) == 0
        assert index.delete([gone.id, "never there", gone.id]) == 1
        index.upsert([Entry(changed.id, some_profile(99), "other")])
        assert index.count() == NUM - 1 and gone.id not in index.ids()
        assert index.count(Where().tagged(owner="other")) == 1
    query = next(queries(1))
    check_same(qdrant.search(query), exact.search(query))
    asked = [entries[2].id, gone.id, changed.id]
    np.testing.assert_allclose(qdrant.nearness(asked), exact.nearness(asked), atol=1e-5)


def test_more_entries_than_one_request_takes(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("qdrant", "qdrant_collection"):
        monkeypatch.setattr(f"loramux.retrieval.{module}.PAGE", 7)
    monkeypatch.setattr("loramux.retrieval.qdrant_collection.SMALL_PAGE", 9)
    exact, qdrant = both(client)
    query = next(queries(1))
    check_same(qdrant.search(query), exact.search(query))
    assert qdrant.ids() == exact.ids()
    one, two = (index.profiles(30) for index in (exact, qdrant))
    for a, b in zip(one, two, strict=True):
        assert (a.lexical.buckets == b.lexical.buckets).all()
    some = exact.ids()[:20]
    np.testing.assert_allclose(qdrant.nearness(some), exact.nearness(some), atol=1e-5)
    assert qdrant.delete(some) == exact.delete(some) == 20 and qdrant.count() == NUM - 20


def test_a_refresh_brings_back_nothing_that_was_withdrawn_while_it_ran(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, qdrant = both(client)
    gone, unshared, *_ = random_entries(NUM)
    withdrawn = Entry(unshared.id, unshared.profile, "owner", {"readers": ()})
    read, passes = qdrant._collection.scroll, iter(("for the background", "to weigh anew"))

    def read_then_others_write(*given: Any) -> Iterator[Any]:
        last = next(passes) == "to weigh anew"
        for part in read(*given):
            if last:  # another host, after this one has read the points and before it writes them
                writer.delete([gone.id])
                writer.upsert([withdrawn])
            yield part

    writer = QdrantIndex(client, "r", DIM)
    monkeypatch.setattr(qdrant._collection, "scroll", read_then_others_write)
    background = qdrant.refresh()
    monkeypatch.undo()
    exact.delete([gone.id])
    exact.upsert([withdrawn])
    assert gone.id not in qdrant.ids() and qdrant.count() == NUM - 1
    assert qdrant.ids(Where().tagged(owner="owner")) == [unshared.id]
    assert unshared.id not in qdrant.ids(Where().tagged(readers="*"))
    assert background is qdrant.background


def test_an_error_of_the_database_is_not_taken_for_a_deleted_point(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    qdrant = both(client)[1]

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(client, "update_vectors", refuse)
    with pytest.raises(OSError, match="the disk is full"):
        qdrant.refresh()


def test_what_is_withdrawn_during_a_search_does_not_come_back(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    qdrant = both(client)[1]
    where = Where().tagged(base="base1")
    before = qdrant.ids(where)
    score = qdrant._collection.best

    def score_then_withdraw(*given: Any, **more: Any) -> Any:
        found = score(*given, **more)
        qdrant.delete(before[:1])
        qdrant.upsert([Entry(before[1], some_profile(1), "me", {"base": "base2"})])
        return found

    monkeypatch.setattr(qdrant._collection, "best", score_then_withdraw)
    found = qdrant.search(next(queries(1)), where)
    assert sorted(as_dict(found)) == before[2:]


def test_vectors_that_cannot_be_compared_are_refused(client: Any) -> None:
    index = QdrantIndex(client, "r", DIM)
    other = random_profile(np.random.default_rng(0), encoder_id="other")
    with pytest.raises(ProfileError, match="encoder 'other'"):
        index.upsert([Entry("x", other, "x")])
    assert index.count() == 0
    with pytest.raises(RetrievalError, match="made again from the registry"):
        index.snapshot("anywhere")


def test_a_collection_of_other_vectors_is_refused_at_the_start(client: Any) -> None:
    both(client)
    with pytest.raises(
        RetrievalError, match=r"width 16, this index wants width 8.*delete this one"
    ):
        QdrantIndex(client, "r", 8)
    with pytest.raises(RetrievalError, match=r"of the encoder 'r', this index wants those of 's'"):
        QdrantIndex(client, "s", DIM)
    assert QdrantIndex(client).count() == NUM  # by words alone any will do
    with pytest.raises(RetrievalError, match="at most whole, got 9 and 8"):
        QdrantIndex(client, shortlist=9, whole=8)
    with pytest.raises(RetrievalError, match="an encoder's id and its width, or neither"):
        QdrantIndex(client, "r")


def test_a_second_client_finds_what_the_first_wrote(client: Any) -> None:
    qdrant = both(client)[1]
    again = QdrantIndex(client, "r", DIM)
    query = next(queries(1))
    check_same(again.search(query), qdrant.search(query))


def test_a_missing_client_says_which_extra_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "qdrant_client", None)
    with pytest.raises(MissingExtraError, match=r"loramux\[qdrant\]"):
        QdrantIndex.connect(":memory:")
