"""Attention over a paged pool is the plain formula, in every instruction set this CPU has and in torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loramux.ops import paged_kernel
from loramux.ops.paged import LayerKV, PagedRows, Piece, attend, gather, make_pools, write_torch
from ops.variants import VARIANTS, forced

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


@pytest.fixture(params=[*VARIANTS, "torch"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernel compiled for one instruction set, or none."""
    yield from forced(request.param, monkeypatch, paged_kernel.kernel)


@dataclass(frozen=True)
class Shape:
    groups: int = 2
    share: int = 3  # query heads per key/value head
    key_dim: int = 64
    value_dim: int = 64
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32


@dataclass
class Case:
    """A pool full of NaN but for the sequences' own tokens, whose last one is still to be written."""

    kv: LayerKV
    rows: PagedRows
    query: Tensor  # [1, H, N, D]
    key: Tensor
    value: Tensor
    keys: list[Tensor]  # [C, G, D] of each sequence
    values: list[Tensor]

    def run(self) -> Tensor:
        return attend(self.query, self.key, self.value, self.kv, self.rows)[0]


def make(shape: Shape, lengths: list[int], seed: int = 0) -> Case:
    rng = torch.Generator().manual_seed(seed)
    size, dtype = shape.block_size, shape.dtype
    need = [-(-n // size) for n in lengths]
    num_blocks = sum(need) + 3
    pools = make_pools(num_blocks, shape.groups, size, shape.key_dim, shape.value_dim, dtype)
    for pool in pools:
        pool.fill_(torch.nan)
    kv = LayerKV(*pools, shape.key_dim**-0.5, shape.window, shape.softcap)
    free = torch.randperm(num_blocks, generator=rng).tolist()
    tables = [[free.pop() for _ in range(n)] for n in need]
    keys = [torch.randn(n, shape.groups, shape.key_dim, generator=rng).to(dtype) for n in lengths]
    values = [
        torch.randn(n, shape.groups, shape.value_dim, generator=rng).to(dtype) for n in lengths
    ]
    slots = [
        torch.tensor([t[i // size] * size + i % size for i in range(n)])
        for n, t in zip(lengths, tables, strict=True)
    ]
    for slot, key, value in zip(slots, keys, values, strict=True):
        past = replace(rows_of([], [], []), slot_N=slot[:-1])
        write_torch(key[:-1].transpose(0, 1), value[:-1].transpose(0, 1), kv, past)
    heads = shape.groups * shape.share
    query = torch.randn(1, len(lengths), heads, shape.key_dim, generator=rng).to(dtype)
    rows = rows_of([int(s[-1]) for s in slots], lengths, tables)
    key = torch.stack([k[-1] for k in keys])[None].transpose(1, 2)
    value = torch.stack([v[-1] for v in values])[None].transpose(1, 2)
    return Case(kv, rows, query.transpose(1, 2), key, value, keys, values)


def rows_of(slots: list[int], lengths: list[int], tables: list[list[int]]) -> PagedRows:
    begin = [0]
    for table in tables:
        begin.append(begin[-1] + len(table))
    return PagedRows(
        torch.tensor(slots, dtype=torch.int64),
        torch.arange(len(lengths), dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        torch.tensor(begin, dtype=torch.int32),
        torch.tensor([b for table in tables for b in table], dtype=torch.int32),
    )


def exact(case: Case, shape: Shape) -> Tensor:
    """The formula in float64, one sequence and head at a time."""
    out = []
    for row, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        seen = slice(0 if shape.window is None else max(0, len(keys) - shape.window), None)
        heads = []
        for h in range(case.query.shape[1]):
            g = h // shape.share
            score = keys[seen, g].double() @ case.query[0, h, row].double() * case.kv.scale
            if shape.softcap is not None:
                score = torch.tanh(score / shape.softcap) * shape.softcap
            heads.append(score.softmax(0) @ values[seen, g].double())
        out.append(torch.stack(heads))
    return torch.stack(out)


SHAPES = st.builds(
    Shape,
    groups=st.integers(1, 3),
    share=st.sampled_from([1, 2, 3, 4, 5, 8]),
    key_dim=st.sampled_from([8, 12, 64, 80, 128]),
    value_dim=st.sampled_from([7, 8, 20, 64, 80, 128]),
    block_size=st.sampled_from([16, 32, 5]),
    window=st.sampled_from([None, 1, 7, 40]),
    softcap=st.sampled_from([None, 5.0, 50.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shape=SHAPES, lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4))
def test_decoding_equals_the_formula_and_reads_no_stale_number(
    variant: str, shape: Shape, lengths: list[int]
) -> None:
    case = make(shape, lengths)
    error = (case.run().double() - exact(case, shape)).abs().max()
    # Torch rounds the softmax of bf16 once more than the kernel does.
    assert error <= TOLERANCE[shape.dtype] * (4 if variant == "torch" else 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(
    variant: str, dtype: torch.dtype
) -> None:
    shape = Shape(dtype=dtype)
    case = make(shape, [37, 1, 90, 16])
    together = case.run()
    begin = case.rows.begin_S.tolist()
    for s in range(4):
        rows = PagedRows(
            case.rows.slot_N[s : s + 1].clone(),
            torch.zeros(1, dtype=torch.int32),
            case.rows.length_S[s : s + 1].clone(),
            torch.tensor([0, begin[s + 1] - begin[s]], dtype=torch.int32),
            case.rows.blocks[begin[s] : begin[s + 1]].clone(),
        )
        alone = replace(
            case, rows=rows, query=case.query[:, :, s : s + 1],
            key=case.key[:, :, s : s + 1], value=case.value[:, :, s : s + 1],
        )  # fmt: skip
        assert torch.equal(alone.run()[0], together[s])


def test_the_number_of_threads_does_not_change_a_bit(variant: str) -> None:
    shape = Shape(dtype=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = make(shape, [900, 700, 3]).run()
        torch.set_num_threads(3)
        three = make(shape, [900, 700, 3]).run()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)


def test_a_row_of_nan_leaves_the_others_bit_equal(variant: str) -> None:
    case, hurt = make(Shape(), [20, 40, 33]), make(Shape(), [20, 40, 33])
    hurt.query[0, :, 1] = torch.nan
    expected, got = case.run(), hurt.run()
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


def test_queries_may_lie_in_memory_in_any_way(variant: str) -> None:
    case = make(Shape(), [20, 40, 33])
    expected = case.run()
    wide = torch.zeros(*case.query.shape[:3], 2 * case.query.shape[3])[..., ::2]
    wide.copy_(case.query)
    for query in (case.query.contiguous(), wide):
        torch.testing.assert_close(replace(case, query=query).run(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block_size", [16, 5])
def test_what_is_written_is_what_is_gathered(
    variant: str, dtype: torch.dtype, block_size: int
) -> None:
    shape = Shape(block_size=block_size, dtype=dtype, key_dim=12, value_dim=7)
    case = make(shape, [37, 21])
    case.run()
    begin = case.rows.begin_S.tolist()
    for s, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        own = case.rows.blocks[begin[s] : begin[s + 1]]
        got_keys, got_values = gather(case.kv, own, 3, len(keys))
        assert torch.equal(got_keys, keys[3:].transpose(0, 1))
        assert torch.equal(got_values, values[3:].transpose(0, 1))


def test_rows_outside_the_pool_are_refused() -> None:
    if paged_kernel.kernel().attend is None:
        pytest.skip(paged_kernel.kernel().why_not)
    case = make(Shape(), [20, 40])
    wrong = {
        "slot": replace(case.rows, slot_N=torch.tensor([0, 10_000])),
        "block": replace(case.rows, blocks=torch.full_like(case.rows.blocks, 99)),
        "decode": replace(case.rows, length_S=case.rows.length_S + 60),
    }
    for named, rows in wrong.items():
        with pytest.raises(ValueError, match=named):
            replace(case, rows=replace(rows, cache={})).run()


def test_a_model_of_another_dtype_than_the_pool_is_refused() -> None:
    if paged_kernel.kernel().attend is None:
        pytest.skip(paged_kernel.kernel().why_not)
    case = make(Shape(), [20])
    with pytest.raises(ValueError, match="KV pool holds torch.float32"):
        replace(case, query=case.query.bfloat16()).run()


# --- Pieces of prompts ----------------------------------------------------------------------------


@dataclass
class Prompt:
    """A whole prompt, to be run in pieces over a pool full of NaN."""

    kv: LayerKV
    blocks: Tensor
    query: Tensor  # [1, H, C, D]
    key: Tensor
    value: Tensor

    def rows(self, start: int, end: int) -> PagedRows:
        size = self.kv.block_size
        place = torch.arange(start, end)
        slots = self.blocks[place // size] * size + place % size
        none = torch.zeros(0, dtype=torch.int32)
        piece = Piece(0, end - start, start, self.blocks.int())
        return PagedRows(slots, none, none, torch.zeros(1, dtype=torch.int32), none, (piece,))

    def run(self, *cuts: int) -> Tensor:
        """[C, H, D], with the prompt cut at these tokens."""
        edges, found = [0, *cuts, self.query.shape[2]], []
        for start, end in itertools.pairwise(edges):
            one = slice(start, end)
            found.append(
                attend(
                    self.query[:, :, one], self.key[:, :, one], self.value[:, :, one],
                    self.kv, self.rows(start, end),
                )[0]
            )  # fmt: skip
        return torch.cat(found)


def make_prompt(shape: Shape, length: int) -> Prompt:
    rng = torch.Generator().manual_seed(0)
    need = -(-length // shape.block_size)
    pools = make_pools(
        need + 2, shape.groups, shape.block_size, shape.key_dim, shape.value_dim, shape.dtype
    )
    for pool in pools:
        pool.fill_(torch.nan)

    def draw(heads: int, width: int) -> Tensor:
        x = torch.randn(1, length, heads, width, generator=rng).to(shape.dtype)
        return x.transpose(1, 2)

    return Prompt(
        LayerKV(*pools, shape.key_dim**-0.5, shape.window, shape.softcap),
        torch.randperm(need + 2, generator=rng)[:need],
        draw(shape.groups * shape.share, shape.key_dim),
        draw(shape.groups, shape.key_dim),
        draw(shape.groups, shape.value_dim),
    )


def exact_prompt(prompt: Prompt, shape: Shape) -> Tensor:
    query = prompt.query[0].double()
    key = prompt.key[0].double().repeat_interleave(shape.share, 0)
    value = prompt.value[0].double().repeat_interleave(shape.share, 0)
    score = query @ key.transpose(1, 2) * prompt.kv.scale
    if shape.softcap is not None:
        score = torch.tanh(score / shape.softcap) * shape.softcap
    token = torch.arange(query.shape[1])
    distance = token[:, None] - token
    seen = (distance >= 0) & (distance < (shape.window or 1 << 30))
    return (score.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(0, 1)


PROMPT_SHAPES = st.builds(
    Shape,
    groups=st.integers(1, 3),
    share=st.sampled_from([1, 3, 4]),
    key_dim=st.sampled_from([8, 32, 64, 96]),
    value_dim=st.sampled_from([7, 16, 64, 80]),
    block_size=st.sampled_from([16, 32, 48, 5]),
    window=st.sampled_from([None, 1, 7, 40]),
    softcap=st.sampled_from([None, 20.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float32]),
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shape=PROMPT_SHAPES, pieces=st.lists(st.integers(1, 70), min_size=1, max_size=3))
def test_prompts_in_pieces_equal_the_formula_and_read_no_stale_number(
    variant: str, shape: Shape, pieces: list[int]
) -> None:
    prompt = make_prompt(shape, sum(pieces))
    got = prompt.run(*itertools.accumulate(pieces[:-1]))
    error = (got.double() - exact_prompt(prompt, shape)).abs().max()
    # Weights of bf16 are rounded before they meet the values, by tiles as in torch.
    assert error <= TOLERANCE[shape.dtype] * 6


@pytest.mark.parametrize("window", [None, 40])
def test_where_the_kernel_takes_a_prompt_its_cuts_do_not_change_a_bit(
    variant: str, window: int | None
) -> None:
    shape = Shape(dtype=torch.bfloat16, window=window)
    prompt = make_prompt(shape, 150)
    whole = prompt.run()
    layer = prompt.kv.cache["kernel"]
    if not isinstance(layer, paged_kernel.HeldLayer) or not layer.takes_pieces:
        pytest.skip("pieces of prompts run in torch here")
    for cuts in ((16,), (7, 50, 98), (100, 149)):
        got = prompt.run(*cuts)
        single = [start for start, end in itertools.pairwise([0, *cuts, 150]) if end - start == 1]
        rows = [row for row in range(150) if row not in single]  # lone tokens could be decodes
        assert torch.equal(got[rows], whole[rows])


def test_a_prompt_beside_others_has_the_bits_it_has_alone(variant: str) -> None:
    shape = Shape(dtype=torch.bfloat16)
    prompt = make_prompt(shape, 64)
    alone = prompt.run()
    other = torch.arange(64)  # a second sequence, in blocks of its own
    pools = make_pools(8, 2, 16, 64, 64, torch.bfloat16)
    kv = LayerKV(*pools, prompt.kv.scale)
    none = torch.zeros(0, dtype=torch.int32)
    rows = PagedRows(
        torch.cat([other, 64 + other]), none, none, torch.zeros(1, dtype=torch.int32), none,
        (Piece(0, 64, 0, torch.arange(4).int()), Piece(64, 128, 0, torch.arange(4, 8).int())),
    )  # fmt: skip
    twice = [
        torch.cat([torch.randn_like(x), x], 2) for x in (prompt.query, prompt.key, prompt.value)
    ]
    assert torch.equal(attend(*twice, kv, rows)[0, 64:], alone)
