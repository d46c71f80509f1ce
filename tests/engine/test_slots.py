"""The slot tier: who sits where, who has to go, and that the books always add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.engine.slots import SlotTier
from loramux.ops.pool import PackedRows, SlotTable

D_IN, D_OUT = 2, 3


@dataclass(frozen=True)
class FakeContent:
    """`num_slots` experts of rank 1 at one site; every row holds the content's own number."""

    digest: str
    num_slots: int = 1
    slot_bytes: int = 100
    number: float = 0.0
    packed: PackedRows = field(init=False, compare=False)

    def __post_init__(self) -> None:
        rows = torch.full((self.num_slots, D_IN + D_OUT), self.number)
        at = np.arange(self.num_slots, dtype=np.int64)[:, None] * 4 * (D_IN + D_OUT)
        packed = PackedRows(
            blob=rows.reshape(-1).view(torch.uint8),
            dtype=torch.float32,
            a_at=at,
            b_at=at + 4 * D_IN,
            rank=np.ones_like(at, dtype=np.int32),
            scale=np.ones(at.shape, dtype=np.float32),
        )
        object.__setattr__(self, "packed", packed)


def tier(slots: int = 4, max_bytes: int = 10_000) -> SlotTier:
    return SlotTier(SlotTable([(D_IN, D_OUT)], slots), slots, max_bytes)


def release(own: SlotTier, contents: Sequence[FakeContent]) -> None:
    for content in contents:
        own.release(content.digest)


def test_a_content_gets_one_run_of_slots_and_the_table_holds_its_rows() -> None:
    own = tier()
    one, wide = FakeContent("one", number=1.0), FakeContent("wide", 3, number=2.0)
    slots = own.acquire([one, wide])
    assert slots is not None
    assert [len(run) for run in slots] == [1, 3]
    assert not set(slots[0]) & set(slots[1])
    for run, number in zip(slots, (1.0, 2.0), strict=True):
        for slot in run:
            assert own.table.rows_of(slot, 0)[0].unique().tolist() == [number]
    own.check_integrity()


def test_the_content_unused_longest_makes_room() -> None:
    own = tier(2)
    a, b, c = (FakeContent(name) for name in "abc")
    for content in (a, b, a):
        assert own.acquire([content])
        own.release(content.digest)
    assert own.acquire([c])
    assert set(own.seats) == {"a", "c"}
    own.check_integrity()


def test_a_pinned_content_is_never_evicted_and_never_moved() -> None:
    own = tier(2)
    a, b, c = (FakeContent(name) for name in "abc")
    first = own.acquire([a])
    assert own.acquire([b])
    assert own.acquire([c]) is None
    own.release("b")
    assert own.acquire([c])
    assert own.acquire([a]) == first
    assert own.seats["a"].pins == 2


def test_a_mix_is_pinned_whole_or_not_at_all() -> None:
    own = tier(3)
    a, b, wide = FakeContent("a"), FakeContent("b"), FakeContent("wide", 2)
    assert own.acquire([a, b])
    assert own.acquire([a, wide]) is None
    assert own.seats["a"].pins == 1
    assert "wide" not in own.seats
    own.check_integrity()


def test_a_content_named_twice_in_a_mix_sits_once_and_is_pinned_twice() -> None:
    own = tier()
    a = FakeContent("a")
    slots = own.acquire([a, a])
    assert slots is not None
    assert slots[0] == slots[1]
    assert own.seats["a"].pins == 2
    release(own, [a, a])
    assert own.num_pinned == 0


def test_a_wide_content_may_push_parts_of_its_own_mix_aside() -> None:
    own = tier(4)
    fillers = [FakeContent(name) for name in "wxyz"]
    slots = own.acquire(fillers)
    assert slots is not None
    middle = next(f for f, run in zip(fillers, slots, strict=True) if run.start == 1)
    release(own, fillers)
    wide = FakeContent("wide", 3, number=3.0)
    got = own.acquire([middle, wide])
    assert got is not None
    assert len(got[1]) == 3
    assert not set(got[0]) & set(got[1])
    own.check_integrity()


def test_a_mix_that_fits_is_seated_wherever_the_idle_ones_sit() -> None:
    """Regression: the run unused longest was in the middle, and with nothing pinned there was no room for ever."""
    own, singles = tier(6), [FakeContent(f"s{i}") for i in range(6)]
    assert own.acquire(singles) is not None
    for i in (1, 2, 3, 0, 4, 5):
        own.release(f"s{i}")
    wide = [FakeContent("left", 3, number=1.0), FakeContent("right", 3, number=2.0)]
    assert own.acquire(wide) == [range(3), range(3, 6)]
    own.check_integrity()
    assert own.table.rows_of(5, 0)[0].unique().tolist() == [2.0]


