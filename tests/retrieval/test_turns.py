"""Whose profiles a large pool's threshold is calibrated on, and what one contributor of very many can do to it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.bench import retrieval_attack, retrieval_flood
from loramux.bench.retrieval_abstain import bare, instruction_of
from loramux.bench.retrieval_flood import FLOODS, figures, measure, table
from loramux.bench.retrieval_separation import Remembering, run
from loramux.bench.retrieval_separation import table as separation_table
from loramux.retrieval.exact import ExactIndex
from loramux.retrieval.index import Entry
from loramux.retrieval.profile import make_profile
from loramux.retrieval.qdrant import QdrantIndex
from loramux.retrieval.turns import CROWD, EQUAL_SHARES, in_turn
from retrieval.pools import WordEncoder, samples, topic_profiles
from retrieval.test_calibrate import TASKS, prompts

SIZES = st.lists(st.integers(1, 400), min_size=1, max_size=40)


def owned(sizes: list[int]) -> list[tuple[str, str]]:
    return [(f"t{n}/a{i}@1", f"t{n}") for n, size in enumerate(sizes) for i in range(size)]


def given_by(ids: list[str]) -> Counter[str]:
    return Counter(id.split("/")[0] for id in ids)


# -- the sample -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES)
def test_every_contributor_is_heard_and_none_of_a_crowd_gives_more_than_the_bound(
    sizes: list[int],
) -> None:
    chosen = in_turn(owned(sizes), 256)
    counted = given_by(chosen)
    assert len(chosen) == len(set(chosen)) <= 256 and len(counted) == len(sizes)
    if len(sizes) >= CROWD:
        share = EQUAL_SHARES / len(sizes)
        assert max(counted.values()) <= max(1, share * len(chosen))
    assert in_turn(reversed(owned(sizes)), 256) == chosen, "in any order"


@settings(max_examples=50, deadline=None)
@given(sizes=SIZES, more=st.integers(400, 5000))
def test_beyond_the_bound_more_adapters_of_one_contributor_count_for_nothing(
    sizes: list[int], more: int
) -> None:
    counted = [given_by(in_turn(owned([*sizes, n]), 256)) for n in (more, 2 * more)]
    # Who gives one less in a last round that is cut short depends on the digests.
    apart = {owner: abs(counted[0][owner] - counted[1][owner]) for owner in counted[0]}
    assert max(apart.values()) <= 1 or len(sizes) + 1 < CROWD


def test_a_lone_contributors_pool_is_judged_by_as_many_as_ever() -> None:
    assert len(in_turn(owned([1000]), 256)) == 256
    assert len(in_turn(owned([14]), 256)) == 14
    assert in_turn([], 256) == []


def test_of_more_contributors_than_places_each_gives_at_most_one() -> None:
    counted = given_by(in_turn(owned([5] * 300), 256))
    assert len(counted) == 256 and set(counted.values()) == {1}


def test_both_indexes_choose_the_same_profiles() -> None:
    entries = [Entry(f"{t}@1", p, "x" if t < "d" else t) for t, p in topic_profiles().items()]
    exact, qdrant = ExactIndex(), QdrantIndex.connect(":memory:")
    for index in (exact, qdrant):
        index.upsert(entries)
    found = [[p.to_bytes() for p in index.profiles(4)] for index in (exact, qdrant)]
    assert found[0] == found[1] and len(found[0]) == 4


# -- a contributor of a thousand --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["frequent words", "samples all alike"])
def test_a_thousand_profiles_of_one_contributor_hardly_move_the_threshold(kind: str) -> None:
    train = {f"task{i}": prompts(f"task{i}", 24) for i in range(24)}
    sent = {task: prompts(task, 2, "test") for task in train}
    honest = {task: make_profile(own) for task, own in train.items()}
    draw = random.Random(0)
    # The same few profiles again and again: making a thousand would take most of the time.
    made = [make_profile(FLOODS[kind](draw, train)) for _ in range(24)]
    thousand = [made[i % len(made)] for i in range(1000)]
    alone = figures(honest, [], train, sent)
    one = figures(honest, [("mallory", p) for p in thousand], train, sent)
    assert abs(one["threshold"] - alone["threshold"]) <= 0.25 * alone["threshold"], (one, alone)
    assert max(one["own"], one["own, bare"]) <= 0.1
    many = figures(honest, [(f"mallory{i}", p) for i, p in enumerate(thousand)], train, sent)
    assert abs(many["threshold"] - alone["threshold"]) > 0.7 * alone["threshold"], "not defended"


def test_the_command_sends_each_kind_from_one_contributor_and_from_a_crowd() -> None:
    train = {task: prompts(task, 20) for task in TASKS}
    row = measure(train, {TASKS[0]: prompts(TASKS[0], 2, "test")}, "common words", 12)
    assert set(row) == {"one", "many"} and "common words" in table({"common words": [row]})[2]


# -- which score tells own prompts from foreign ones -----------------------------------------------


def test_the_comparison_of_scores_reads_every_text_once_and_has_a_line_for_each() -> None:
    encoder = WordEncoder()
    train = {topic: samples(topic, 30) for topic in ("rivers", "chess", "bread", "law")}
    sent = {topic: [f"now sort this: {t}" for t in samples(topic, 6, 1)] for topic in train}

    def forms(task: str, texts: list[str]) -> dict[str, list[str]]:
        return {"": texts, ", bare": bare(texts, instruction_of(texts))}

    rows = run(train, sent, ["rivers", "chess", "bread"], encoder, forms, 2)
    lines = separation_table(rows)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| lexical", "| dense", "| hybrid"]
    assert rows[0]["lexical"]["auc, bare"] > 0.9 and rows[0]["lexical"]["refused own, bare"] <= 0.1
    calls, once = encoder.calls, Remembering(encoder)
    once.encode(["a b", "a b"])
    once.encode(["a b"])
    assert encoder.calls == calls + 1
    assert make_profile(train["law"], once).dense is not None


@pytest.mark.parametrize("bench", [retrieval_flood, retrieval_attack])
def test_a_folder_without_tasks_is_one_error(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for data in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SystemExit):
            bench.main(["--data", str(data)])
        assert "has no folder with a train.jsonl" in capsys.readouterr().err
