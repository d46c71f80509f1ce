"""The exact index: equal to brute force, filters first, and unmoved by what is added to others."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from loramux.retrieval import snapshot as snapshots
from loramux.retrieval.background import Background, Query
from loramux.retrieval.errors import ProfileError, RetrievalError
from loramux.retrieval.exact import ExactIndex
from loramux.retrieval.index import Entry, Index, Scored
from loramux.retrieval.profile import Profile, make_profile
from loramux.retrieval.rank import hybrid, top
from loramux.retrieval.retriever import Retriever
from loramux.retrieval.text import NUM_BUCKETS, Sparse, bucket_of, words
from loramux.retrieval.where import EVERYTHING, Where
from oracles import lora_retriever as oracle
from retrieval.pools import (
    DIM,
    TOPICS,
    WordEncoder,
    random_entries,
    random_profile,
    random_query,
    samples,
    topic_profiles,
)


def filled(entries: list[Entry], dim: int | None = DIM) -> ExactIndex:
    index = ExactIndex(None if dim is None else "r", dim)
    index.upsert(entries)
    index.refresh()
    return index


def brute_force(index: Index, entries: list[Entry], query: Query) -> dict[str, tuple[float, float]]:
    """Both cosines of every entry, each in float64 from dense vectors."""
    background = index.background
    step = NUM_BUCKETS // 500  # only every so many buckets is used by random profiles
    idf = background.idf[::step].astype(np.float64)

    def spread(sparse: Sparse) -> np.ndarray:
        found = np.zeros(len(idf))
        found[sparse.buckets // step] = sparse.values
        return found * idf

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    mean = background.mean.astype(np.float64)
    prompt = spread(query.lexical)
    return {
        e.id: (
            cosine(prompt, spread(e.profile.lexical)),
            cosine(query.dense - mean, e.profile.dense / np.linalg.norm(e.profile.dense) - mean),
        )
        for e in entries
    }


def buckets_of(text: str) -> list[tuple[int, int]]:
    found = words(text)
    terms = [*found, *(f"{a} {b}" for a, b in pairwise(found))]
    return sorted(Counter(bucket_of(term) for term in terms).items())


def as_dict(scored: Scored) -> dict[str, tuple[float, float]]:
    assert scored.dense is not None
    return {
        scored.id(i): (float(scored.lexical[i]), float(scored.dense[i])) for i in range(len(scored))
    }


CONDITIONS = {
    "everything": EVERYTHING,
    "one tenant": Where.visible_to("tenant3"),
    "one tenant and base": Where.visible_to("tenant1", "base1"),
    "nobody's": Where().tagged(base="other"),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_scores_equal_brute_force_with_and_without_a_condition(name: str) -> None:
    entries, where = random_entries(300), CONDITIONS[name]
    index = filled(entries)
    draw = np.random.default_rng(1)
    wanted = [entry for entry in entries if where.holds(entry.marks)]
    for query in [random_query(draw) for _ in range(3)]:
        found = as_dict(index.search(query, where))
        expected = brute_force(index, wanted, query)
        assert found.keys() == expected.keys()
        for id, values in expected.items():
            np.testing.assert_allclose(found[id], values, atol=1e-5)


def test_ten_thousand_vectors_are_ranked_as_brute_force_ranks_them() -> None:
    entries = random_entries(10_000, dim=8)
    index = filled(entries, dim=8)
    directions = np.stack([e.profile.direction for e in entries])
    mean = index.background.mean
    centred = directions - mean
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    draw = np.random.default_rng(2)
    for where in (EVERYTHING, Where.visible_to("tenant7", "base0")):
        rows = [i for i, e in enumerate(entries) if where.holds(e.marks)]
        query = random_query(draw, 8)
        expected = centred[rows] @ query.centred(index.background)
        scored = index.search(query, where)
        assert sorted(scored.id(i) for i in range(len(scored))) == sorted(
            entries[r].id for r in rows
        )
        best = top(scored, scored.dense, 10)
        order = np.argsort(-expected, kind="stable")[:10]
        np.testing.assert_allclose(scored.dense[best], expected[order], atol=1e-5)
        assert [scored.id(i) for i in best] == [entries[rows[r]].id for r in order]


def test_few_and_many_candidates_are_scored_alike_to_the_last_bit() -> None:
    entries = random_entries(400)
    index = filled(entries)
    query = random_query(np.random.default_rng(3))
    everything = as_dict(index.search(query))
    some = frozenset(entry.id for entry in entries[::37])
    few = as_dict(index.search(query, ids=some))
    assert few == {id: everything[id] for id in some}


def test_lexical_scores_are_the_cosines_of_a_real_vocabulary() -> None:
    def terms(text: str) -> list[str]:
        # By bucket: two terms of one bucket are one term for both.
        return [str(bucket) for bucket, n in buckets_of(text) for _ in range(n)]

    retriever = Retriever(refresh_at=None)
    pools = [samples(topic) for topic in TOPICS]
    for topic, pool in zip(TOPICS, pools, strict=True):
        # Drawn already: the oracle must see the same texts.
        retriever.upsert(topic, make_profile(pool), owner="x")
    retriever.refresh()
    for prompt in ("which river has a bridge and water", "white mates the queen", "yeast and salt"):
        expected = oracle.tfidf_cosines(prompt, pools, terms)
        found = retriever.retrieve(prompt, 5, allowed=EVERYTHING)
        for hit in found.hits:
            assert hit.lexical == pytest.approx(expected[list(TOPICS).index(hit.id)], abs=1e-5)


def test_dense_scores_are_cosines_with_renormalised_means() -> None:
    encoder = WordEncoder()
    index = ExactIndex(encoder.id, DIM)
    index.upsert([Entry(t, p, "x") for t, p in topic_profiles(encoder).items()])
    prompt = encoder.encode(["the river has a bridge"])[0]
    scored = index.search(Query.of("the river", prompt))  # five adapters: no mean is subtracted
    pools = [encoder.encode(samples(topic)).astype(np.float64) for topic in TOPICS]
    expected = dict(zip(TOPICS, oracle.cosines(prompt.astype(np.float64), pools), strict=True))
    for i in range(len(scored)):
        assert float(scored.dense[i]) == pytest.approx(expected[scored.id(i)], abs=1e-5)
    assert scored.dense.min() >= -1 and scored.dense.max() <= 1


def test_repeating_one_text_scores_one_for_that_text() -> None:
    encoder = WordEncoder()
    retriever = Retriever(encoder=encoder)
    for topic, profile in topic_profiles(encoder).items():
        retriever.upsert(topic, profile, owner="x")
    text = "sort the words of this list"
    retriever.upsert("one", make_profile([text] * 20, encoder), owner="x")
    hit = retriever.retrieve(text, 1, allowed=EVERYTHING).hits[0]
    assert hit.id == "one"
    assert (hit.lexical, hit.dense) == (pytest.approx(1.0, abs=1e-5), pytest.approx(1.0, abs=1e-5))


class Louder(WordEncoder):
    """Vectors ten times as long for some texts."""

    def __init__(self, topic: str) -> None:
        super().__init__()
        self.loud = set(samples(topic))

    def encode(self, texts):  # type: ignore[no-untyped-def]
        found = super().encode(texts)
        return np.stack(
            [v * (10 if t in self.loud else 1) for t, v in zip(texts, found, strict=True)]
        )


def test_longer_sample_vectors_change_nothing() -> None:
    found = []
    for encoder in (WordEncoder(), Louder("chess")):
        index = ExactIndex(encoder.id, DIM)
        index.upsert([Entry(t, make_profile(samples(t), encoder), "x") for t in TOPICS])
        query = Query.of("the queen", WordEncoder().encode(["the queen"])[0])
        found.append(as_dict(index.search(query)))
    for id, values in found[0].items():
        np.testing.assert_allclose(found[1][id], values, atol=1e-6)


def test_the_published_baseline_favours_adapters_of_like_samples() -> None:
    index = ExactIndex("r", DIM, similarity="ip_raw")
    entries = random_entries(50)
    index.upsert(entries)
    query = random_query(np.random.default_rng(0))
    scored = index.search(query)
    for i in range(len(scored)):
        profile = next(e.profile for e in entries if e.id == scored.id(i))
        assert float(scored.dense[i]) == pytest.approx(float(profile.dense @ query.dense), abs=1e-5)


def test_adding_changes_no_other_score_and_removing_restores_every_bit() -> None:
    index = filled(random_entries(100))
    queries = [random_query(np.random.default_rng(i)) for i in range(5)]
    before = [as_dict(index.search(query)) for query in queries]
    index.upsert([Entry("new", random_profile(np.random.default_rng(9)), "x")])
    for query, old in zip(queries, before, strict=True):
        now = as_dict(index.search(query))
        assert now.pop("new")
        assert now == old
    assert index.delete(["new", "never there"]) == 1
    assert [as_dict(index.search(query)) for query in queries] == before


def test_a_deleted_id_stays_away_and_comes_back_with_its_new_vector() -> None:
    entries = random_entries(60)
    index = filled(entries)
    query = random_query(np.random.default_rng(0))
    gone = [entry.id for entry in entries[:40]]
    assert index.delete(gone) == 40
    assert index.count() == 20 == len(index.search(query))
    assert not set(gone) & set(index.ids())
    other = replace(entries[0], profile=random_profile(np.random.default_rng(77)))
    index.upsert([other])
    found = as_dict(index.search(query))[other.id]
    np.testing.assert_allclose(found, brute_force(index, [other], query)[other.id], atol=1e-5)


def test_pieces_added_one_by_one_score_like_all_at_once() -> None:
    entries = random_entries(200)
    whole, pieces = filled(entries), ExactIndex("r", DIM)
    for start in range(0, 200, 7):
        pieces.upsert(entries[start : start + 7])
        pieces.delete([entries[start].id])
        pieces.upsert([entries[start]])
    pieces.refresh()
    query = random_query(np.random.default_rng(4))
    first, second = as_dict(whole.search(query)), as_dict(pieces.search(query))
    assert first.keys() == second.keys()
    for id, values in first.items():
        np.testing.assert_allclose(second[id], values, atol=1e-6)


REFUSED: dict[str, tuple[Callable[[], Profile], str]] = {
    "another encoder": (
        lambda: random_profile(np.random.default_rng(0), encoder_id="other"),
        "encoder 'other'",
    ),
    "another width": (lambda: random_profile(np.random.default_rng(0), dim=8), "8 dense values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_vectors_that_cannot_be_compared_are_refused_before_anything_changes(name: str) -> None:
    make, text = REFUSED[name]
    index = filled(random_entries(10))
    good = Entry("good", random_profile(np.random.default_rng(1)), "x")
    with pytest.raises(ProfileError, match=text) as error:
        index.upsert([good, Entry("bad", make(), "x")])
    assert error.value.code == "other_encoder"
    assert index.count() == 10


def test_an_adapter_without_a_dense_vector_is_judged_by_its_words() -> None:
    index = filled(random_entries(10))
    index.upsert([Entry("words only", random_profile(np.random.default_rng(1), None), "x")])
    scored = index.search(random_query(np.random.default_rng(2)))
    i = next(i for i in range(len(scored)) if scored.id(i) == "words only")
    assert np.isnan(scored.dense[i])
    assert hybrid(scored)[i] == scored.lexical[i]
    assert not np.isnan(hybrid(scored)).any()


@pytest.mark.parametrize("dim", [DIM, None])
def test_a_restored_snapshot_answers_alike(tmp_path: Path, dim: int | None) -> None:
    entries = random_entries(120, dim=dim)
    index = filled(entries, dim)
    index.upsert(random_entries(3, seed=5, dim=dim))  # after the background was made
    index.delete([entries[7].id])
    index.snapshot(tmp_path / "index")
    again = ExactIndex.restore(tmp_path / "index")
    assert again.ids() == index.ids()
    for seed, where in enumerate([EVERYTHING, Where.visible_to("tenant1")]):
        query = random_query(np.random.default_rng(seed), dim)
        one, two = index.search(query, where), again.search(query, where)
        first = {one.id(i): one.lexical[i] for i in range(len(one))}
        assert first == {two.id(i): two.lexical[i] for i in range(len(two))}
        assert sorted(one.owner(i) for i in range(len(one))) == sorted(
            two.owner(i) for i in range(len(two))
        )
    again.upsert(random_entries(2, seed=8, dim=dim))
    assert again.background.version == index.background.version
    ExactIndex().snapshot(tmp_path / "empty")
    assert ExactIndex.restore(tmp_path / "empty").count() == 0


def test_a_damaged_snapshot_is_refused(tmp_path: Path) -> None:
    index = filled(random_entries(5))
    index.snapshot(tmp_path / "index")
    data = (tmp_path / "index").read_bytes()
    for damaged in (b"", data[:-50], data.replace(b'"format": 1', b'"format": 9')):
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(RetrievalError, match="no snapshot"):
            ExactIndex.restore(tmp_path / "bad")
    with pytest.raises(RetrievalError, match="no snapshot"):
        ExactIndex.restore(tmp_path / "not there")
    assert snapshots.read_snapshot(tmp_path / "index")[2] == DIM


def test_searches_see_whole_states_while_another_thread_writes() -> None:
    """Entries come and go in pairs; no search sees half of a pair."""
    index = filled(random_entries(30))
    pairs = [
        [Entry(f"pair{i}{side}", random_profile(np.random.default_rng(i)), "x") for side in "ab"]
        for i in range(5)
    ]
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for pair in pairs:
                index.upsert(pair)
            for pair in pairs:
                index.delete([entry.id for entry in pair])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        query = random_query(np.random.default_rng(0))
        for _ in range(15):
            found = as_dict(index.search(query))
            seen = sorted(id for id in found if id.startswith("pair"))
            assert len(seen) % 2 == 0
            for a, b in zip(seen[::2], seen[1::2], strict=True):
                assert found[a] == found[b]
    finally:
        stop.set()
        writer.join()


def test_a_background_of_a_small_pool_subtracts_nothing() -> None:
    assert (Background.empty(4).mean == 0).all()
    index = filled(random_entries(5))
    assert (index.background.mean == 0).all()
    assert (filled(random_entries(8)).background.mean != 0).any()