def test_bytes_are_a_budget_of_their_own() -> None:
    own = tier(4, max_bytes=250)
    a, b, c = (FakeContent(name) for name in "abc")
    assert own.acquire([a])
    assert own.acquire([b])
    assert own.acquire([c]) is None
    own.release("b")
    assert own.acquire([c])
    assert set(own.seats) == {"a", "c"}
    assert own.nbytes == 200


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ([FakeContent("a", 5)], "5 adapter slots .* the engine has 4; raise max_slots"),
        ([FakeContent("a", 2), FakeContent("b", 3)], "5 adapter slots"),
        ([FakeContent("a", 1, 20_000)], "20,000 bytes in slots, the budget is 10,000"),
    ],
)
def test_what_can_never_be_seated_is_said_with_numbers(
    contents: list[FakeContent], reason: str
) -> None:
    own = tier()
    assert own.acquire(contents) is None
    why = own.why_never(contents)
    assert why is not None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(why)


def test_two_mentions_of_a_content_need_its_slots_once() -> None:
    wide = FakeContent("a", 3)
    assert tier().why_never([wide, wide]) is None


def test_single_slots_leave_runs_free_for_wide_contents() -> None:
    own = tier(8)
    singles = [FakeContent(f"single-{i}") for i in range(4)]
    for content in singles:
        assert own.acquire([content])
    assert own.acquire([FakeContent("wide", 4)]) is not None


class Arena(SlotTable):
    """A table with room for so many contents only, as one that copies rows may have."""

    def __init__(self, slots: int, room: int):
        super().__init__([(D_IN, D_OUT)], slots)
        self.room = room

    def put(self, slots: Sequence[int], packed: PackedRows) -> None:
        if len({id(p) for p in self.held if p is not None}) >= self.room:
            raise ValueError("the arena is full")
        super().put(slots, packed)


def test_where_the_table_has_no_room_the_oldest_go_until_it_has() -> None:
    own = SlotTier(Arena(4, room=2), 4, 10_000)
    a, b, c = (FakeContent(name) for name in "abc")
    for content in (a, b):
        assert own.acquire([content])
    assert own.acquire([c]) is None
    own.release("a")
    assert own.acquire([c])
    assert set(own.seats) == {"b", "c"}
    own.check_integrity()


def test_a_content_that_the_table_refuses_for_itself_is_an_error() -> None:
    own = SlotTier(Arena(4, room=0), 4, 10_000)
    with pytest.raises(ValueError, match="the arena is full"):
        own.acquire([FakeContent("a")])
    own.check_integrity()


def test_a_mix_that_finds_no_room_half_way_pins_nothing() -> None:
    own = SlotTier(Arena(4, room=2), 4, 10_000)
    a, b, c = (FakeContent(name) for name in "abc")
    assert own.acquire([a])
    assert own.acquire([b, c]) is None
    assert own.num_pinned == 1
    own.check_integrity()
    own.release("a")
    assert own.acquire([b, c])


def test_more_slots_than_the_table_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_slots must be in 1\.\.4"):
        SlotTier(SlotTable([(D_IN, D_OUT)], 4), 5, 100)


CONTENTS = [FakeContent(f"c{i}", 1 + i % 4, 50 + 30 * (i % 3), float(i)) for i in range(9)]
Step = tuple[str, list[int]]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["acquire", "acquire", "release", "evict"]),
        st.lists(st.integers(0, len(CONTENTS) - 1), min_size=1, max_size=3),
    ),
    max_size=60,
)


@settings(max_examples=80, deadline=None)
@given(STEPS)
def test_after_any_history_the_books_add_up_and_pins_stay_in_place(steps: list[Step]) -> None:
    own = tier(6, max_bytes=500)
    held: list[tuple[list[FakeContent], list[range]]] = []
    for what, numbers in steps:
        contents = [CONTENTS[i] for i in numbers]
        if what == "acquire":
            slots = own.acquire(contents)
            if slots is not None:
                held.append((contents, slots))
            elif not held:
                assert own.why_never(contents) is not None
        elif what == "release" and held:
            contents, _ = held.pop(numbers[0] % len(held))
            release(own, contents)
        elif what == "evict" and not any(CONTENTS[numbers[0]] in c for c, _ in held):
            own.evict(CONTENTS[numbers[0]].digest)
        own.check_integrity()
        for contents, slots in held:
            for content, run in zip(contents, slots, strict=True):
                assert own.seats[content.digest].slots == run
                rows = own.table.rows_of(run[-1], 0)[0]
                assert rows.unique().tolist() == [content.number]
    for contents, _ in held:
        release(own, contents)
    assert own.num_pinned == 0
    own.check_integrity()
