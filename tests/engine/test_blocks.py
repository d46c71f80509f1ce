"""The block pool: who holds what, what is found again, what is given up first."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loramux.engine.blocks import BlockPool


def test_blocks_are_counted_by_tokens_rounded_up():
    pool = BlockPool(4, 16)
    assert [pool.blocks_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_released_blocks_can_be_found_until_their_room_is_needed():
    pool = BlockPool(3)
    table = pool.allocate(2)
    pool.register(table[0], "a")
    pool.register(table[1], "b")
    pool.release(table)
    assert pool.num_free == 3 and pool.find(["a", "b"]) == table
    pool.allocate(1)
    assert pool.find(["a", "b"]) == table, "a block that holds nothing was free"
    pool.allocate(1)
    assert pool.find(["a", "b"]) == table[:1], "the end of a prefix goes before its beginning"
    assert pool.num_evicted == 1
    pool.check_integrity()


def test_what_was_used_last_is_evicted_last():
    pool = BlockPool(3)
    tables = {name: pool.allocate(1) for name in "abc"}
    for name, table in tables.items():
        pool.register(table[0], name)
    for name in "abc":
        pool.release(tables[name])
    pool.hold(pool.find(["a"]))
    pool.release(tables["a"])
    pool.allocate(2)
    assert [len(pool.find([name])) for name in "abc"] == [1, 0, 0]


def test_only_an_unbroken_beginning_is_found():
    pool = BlockPool(3)
    table = pool.allocate(3)
    pool.register(table[0], "a")
    pool.register(table[2], "c")
    assert pool.find(["a", "b", "c"]) == table[:1]
    assert pool.find(["b", "c"]) == []


def test_held_blocks_are_never_given_out():
    pool = BlockPool(2)
    table = pool.allocate(1)
    pool.register(table[0], "a")
    pool.hold(table)
    pool.release(table)
    assert pool.num_free == 1 and pool.refs(table[0]) == 1
    assert pool.allocate(1) != table
    pool.check_integrity([table, [1 - table[0]]])


def test_a_fork_shares_full_blocks_and_copies_the_one_it_will_write():
    pool = BlockPool(6, 4)
    table = pool.allocate(3)
    fork, copy = pool.fork(table, 10)
    assert fork[:2] == table[:2] and fork[2] not in table
    assert copy == (table[2], fork[2])
    assert not pool.is_private(table[0]) and pool.is_private(fork[2]) and pool.is_private(table[2])
    even, no_copy = pool.fork(table, 8)
    assert even == table[:2] and no_copy is None
    pool.check_integrity([table, fork, even])
    for held in (table, fork, even):
        pool.release(held)
    assert pool.num_free == 6


def test_a_second_block_of_one_digest_is_not_listed():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, "a")
    pool.register(second, "a")
    assert pool.find(["a"]) == [first] and pool.num_cached == 1 and pool.is_private(second)
    pool.release([first, second])
    pool.check_integrity([])


def test_a_pool_without_cache_finds_nothing():
    pool = BlockPool(2, has_cache=False)
    table = pool.allocate(1)
    pool.register(table[0], "a")
    assert pool.find(["a"]) == [] and pool.num_cached == 0


def test_clearing_the_cache_leaves_tables_alone():
    pool = BlockPool(3)
    table = pool.allocate(2)
    pool.register(table[0], "a")
    pool.register(table[1], "b")
    pool.release(table[1:])
    pool.clear_cache()
    assert pool.find(["a"]) == [] and pool.num_free == 2
    pool.check_integrity([table[:1]])


@pytest.mark.parametrize("misuse", ["allocate", "release", "hold", "register"])
def test_misuse_is_noticed(misuse):
    pool = BlockPool(2)
    with pytest.raises((AssertionError, KeyError)):
        {
            "allocate": lambda: pool.allocate(3),
            "release": lambda: pool.release([0]),
            "hold": lambda: pool.hold([0]),
            "register": lambda: pool.register(0, "a"),
        }[misuse]()


@pytest.mark.parametrize("spoil", ["lost", "double", "count", "hash"])
def test_spoilt_books_are_noticed(spoil):
    pool = BlockPool(3)
    table = pool.allocate(1)
    pool.register(table[0], "a")
    pool.check_integrity([table])
    if spoil == "lost":
        pool._free.pop()
    elif spoil == "double":
        pool._free.append(table[0])
    elif spoil == "count":
        pool._refs[table[0]] = 2
    else:
        pool._block_of["b"] = table[0]
    with pytest.raises(AssertionError):
        pool.check_integrity([table])


@pytest.mark.parametrize("sizes", [(0, 16), (4, 0)])
def test_a_pool_needs_blocks_and_blocks_need_tokens(sizes):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        BlockPool(*sizes)


class PoolMachine(RuleBasedStateMachine):
    """Random use against a model: tables of (block, content) where content names what was written there last."""

    @initialize(num_blocks=st.integers(1, 10), block_size=st.integers(1, 3))
    def build(self, num_blocks, block_size):
        self.pool = BlockPool(num_blocks, block_size)
        self.tables = []
        self.content = {}  # of each block
        self.written = 0

    def write(self, block):
        assert self.pool.is_private(block)
        self.written += 1
        self.content[block] = f"content {self.written}"

    @rule(count=st.integers(0, 4))
    def allocate(self, count):
        if count <= self.pool.num_free:
            table = self.pool.allocate(count)
            for block in table:
                self.write(block)
            self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        table = data.draw(st.sampled_from(self.tables))
        self.tables = [other for other in self.tables if other is not table]
        self.pool.release(table)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def register(self, data):
        block = data.draw(st.sampled_from([block for table in self.tables for block in table]))
        self.pool.register(block, self.content[block])

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def find_and_hold(self, data):
        wanted = data.draw(st.lists(st.sampled_from(sorted(self.content.values())), max_size=3))
        found = self.pool.find(wanted)
        assert [self.content[block] for block in found] == wanted[: len(found)]
        if len(set(found)) == len(found):
            self.pool.hold(found)
            self.tables.append(found)

    @precondition(lambda self: any(self.tables) and self.pool.num_free)
    @rule(data=st.data())
    def fork(self, data):
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        num_tokens = data.draw(st.integers(0, len(table) * self.pool.block_size))
        fork, copy = self.pool.fork(table, num_tokens)
        assert len(fork) == self.pool.blocks_for(num_tokens)
        if copy is not None:
            assert copy == (table[len(fork) - 1], fork[-1])
            self.write(fork[-1])
        self.tables.append(fork)

    @rule()
    def clear(self):
        self.pool.clear_cache()
        assert self.pool.num_cached == 0

    @invariant()
    def books_agree(self):
        if hasattr(self, "pool"):
            self.pool.check_integrity(self.tables)

    def teardown(self):
        for table in getattr(self, "tables", []):
            self.pool.release(table)
        if hasattr(self, "pool"):
            assert self.pool.num_free == self.pool.num_blocks
            self.pool.check_integrity([])


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase
