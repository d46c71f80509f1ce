"""Decoding on a device equals decoding in torch, writes only what it should, and treats every row as if it were alone.

Why a process of its own: Triton decides at import whether it compiles or interprets.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from loramux.ops.paged import (
    LayerKV,
    PagedRows,
    attend,
    decode_torch,
    gather,
    make_pools,
    write_torch,
)
from loramux.ops.paged_triton import KEY, DecodeTable, table_of
from ops.child import run_child
from ops.test_paged import Case, Shape, exact, make

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def moved(case: Case, device: str) -> Case:
    """The same case on a device, in a pool of its own."""
    kv = replace(
        case.kv,
        keys_BGDTP=case.kv.keys_BGDTP.to(device, copy=True),
        values_BGTDP=case.kv.values_BGTDP.to(device, copy=True),
        cache={},
    )
    rows = replace(
        case.rows,
        slot_N=case.rows.slot_N.to(device),
        blocks=case.rows.blocks.to(device),
        cache={},
    )
    there = [t.to(device) for t in (case.query, case.key, case.value)]
    return Case(kv, rows, *there, case.keys, case.values)


def in_torch(case: Case) -> torch.Tensor:
    write_torch(case.key[0], case.value[0], case.kv, case.rows)
    out = torch.zeros(case.query.shape[2], case.query.shape[1], case.value.shape[3])
    out = out.to(case.query.dtype)
    decode_torch(case.query[0], case.kv, case.rows, out)
    return out


def check_random_shapes(device: str) -> None:
    rng = random.Random(0)
    for seed in range(14):
        shape = Shape(
            groups=rng.randint(1, 3), share=rng.choice([1, 2, 3, 5]),
            key_dim=rng.choice([8, 12, 64]), value_dim=rng.choice([7, 8, 20, 64]),
            block_size=rng.choice([16, 32, 5]), window=rng.choice([None, None, 1, 7, 40]),
            softcap=rng.choice([None, None, 5.0, 50.0]),
            dtype=rng.choice([torch.float32, torch.bfloat16, torch.float16]),
        )  # fmt: skip
        lengths = [rng.randint(1, 90) for _ in range(rng.randint(1, 4))]
        case = make(shape, lengths, seed)
        wide = torch.zeros(*case.key.shape[:3], 2 * shape.key_dim, dtype=shape.dtype)[..., ::2]
        case.key = wide.copy_(case.key)  # any strides
        there = moved(case, device)
        got, want = there.run().cpu(), in_torch(case)
        assert there.kv.cache["kernel"] == "triton"
        error = (got.double() - exact(case, shape)).abs().max()
        assert error <= TOLERANCE[shape.dtype], (shape, lengths, error)
        torch.testing.assert_close(got, want, rtol=0, atol=2 * TOLERANCE[shape.dtype])
        for ours, theirs in ((there.kv.keys_BGDTP, case.kv.keys_BGDTP),
                             (there.kv.values_BGTDP, case.kv.values_BGTDP)):  # fmt: skip
            assert torch.equal(ours.cpu().nan_to_num(), theirs.nan_to_num())


def check_rows_are_alone(device: str) -> None:
    """Bits of a row do not depend on the others, nor on how wide the table is; NaN stays in its row."""
    case = moved(make(Shape(), [37, 1, 90, 16]), device)
    together = case.run()
    table = table_of(case.rows)
    for s in range(4):
        wide = torch.zeros(1, 20, dtype=torch.int32, device=device)
        wide[0, : table.blocks_SW.shape[1]] = table.blocks_SW[s]
        row = torch.zeros(1, dtype=torch.int32, device=device)
        own = DecodeTable(row, table.length_S[s : s + 1], wide)
        rows = replace(case.rows, slot_N=case.rows.slot_N[s : s + 1], cache={KEY: own})
        alone = [t[:, :, s : s + 1] for t in (case.query, case.key, case.value)]
        assert torch.equal(attend(*alone, case.kv, rows)[0, 0], together[s])
    case.query[0, :, 1] = torch.nan
    hurt = case.run()
    assert bool(hurt[1].isnan().all())
    assert torch.equal(hurt[[0, 2, 3]], together[[0, 2, 3]])


def check_spare_rows(device: str) -> None:
    """A row of slot -1 and length 0 writes nothing and gives zeros, in a pool that is full of NaN."""
    case = moved(make(Shape(), [37, 5]), device)
    want = case.run()
    before = [t.clone() for t in (case.kv.keys_BGDTP, case.kv.values_BGTDP)]
    table = table_of(case.rows)
    none = torch.zeros(2, dtype=torch.int32, device=device)
    padded = DecodeTable(
        torch.arange(4, dtype=torch.int32, device=device),
        torch.cat([table.length_S, none]),
        torch.nn.functional.pad(table.blocks_SW, (0, 2, 0, 2)),
    )
    slots = torch.cat([case.rows.slot_N, none.long() - 1])
    rows = replace(case.rows, slot_N=slots, cache={KEY: padded})
    more = [torch.cat([t, torch.full_like(t, torch.nan)], 2)
            for t in (case.query, case.key, case.value)]  # fmt: skip
    out = attend(*more, case.kv, rows)[0]
    assert torch.equal(out[:2], want) and bool((out[2:] == 0).all())
    after = (case.kv.keys_BGDTP, case.kv.values_BGTDP)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.nan_to_num(nan=7.0), new.nan_to_num(nan=7.0))


def check_prompts(device: str) -> None:
    """Keys and values of many rows are written as torch writes them."""
    pools = make_pools(4, 2, 16, 12, 7, torch.bfloat16, device)
    kv = LayerKV(*pools, 1.0)
    key, value = torch.randn(2, 40, 12).bfloat16(), torch.randn(2, 40, 7).bfloat16()
    empty = torch.zeros(0, dtype=torch.int32)
    slots = torch.cat([torch.arange(32, 64), torch.arange(0, 8)]).to(device)
    rows = PagedRows(slots, empty, empty, torch.zeros(1, dtype=torch.int32), empty)
    query = torch.zeros(1, 4, 40, 12).bfloat16()
    attend(*(t.to(device) for t in (query, key[None], value[None])), kv, rows)
    blocks = torch.tensor([2, 3, 0], dtype=torch.int32, device=device)
    got = gather(kv, blocks, 0, 40)
    assert torch.equal(got[0].cpu(), key) and torch.equal(got[1].cpu(), value)


def check_all(device: str) -> None:
    check_random_shapes(device)
    check_rows_are_alone(device)
    check_spare_rows(device)
    check_prompts(device)


def test_decoding_equals_torch_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_child("from ops.test_paged_triton import check_all; check_all('cpu')")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_decoding_equals_torch_on_a_gpu() -> None:
    check_all("cuda")


def test_without_a_gpu_nothing_asks_for_triton() -> None:
    case = make(Shape(), [20, 3])
    case.run()
    assert case.kv.cache["kernel"] != "triton" and KEY not in case.rows.cache
