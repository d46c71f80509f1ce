"""Routers in the kernel decide what the routers of the methods decide, and write nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loramux.core.bank import Rows
from loramux.core.router import Router, RouteView
from loramux.core.types import EVERYTHING
from loramux.methods.mixlora import MixLoRAConfig, TokenRouter
from loramux.methods.mole import LateGate as MoLEGate
from loramux.methods.mole import MoLEConfig
from loramux.ops.contract import Pairs, RowMap, Spans
from loramux.ops.gates import LateCall, LateGate, TopKCall, TopKGate
from loramux.ops.pool import Member, SlotTable, group_linear
from ops.pool_cases import late_gate, pack
from ops.variants import variant

__all__ = ["variant"]

WIDTH = 24


# --- Token top-k --------------------------------------------------------------------------------------


def call_for(
    gates: list[TopKGate], gate: list[int], k: int, num_tokens: int
) -> tuple[TopKCall, Pairs, Pairs, RowMap]:
    """Token i + 1 is entry i; token 0 is nobody's. Pairs and rows of an entry start at 1 + i * k."""
    n = len(gate)
    num_pairs = num_rows = 2 + n * k
    row = torch.arange(num_rows, dtype=torch.int32)
    token = ((row - 1).clamp_min(0) // k + 1).clamp_max(num_tokens - 1).int()
    enter = Pairs(token, row, torch.full_like(row, -1), torch.ones(num_pairs), num_tokens, num_rows)
    leave = Pairs(row, token, torch.full_like(row, -1), torch.ones(num_pairs), num_rows, num_tokens)
    rows = RowMap(token, torch.ones(num_rows), num_tokens)
    step = torch.arange(n, dtype=torch.int32)
    bases = [10 * g for g in range(len(gates))]
    call = TopKCall(
        gates, bases, step + 1, torch.tensor(gate), 1 + step * k, 1 + step * k, enter, leave, rows
    )
    return call, enter, leave, rows


def some_gates(k: int, normalise: bool) -> list[TopKGate]:
    return [TopKGate(torch.randn(e, WIDTH), k, normalise) for e in (3, 8, 17)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_every_token_gets_the_experts_of_its_own_gate(
    variant: str, dtype: torch.dtype, normalise: bool, k: int
) -> None:
    gates, gate = some_gates(k, normalise), [0, 1, 2, 1, 0]
    call, enter, leave, rows = call_for(gates, gate, k, 6)
    x = torch.randn(1, 6, WIDTH).to(dtype)
    call.run(x)
    for i, g in enumerate(gate):
        at = slice(1 + i * k, 1 + (i + 1) * k)
        expert, weight = gates[g].choose(x[0, i + 1 : i + 2])
        assert torch.equal(enter.slot[at], (10 * g + expert[0]).int())
        assert torch.equal(leave.slot[at], enter.slot[at])
        torch.testing.assert_close(leave.weight[at], weight[0])
        assert torch.equal(rows.weight[at], leave.weight[at])
    assert bool((enter.weight == 1).all()), "the weights count once, behind the exit"
    for tensor, untouched in ((enter.slot, -1), (leave.slot, -1), (leave.weight, 1)):
        assert int(tensor[0]) == untouched and int(tensor[-1]) == untouched


def test_ties_go_to_the_lower_expert(variant: str) -> None:
    gate = TopKGate(torch.zeros(5, WIDTH), 3, True)
    call, enter, leave, _ = call_for([gate], [0], 3, 2)
    call.run(torch.randn(2, WIDTH))
    assert enter.slot[1:4].tolist() == [0, 1, 2]
    torch.testing.assert_close(leave.weight[1:4], torch.full((3,), 1 / 3))


def test_experts_need_not_lie_next_to_each_other(variant: str) -> None:
    gate = TopKGate(torch.randn(3, WIDTH), 2, True)
    call, enter, leave, rows = call_for([gate], [0], 2, 2)
    index = torch.tensor([1], dtype=torch.int32)
    call = TopKCall([gate], [[7, 2, 5]], index, index - 1, index, index, enter, leave, rows)
    x = torch.randn(2, WIDTH)
    call.run(x)
    expert, _ = gate.choose(x[1:])
    assert enter.slot[1:3].tolist() == [[7, 2, 5][e] for e in expert[0].tolist()]


def test_a_token_of_nan_gets_valid_experts_and_leaves_the_others_bit_equal(variant: str) -> None:
    gates = some_gates(2, True)
    call, enter, leave, rows = call_for(gates, [2, 2, 1], 2, 4)
    x = torch.randn(4, WIDTH)
    call.run(x)
    before = (enter.slot.clone(), leave.weight.clone(), rows.weight.clone())
    x[2] = float("nan")
    call.run(x)
    assert enter.slot[3:5].ge(20).all() and enter.slot[3:5].lt(37).all()
    assert len(set(enter.slot[3:5].tolist())) == 2
    assert bool(leave.weight[3:5].isnan().all() and rows.weight[3:5].isnan().all())
    others = [0, 1, 2, 5, 6, 7]
    for was, now in zip(before, (enter.slot, leave.weight, rows.weight), strict=True):
        assert torch.equal(was[others], now[others])


def test_calls_that_would_write_outside_are_refused() -> None:
    gate = TopKGate(torch.randn(3, WIDTH), 2, True)
    _, enter, leave, rows = call_for([gate], [0], 2, 2)
    one = torch.ones(1, dtype=torch.int32)
    given = {"token": one, "gate": 0 * one, "pair": one, "row": one}
    for name, value, message in (
        ("pair", 3, r"pair must stay within 0..3, got \[3\]"),
        ("row", -1, "row must stay within"),
        ("token", 2, "token must stay within 0..1"),
    ):
        changed = given | {name: torch.tensor([value], dtype=torch.int32)}
        with pytest.raises(ValueError, match=message):
            TopKCall([gate], [0], **changed, enter=enter, exit=leave, rows=rows)
    wide = replace(enter, slot=enter.slot.long())
    with pytest.raises(ValueError, match="written in place and must be contiguous torch.int32"):
        TopKCall([gate], [0], **given, enter=wide, exit=leave, rows=rows)
    with pytest.raises(ValueError, match="a gate of 3 experts was given the slots"):
        TopKCall([gate], [[1, 2]], **given, enter=enter, exit=leave, rows=rows)
    with pytest.raises(ValueError, match=r"k must be in 1..3"):
        TopKGate(gate.weight_ED, 4, True)
    call = TopKCall([gate], [0], **given, enter=enter, exit=leave, rows=rows)
    with pytest.raises(ValueError, match="x is 9 wide, the gates read 24"):
        call.run(torch.zeros(2, 9))


# --- Late gates -----------------------------------------------------------------------------------------


def late_group(dtype: torch.dtype) -> tuple[Tensor, list[Member], SlotTable, Pairs, Pairs]:
    """Tokens 1 and 2 use the experts 0..3 of one content and 4..5 of another, token 0 none; two sites."""
    widths = [(WIDTH, 40), (WIDTH, 16)]
    table = SlotTable(widths, 6)
    table.put([0, 1, 2, 3], pack(widths, [[3, 2], [0, 1], [4, 0], [1, 5]], seed=1))
    table.put([4, 5], pack(widths, [[2, 2], [9, 1]], seed=2))
    members = [Member(torch.randn(o, WIDTH).to(dtype), None, s) for s, (_, o) in enumerate(widths)]
    token = torch.tensor([1, 1, 1, 1, 2, 2, 0], dtype=torch.int32)
    slot = torch.tensor([0, 1, 2, 3, 4, 5, -1], dtype=torch.int32)
    first = Pairs(token, token, slot, torch.zeros(7), 3, 3)
    second = replace(first, cache={})
    return torch.randn(3, WIDTH).to(dtype), members, table, first, second


def late_call() -> LateCall:
    gates = [late_gate([3, 0, 4, 1]), late_gate([2, 9], seed=1)]
    return LateCall(gates, torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([0, 4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_late_gates_weigh_the_experts_at_every_site_of_the_unit(
    variant: str, dtype: torch.dtype
) -> None:
    x, members, table, first, second = late_group(dtype)
    call = late_call()
    got = group_linear(x, members, table, [first, second], gate=call)
    for token, gate, at in ((1, call.gates[0], slice(0, 4)), (2, call.gates[1], slice(4, 6))):
        a_R = torch.cat([table.rows_of(slot, 0)[0] for slot in first.slot[at].tolist()])
        want = gate.weights((a_R @ x[token].float()).unsqueeze(0))[0]
        torch.testing.assert_close(first.weight[at], want, rtol=1e-4, atol=1e-5)
    assert torch.equal(first.weight, second.weight) and first.weight is second.weight
    fixed = [replace(pairs, weight=first.weight.clone(), cache={}) for pairs in (first, second)]
    for y, want in zip(got, group_linear(x, members, table, fixed), strict=True):
        assert torch.equal(y, want)


def test_the_late_gate_of_mole_lowers_to_the_same_weights(variant: str) -> None:
    router, rows = mole_router()
    gate = router.lowered()
    assert isinstance(gate, LateGate)
    t_NR = torch.randn(7, 9)
    want = router(view(t_NR), EVERYTHING).weight
    assert want is not None
    torch.testing.assert_close(gate.weights(t_NR), want.detach(), rtol=1e-4, atol=1e-6)
    masked = replace(gate, mask_E=torch.tensor([True, False, True]))
    want = router(replace(view(t_NR), mask_E=masked.mask_E), EVERYTHING).weight
    assert want is not None
    torch.testing.assert_close(masked.weights(t_NR), want.detach(), rtol=1e-4, atol=1e-6)
    kernel_weights(masked, rows, want.detach(), t_NR)


def kernel_weights(gate: LateGate, rows: Rows, want: Tensor, t_NR: Tensor) -> None:
    """t is made to be the input itself, so that A is the identity."""
    widths = [(9, 20)]
    table = SlotTable(widths, 3)
    packed = pack(widths, [[2], [4], [3]])
    for e, rank in enumerate((2, 4, 3)):
        at = int(packed.a_at[e, 0])
        start = (0, 2, 6)[e]
        packed.blob[at : at + 36 * rank].view(torch.float32).view(rank, 9).copy_(
            torch.eye(9)[start : start + rank]
        )
    table.put([0, 1, 2], packed)
    n = t_NR.shape[0]
    token = torch.arange(n, dtype=torch.int32).repeat_interleave(3)
    pairs = Pairs(token, token, torch.arange(3).repeat(n).int(), torch.zeros(3 * n), n, n)
    index = torch.arange(n)
    call = LateCall([gate], index, 0 * index, 3 * index)
    member = Member(torch.zeros(20, 9), None, 0)
    group_linear(t_NR, [member], table, [pairs], gate=call)
    torch.testing.assert_close(pairs.weight.view(n, 3), want, rtol=1e-4, atol=1e-6)


def mole_router() -> tuple[MoLEGate, Rows]:
    spans = Spans.packed([2, 4, 3], [0.5, 2.0, 1.0])
    rows = Rows(spans, torch.randn(9, 12), torch.randn(9, 20))
    router = MoLEGate(MoLEConfig(adapters=("a", "b", "c")), 20)
    router.bind(rows)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.constant_(router.log_tau, 0.4)
    return router, rows


def view(x_ND: Tensor) -> RouteView:
    n = x_ND.shape[0]
    flags = torch.ones(n, dtype=torch.bool)
    zero = torch.zeros(n, dtype=torch.long)
    return RouteView(x_ND, zero, flags, flags, 1, False, lambda **_: None)


def test_a_token_of_nan_weighs_nobody_else(variant: str) -> None:
    x, members, table, first, second = late_group(torch.float32)
    before = group_linear(x, members, table, [first, second], gate=late_call())
    weight = first.weight.clone()
    x[1] = float("nan")
    after = group_linear(x, members, table, [first, second], gate=late_call())
    assert bool(first.weight[:4].isnan().all()) and torch.equal(first.weight[4:], weight[4:])
    for was, now in zip(before, after, strict=True):
        assert bool(now[1].isnan().all()) and torch.equal(was[[0, 2]], now[[0, 2]])


def test_a_gate_for_other_experts_is_an_error(variant: str) -> None:
    x, members, table, first, second = late_group(torch.float32)
    index = torch.tensor([0])
    for gate, token, pair in (
        (late_gate([3, 0, 4, 2]), 1, 0),
        (late_gate([3, 0, 4, 1]), 2, 0),
        (late_gate([2, 9], seed=1), 2, 6),
        (late_gate([9, 0]), 2, 5),
    ):
        call = LateCall([gate], index + token, index, index + pair)
        with pytest.raises(ValueError, match="late gate is for other experts"):
            group_linear(x, members, table, [first, second], gate=call)
    with pytest.raises(ValueError, match="it needs pairs there"):
        group_linear(x, members, table, [None, second], gate=late_call())
    with pytest.raises(ValueError, match="at least one of 2 experts"):
        late_gate([1, 1], mask=[False, False])
    with pytest.raises(ValueError, match="total_E is .* wants"):
        replace(late_gate([1, 1]), total_E=torch.zeros(3))


# --- What lowers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["mixlora", "mixlora-switch"])
@pytest.mark.parametrize("parity", [False, True])
def test_token_routers_lower_to_the_same_choice(strategy: str, parity: bool) -> None:
    config = MixLoRAConfig(num_experts=5, routing_strategy=strategy, published_parity=parity)
    router = TokenRouter(config, WIDTH)
    torch.nn.init.normal_(router.weight)
    gate = router.lowered()
    assert isinstance(gate, TopKGate)
    x = torch.randn(30, WIDTH)
    expert, weight = gate.choose(x)
    route = router(view(x), EVERYTHING)
    assert route.slot is not None and torch.equal(expert, route.slot)
    torch.testing.assert_close(weight, route.weight)


def test_routers_that_no_kernel_can_run_say_so() -> None:
    dynamic = TokenRouter(MixLoRAConfig(routing_strategy="mixlora-dynamic"), WIDTH)
    assert dynamic.lowered() is None
    router, rows = mole_router()
    pooled = MoLEGate(MoLEConfig(adapters=router.names, pool="prompt_mean"), 20)
    pooled.bind(rows)
    assert pooled.lowered() is None

    class Own(Router):
        scope = "block"

    assert Own().lowered() is None
