"""The retriever: who is found, who never is, and when nobody is."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import numpy as np
import pytest

from loramux.retrieval.background import Query
from loramux.retrieval.calibrate import abstain_threshold, separation
from loramux.retrieval.errors import ProfileError, RetrievalError
from loramux.retrieval.exact import ExactIndex
from loramux.retrieval.index import Entry, Scored
from loramux.retrieval.profile import make_profile
from loramux.retrieval.rank import MIN_FOR_Z, Ranking, hybrid
from loramux.retrieval.retriever import Hit, Retrieved, Retriever
from loramux.retrieval.text import unit
from loramux.retrieval.weighing import mapping, weights
from loramux.retrieval.where import EVERYTHING, Where
from oracles import lora_retriever as oracle
from retrieval.pools import DIM, TOPICS, WordEncoder, random_entries, random_query, samples

CALLS = int(os.environ.get("LORAMUX_RETRIEVAL_CALLS", "600"))


@pytest.fixture
def topics() -> Retriever:
    encoder = WordEncoder(64)
    made = Retriever(encoder=encoder)
    made.upsert_all(Entry(t, make_profile(samples(t), encoder), f"by {t}") for t in TOPICS)
    return made


def random_pool(num: int, **options: object) -> Retriever:
    made = Retriever(ExactIndex("r", DIM), **options)  # type: ignore[arg-type]
    made.upsert_all(random_entries(num))
    return made


def test_each_prompt_finds_its_task(topics: Retriever) -> None:
    for topic in TOPICS:
        for prompt in samples(topic, 5, seed=1):
            found = topics.retrieve(prompt, 3, allowed=EVERYTHING)
            assert found.ids[0] == topic and len(found.hits) == 3 and not found.abstained


def test_without_an_encoder_words_alone_find_it() -> None:
    words = Retriever()
    for topic in TOPICS:
        words.upsert(topic, make_profile(samples(topic)), owner="x")
    hit = words.retrieve("mate with queen and knight", 1, allowed=EVERYTHING).hits[0]
    assert hit.id == "chess" and hit.dense is None and hit.score == hit.lexical


def test_nothing_outside_the_allowed_is_ever_returned() -> None:
    """Random pools that change, random conditions of every kind, random options."""
    draw = random.Random(0)
    retriever = random_pool(60)
    entries = {entry.id: entry for entry in random_entries(60)}
    ids = sorted(entries)
    queries = [random_query(np.random.default_rng(i)) for i in range(20)]
    rankings = [Ranking(), Ranking(per_owner=1), Ranking(dense_weight=0.0)]
    for call in range(CALLS):
        if call % 100 == 0:
            retriever.ranking = draw.choice(rankings)
            gone = draw.choice(ids)
            assert retriever.delete(gone)
            retriever.upsert(
                gone, entries[gone].profile, owner=entries[gone].owner, tags=entries[gone].tags
            )
        k, kind = draw.randrange(1, 8), draw.randrange(4)
        if kind == 0:
            fitting = set(draw.sample(ids, draw.randrange(60)))
            allowed: object = fitting | {"not here"}
        elif kind == 1:
            caller, base = f"tenant{draw.randrange(8)}", draw.choice([None, "base0", "base1"])
            allowed = Where.visible_to(caller, base)
            fitting = {
                e.id
                for e in entries.values()
                if (e.owner == caller or "*" in e.tags["readers"])
                and base in (None, e.tags["base"])
            }
        elif kind == 2:
            ending = str(draw.randrange(10))
            allowed = lambda id, ending=ending: id.split("@")[0].endswith(ending)  # noqa: E731
            fitting = {id for id in ids if allowed(id)}  # type: ignore[operator]
        else:
            fitting = set(draw.sample(ids, 3))
            allowed = frozenset(fitting)
        masked = frozenset(draw.sample(ids, 2))
        found = retriever.retrieve(queries[call % 20], k, allowed=allowed, masked=masked)  # type: ignore[arg-type]
        assert set(found.ids) <= fitting - masked
        if retriever.ranking.per_owner is None:
            assert len(found.hits) == min(k, len(fitting - masked))
        assert found.abstained == (len(found.hits) == 0)


def test_a_tenant_of_three_gets_exactly_its_three_in_order() -> None:
    retriever = random_pool(2000)
    own = [replace(e, id=f"me/{i}", owner="me") for i, e in enumerate(random_entries(3, seed=9))]
    retriever.upsert_all(own)
    for seed in range(60):
        query = random_query(np.random.default_rng(seed))
        found = retriever.retrieve(query, 10, allowed=Where().tagged(owner="me"))
        assert sorted(found.ids) == ["me/0", "me/1", "me/2"]
        assert [hit.score for hit in found.hits] == sorted(
            (h.score for h in found.hits), reverse=True
        )


def test_an_adapter_for_another_base_cannot_be_retrieved_whatever_is_allowed() -> None:
    retriever = random_pool(40, base="base1")
    everyone = {entry.id for entry in random_entries(40)}
    for allowed in (EVERYTHING, everyone, lambda id: True, Where().tagged(base="base0")):
        found = retriever.retrieve(random_query(np.random.default_rng(0)), 40, allowed=allowed)
        assert all(int(id.split("/a")[1].split("@")[0]) % 2 == 1 for id in found.ids)


def test_a_masked_adapter_is_left_out_and_the_others_keep_their_order() -> None:
    retriever = random_pool(30)
    for seed in range(20):
        query = random_query(np.random.default_rng(seed))
        whole = retriever.retrieve(query, 30, allowed=EVERYTHING).ids
        for masked in (whole[0], whole[7]):
            found = retriever.retrieve(query, 5, allowed=EVERYTHING, masked={masked}).ids
            assert len(found) == 5
            assert found == tuple(id for id in whole if id != masked)[:5]


def scored(
    lexical: list[float], dense: list[float] | None, owners: list[str] | None = None
) -> Scored:
    num = len(lexical)
    return Scored(
        [f"id{i:03d}" for i in range(num)],
        owners or ["x"] * num,
        np.arange(num),
        np.array(lexical, np.float32),
        None if dense is None else np.array(dense, np.float32),
    )


def test_scores_are_standardised_over_many_candidates_and_plain_over_few() -> None:
    draw = np.random.default_rng(0)
    lexical, dense = draw.uniform(0, 0.3, MIN_FOR_Z), draw.uniform(0.2, 0.9, MIN_FOR_Z)
    many = hybrid(scored(lexical.tolist(), dense.tolist()), 0.3)
    np.testing.assert_allclose(many, oracle.standardised_sum(lexical, dense, 0.3), atol=1e-5)
    few = hybrid(scored(lexical[:-1].tolist(), dense[:-1].tolist()), 0.3)
    np.testing.assert_allclose(few, 0.7 * lexical[:-1] + 0.3 * dense[:-1], atol=1e-6)
    assert (hybrid(scored([0.0] * 60, [0.5] * 60)) == 0).all()


def test_equal_scores_are_ordered_by_id() -> None:
    retriever = Retriever()
    profile = make_profile(samples("law"))
    for name in ("c", "a", "d", "b"):
        retriever.upsert(name, profile, owner="x")
    assert retriever.retrieve("is this clause valid", 3, allowed=EVERYTHING).ids == ("a", "b", "c")


def test_one_contributor_gets_one_hit_where_that_is_asked_for(topics: Retriever) -> None:
    profile = make_profile(samples("chess", seed=2), topics.encoder)
    topics.refresh_at = None  # seen against the pool as it was: a flood makes its own words common
    for i in range(20):
        topics.upsert(f"flood{i}", profile, owner="flood")
    prompt = samples("chess", seed=2)[0]
    plain = topics.retrieve(prompt, 3, allowed=EVERYTHING)
    assert sum(id.startswith("flood") for id in plain.ids) >= 2
    topics.ranking = Ranking(per_owner=1)
    found = topics.retrieve(prompt, 3, allowed=EVERYTHING)
    assert sum(id.startswith("flood") for id in found.ids) == 1 and len(found.ids) == 3


@pytest.mark.parametrize("dense", [True, False])
def test_near_copies_are_passed_over_where_that_is_asked_for(dense: bool) -> None:
    encoder = WordEncoder() if dense else None
    retriever = Retriever(encoder=encoder, ranking=Ranking(max_nearness=0.98))
    for topic in TOPICS:
        retriever.upsert(topic, make_profile(samples(topic), encoder), owner="x")
        retriever.upsert(f"{topic} again", make_profile(samples(topic), encoder), owner="x")
    found = retriever.retrieve("the queen takes the bishop", 10, allowed=EVERYTHING)
    assert sorted(id.removesuffix(" again") for id in found.ids) == sorted(TOPICS)


def test_a_profile_near_everything_is_refused_in_a_large_pool() -> None:
    retriever = random_pool(1500)
    assert retriever.background.central_limit is not None
    middle = replace(random_entries(1)[0], id="middle")
    vector = unit(retriever.background.mean) * np.float32(0.5)
    central = replace(middle, profile=replace(middle.profile, dense=vector))
    with pytest.raises(ProfileError, match="middle of the pool") as error:
        retriever.upsert_all([central])
    assert error.value.code == "too_central"
    assert retriever.index.count() == 1500
    retriever.upsert_all([middle])
    Retriever(retriever.index, reject_central=False).upsert_all([central])


def test_nothing_fits_so_nothing_is_returned(topics: Retriever) -> None:
    own = [
        topics.retrieve(p, 1, allowed=EVERYTHING).hits[0].lexical
        for t in TOPICS
        for p in samples(t, 9, 3)
    ]
    prompts = ["translate bonjour into english", "sort my photos by date", "2 + 2 * 7"]
    other = [topics.retrieve(p, 1, allowed=EVERYTHING).hits[0].lexical for p in prompts]
    threshold = abstain_threshold(own, other)
    assert threshold.auc == 1.0 and threshold.kept == 1.0 and threshold.refused == 1.0
    topics.min_score = threshold.min_score
    found = topics.retrieve(prompts[0], 3, allowed=EVERYTHING)
    assert found.abstained and found.hits == () and "below" in found.reason
    assert weights(found) == {}
    assert not topics.retrieve(samples("law", 1, 5)[0], 3, allowed=EVERYTHING).abstained
    assert not topics.retrieve(prompts[0], 3, allowed=EVERYTHING, min_score=0.0).abstained


def test_an_empty_pool_abstains() -> None:
    found = Retriever().retrieve("anything", allowed=EVERYTHING)
    assert found.abstained and found.reason == "no adapter may be used"


def test_a_threshold_without_foreign_prompts_keeps_the_share_asked_for() -> None:
    inside = np.linspace(0.1, 1.0, 100).tolist()
    found = abstain_threshold(inside, keep=0.9)
    assert 0.9 <= found.kept <= 0.92 and found.auc is None
    assert separation([1, 2], [1, 0]) == 0.875
    with pytest.raises(RetrievalError, match="at least one finite score"):
        abstain_threshold([])


def test_the_background_is_made_anew_when_the_pool_has_grown_by_a_quarter() -> None:
    retriever = random_pool(20)
    version = retriever.background.version
    extra = random_entries(6, seed=4)
    for number, entry in enumerate(extra):
        retriever.upsert(f"extra{number}", entry.profile, owner="x")
        assert retriever.background.version == version + (number == 5)


class RanksFirst(ExactIndex):
    filters_first = False


def test_an_index_that_filters_afterwards_is_refused() -> None:
    with pytest.raises(RetrievalError, match="loses small tenants"):
        Retriever(RanksFirst())


@pytest.mark.parametrize(
    "wrong",
    [
        {"dense_weight": 1.5},
        {"per_owner": 0},
        {"max_nearness": 2.0},
        {"dense_weight": float("nan")},
    ],
)
def test_senseless_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RetrievalError):
        Ranking(**wrong)  # type: ignore[arg-type]


def test_a_query_needs_a_positive_k(topics: Retriever) -> None:
    with pytest.raises(RetrievalError, match="k must be at least 1"):
        topics.retrieve("x", 0, allowed=EVERYTHING)
    assert Query.of("").lexical.buckets.size == 0
    assert len(topics.retrieve("", 2, allowed=EVERYTHING).hits) == 2


HITS = Retrieved((Hit("b", 0.9, 0.5, None), Hit("c", 0.7, 0.4, None), Hit("a", 0.2, 0.1, None)))


def test_weights_of_selection_mixture_and_softmax() -> None:
    assert weights(HITS, "selection") == {"b": 1.0}
    assert list(weights(HITS).items()) == [("a", 1 / 3), ("b", 1 / 3), ("c", 1 / 3)]
    soft = weights(HITS, temperature=0.1)
    assert sum(soft.values()) == pytest.approx(1.0) and soft["b"] > soft["c"] > soft["a"]
    with pytest.raises(RetrievalError, match="fusion"):
        weights(HITS, "fusion")  # type: ignore[arg-type]
    with pytest.raises(RetrievalError, match="temperature"):
        weights(HITS, temperature=0.0)


def test_the_mapping_of_a_batch_is_the_papers() -> None:
    draw = random.Random(0)
    for _ in range(50):
        sets = [draw.sample("abcdefgh", 3) for _ in range(draw.randrange(1, 6))]
        ids, found = mapping([dict.fromkeys(row, 1 / 3) for row in sets])
        union, expected = oracle.mapping(sets)
        assert ids == union == sorted({id for row in sets for id in row})
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
        assert ((found > 0).sum(1) == 3).all() and len(ids) <= 3 * len(sets)
