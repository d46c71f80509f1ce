"""Who holds which block of the KV pool, and which freed blocks still hold a prefix worth finding.

Why: keys and values live in blocks of `block_size` tokens. A sequence's table lists its blocks in order. A *full*
block may be in several tables (a prefix found in the cache, samples of one request); a block that is still being
written is in exactly one, so nobody ever writes what somebody else reads. Freed blocks that carry a hash stay
readable until their room is needed, the longest unused first; a table gives its last blocks up first, since a prefix
is of no use without its beginning.

Nothing here touches memory: blocks are numbers. The KV pool holds the tensors.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence

Copy = tuple[int, int]


class BlockPool:
    """Blocks 0..num_blocks-1, counted by how many tables hold each.

    `has_cache` False keeps no prefixes: register and find then do nothing.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, *, has_cache: bool = True) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.has_cache = has_cache
        self.num_evicted = 0  # cached blocks given up for room
        self._refs = [0] * num_blocks
        self._free = deque(range(num_blocks))  # hold nothing worth keeping
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, in no table; oldest first
        self._hash_of: list[str | None] = [None] * num_blocks
        self._block_of: dict[str, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that allocate() can give out, cached ones that nobody holds included."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks that find() can find, held or not."""
        return len(self._block_of)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def refs(self, block: int) -> int:
        """How many tables hold the block."""
        return self._refs[block]

    def is_private(self, block: int) -> bool:
        """One table holds it and no prefix can be found in it: its holder may write."""
        return self._refs[block] == 1 and self._hash_of[block] is None

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for one table. Ask num_free first: running out here is a bug of the caller."""
        assert 0 <= count <= self.num_free, f"asked for {count} blocks, {self.num_free} are free"
        blocks = [self._take() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def _take(self) -> int:
        if self._free:
            return self._free.popleft()
        block, _ = self._idle.popitem(last=False)
        digest = self._hash_of[block]
        assert digest is not None, "an idle block is a cached one"
        del self._block_of[digest]
        self._hash_of[block] = None
        self.num_evicted += 1
        return block

    def hold(self, blocks: Iterable[int]) -> None:
        """One more table holds these: blocks that are cached or in a table already."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._idle[block]  # a block that is free and not cached raises here
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """A table is given up. Cached blocks that nobody else holds wait to be found or evicted, the last one first."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} is in no table"
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if self._hash_of[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None

    def fork(self, table: Sequence[int], num_tokens: int) -> tuple[list[int], Copy | None]:
        """A second table over the first num_tokens of `table`, and the copy that makes it good.

        Full blocks are shared. The sharer is about to write behind num_tokens, so a block that ends in the middle is
        not shared but copied: (from, to), to be done in the KV pool before anything is written. May need one free
        block.
        """
        full, rest = divmod(num_tokens, self.block_size)
        shared = list(table[:full])
        self.hold(shared)
        if not rest:
            return shared, None
        (own,) = self.allocate(1)
        return [*shared, own], (table[full], own)

    def register(self, block: int, digest: str) -> None:
        """From now on a full block can be found under `digest`, unless another one can already."""
        assert self._refs[block] > 0, f"block {block} is in no table"
        if not self.has_cache or digest in self._block_of or self._hash_of[block] is not None:
            return
        self._block_of[digest] = block
        self._hash_of[block] = digest

    def find(self, hashes: Iterable[str]) -> list[int]:
        """The blocks of the longest cached beginning of a chain of hashes. They are not held yet: see hold()."""
        found = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these are in no table: holding them takes that many from num_free."""
        return sum(self._refs[block] == 0 for block in blocks)

    def clear_cache(self) -> None:
        """No prefix is found any more; blocks in tables stay as they are."""
        for block in self._block_of.values():
            self._hash_of[block] = None
        self._block_of.clear()
        self._free.extend(self._idle)
        self._idle.clear()

    def check_integrity(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Every block is free, idle or held; the cache's two sides agree. `tables`: all, if they are known."""
        held = {block for block, count in enumerate(self._refs) if count}
        free, idle = set(self._free), set(self._idle)
        assert min(self._refs) >= 0, "a block was released more often than held"
        assert len(free) == len(self._free), "a block is free twice"
        assert not (free & idle or free & held or idle & held), "a block is free and in use"
        assert len(free) + len(idle) + len(held) == self.num_blocks, "a block is lost"
        hashed = {block: digest for block, digest in enumerate(self._hash_of) if digest}
        assert {digest: block for block, digest in hashed.items()} == self._block_of
        assert idle <= hashed.keys() and not free & hashed.keys(), "idle blocks are the cached ones"
        if tables is not None:
            counted = Counter(block for table in tables for block in table)
            assert all(self._refs[block] == count for block, count in counted.items())
            assert counted.keys() == held, (
                "a block is held by no table, or a table holds a free one"
            )
