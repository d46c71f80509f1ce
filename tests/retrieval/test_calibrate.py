"""The threshold that a pool's own profiles give: how often it is wrong, when it is made anew, what replaces it."""

from __future__ import annotations

import random

import pytest

from loramux.bench.retrieval_abstain import bare, instruction_of, measure, table
from loramux.bench.retrieval_attack import measure as attack
from loramux.retrieval.calibrate import FALLBACK, AbstainAt, calibrated_threshold
from loramux.retrieval.drawn import draw_scores
from loramux.retrieval.errors import RetrievalError
from loramux.retrieval.profile import Profile, make_profile
from loramux.retrieval.retriever import Retriever
from loramux.retrieval.text import MAX_SAMPLE_WORDS, counts
from loramux.retrieval.where import EVERYTHING

TASKS = tuple(f"task{i}" for i in range(10))


def prompts(task: str, number: int, seed: str = "") -> list[str]:
    """An instruction of the task's own, then words of which a fifth are the task's and the rest anybody's."""
    draw = random.Random(f"{task}{seed}")
    own, common = [f"{task}w{i}" for i in range(40)], [f"w{i}" for i in range(300)]
    return [
        f"please sort {task} by kind: {' '.join(draw.sample(own, 3) + draw.sample(common, 12))}"
        for _ in range(number)
    ]


@pytest.fixture(scope="module")
def train() -> dict[str, list[str]]:
    return {task: prompts(task, 60) for task in (*TASKS, "else1", "else2")}


@pytest.fixture
def pool(train: dict[str, list[str]]) -> Retriever:
    made = Retriever(min_score=AbstainAt(), refresh_at=None)
    for task in TASKS:
        made.upsert(task, make_profile(train[task]), owner=task)
    made.refresh()
    return made


def test_held_out_prompts_find_nothing_about_as_often_as_was_said(
    train: dict[str, list[str]],
) -> None:
    sent = {task: prompts(task, 20, "test") for task in train}
    row = measure(train, sent, TASKS, rate=0.1)
    found = row["thresholds"]
    assert 0.04 <= found["with"]["own"] <= 0.2
    assert 0.04 <= found["without"]["own, bare"] <= 0.2
    both = (found["either"]["own"] + found["either"]["own, bare"]) / 2
    assert 0.04 <= both <= 0.2
    assert found["with"]["foreign"] > 0.9, "this pool's tasks are easy to tell apart"
    assert found["with"]["min_score"] > found["either"]["min_score"] > found["without"]["min_score"]
    assert "| either |" in "\n".join(table([row, row]))


def test_the_threshold_is_kept_until_the_background_is_made_anew(
    pool: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        "loramux.retrieval.calibrate.draw_scores", lambda *a: calls.append(1) or draw_scores(*a)
    )
    first = pool.threshold()
    assert first is not None and first > 0 and pool.threshold() == first and len(calls) == 1
    pool.refresh()
    assert pool.threshold() == first and len(calls) == 1, "the same profiles, word for word"
    pool.upsert("another", make_profile(prompts("another", 30)), owner="x")
    assert pool.threshold() == first and len(calls) == 1
    pool.refresh()
    assert pool.threshold() != first and len(calls) == 2


def test_another_rate_is_another_threshold_of_the_same_profiles(pool: Retriever) -> None:
    first = pool.threshold()
    pool.min_score = AbstainAt(rate=0.5)
    second = pool.threshold()
    assert first is not None and second is not None and second > first
    pool.refresh()
    assert pool.threshold() == second


def test_it_decides_what_is_found_and_a_calls_own_value_goes_before_it(pool: Retriever) -> None:
    foreign = "zebra quagga okapi"
    found = pool.retrieve(foreign, 3, allowed=EVERYTHING)
    assert found.abstained and "is below" in found.reason
    assert pool.retrieve(foreign, 3, allowed=EVERYTHING, min_score=0.0).hits
    assert pool.retrieve(prompts("task3", 1, "x")[0], 1, allowed=EVERYTHING).ids == ("task3",)


def test_two_pools_of_the_same_profiles_have_the_same_threshold(
    pool: Retriever, train: dict[str, list[str]]
) -> None:
    other = Retriever(min_score=AbstainAt(), refresh_at=None)
    other.upsert_all([], refresh=False)
    for task in reversed(TASKS):
        other.upsert(task, make_profile(train[task]), owner=task)
    other.refresh()
    assert other.threshold() == pool.threshold()


def test_few_profiles_or_profiles_of_one_sample_leave_the_fixed_value() -> None:
    few = Retriever(min_score=AbstainAt(), refresh_at=None)
    assert few.threshold() == FALLBACK
    one = [make_profile([f"only {task}"] * 12) for task in TASKS]
    assert [profile.num_samples for profile in one] == [1] * len(TASKS)
    assert calibrated_threshold(one, few.background).digest is None


def test_without_an_instruction_in_common_nothing_is_left_out() -> None:
    free = [f"{a} {b} {c}" for a in "pq" for b in "rs" for c in "tuv"]
    made: list[Profile] = [make_profile([f"{t}{text}" for text in free]) for t in TASKS]
    index = Retriever(refresh_at=None)
    for task, profile in zip(TASKS, made, strict=True):
        index.upsert(task, profile, owner="x")
    background = index.refresh()
    for kind in ("with", "without", "either"):
        assert calibrated_threshold(made, background, AbstainAt(0.2, kind)).digest is not None


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"rate": 1.0}, {"instruction": "maybe"}])
def test_senseless_rates_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RetrievalError, match="must"):
        AbstainAt(**wrong)  # type: ignore[arg-type]


def test_an_instruction_is_what_all_prompts_of_a_task_begin_with() -> None:
    texts = ["is this clause valid? a b", "is this clause valid? c"]
    assert instruction_of(texts) == 4
    assert bare(texts, 4) == ["a b", "c"]
    assert instruction_of(["I have a", "I have two"]) == 0
    assert bare(["no instruction"], 0) == []


# -- hostile profiles -------------------------------------------------------------------------------


def test_of_a_long_sample_only_the_first_and_last_words_count() -> None:
    words = [f"w{i}" for i in range(500)]
    ends = words[: MAX_SAMPLE_WORDS // 2] + words[-MAX_SAMPLE_WORDS // 2 :]
    held = set(counts(" ".join(words), MAX_SAMPLE_WORDS).buckets.tolist())
    # The two ends are no neighbours, so the pair between them is nobody's.
    assert len(held) == 2 * len(ends) - 2
    profile = make_profile([" ".join([*words[:300], f"x{i}", *words[300:]]) for i in range(20)])
    assert set(profile.lexical.buckets.tolist()) == held


def test_profiles_of_many_prompts_in_one_win_no_more_than_their_share(
    train: dict[str, list[str]],
) -> None:
    sent = {task: prompts(task, 12, "test") for task in train}
    found = attack(train, sent, None, num_hostile=20)
    assert found["hostile"] == 20 and found["most_of_one"] <= 1.5
