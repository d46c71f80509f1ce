"""Decode steps on a GPU as graphs: captured once per size of batch, replayed with new numbers in the same tensors.

Why: a decode step of a small model is hundreds of small kernels, and launching them from Python takes longer than they
run. A captured step is one launch. It reads tensors that never move: ids, positions, places in the KV pool, lengths,
block tables, and the pairs of the adapters. A step is padded to the next size: its spare rows have no place in the pool
and no length, its spare pairs no slot, so they write nothing and add nothing. What slots hold may change between steps,
because kernels find rows through tables on the device.

Only steps whose pairs are known beforehand are taken: one token per sequence, nothing left for routers to decide.

Letters: N rows of the captured step, n of them in use, S sites, P pairs, W blocks a row of the table has room for, V
vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loramux.engine.kv import KVPool
from loramux.engine.probe import configs_of
from loramux.engine.program import Program
from loramux.engine.sequence import StepPlan
from loramux.engine.wiring import Wiring
from loramux.ops.choose import MAX_TRITON_ROWS, why_not
from loramux.ops.contract import Pairs
from loramux.ops.paged import PagedRows
from loramux.ops.paged_triton import KEY, DecodeTable
from loramux.ops.pool_triton import Destinations, set_destinations
from loramux.ops.triton import is_interpreted

SPARE = (0, 0, -1, 0)  # id, position, place, length of a row that is nobody's
MAX_GRAPHS = 64  # of one engine; the longest unused goes
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
LENGTH_BOUND = ("dynamic", "longrope")  # rope types that look at positions on the host
Work = Callable[[], Tensor]
Forward = Callable[[Program, PagedRows, Tensor, Tensor], Tensor]


class Capture(Protocol):
    """Turns work on tensors that stay where they are into something that does it again, and gives the same tensor."""

    def __call__(self, work: Work) -> Work: ...


class CudaCapture:
    """Real graphs. They share one pool of memory, so a graph's intermediate results lie where another's lay."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pool: Any = None

    def __call__(self, work: Work) -> Work:
        with torch.cuda.device(self.device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            # Kernels are compiled and libraries make their work space outside the capture.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work()
                work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Only this thread is watched: adapters are read by another one meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = work()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class RunAgain:
    """No graph: the same work on the same tensors. For Triton's interpreter, where there is nothing to capture."""

    def __call__(self, work: Work) -> Work:
        return work


@dataclass(frozen=True)
class Size:
    """What a graph is captured for: rows and pairs."""

    rows: int
    pairs: int

    @classmethod
    def of(cls, program: Program) -> Size:
        rows = _up(program.num_tokens)
        return cls(rows, _up(max(program.num_pairs, rows)) if program.num_pairs else 0)


class StaticProgram(Program):
    """Pairs that are filled in from another program, in place. Every site has weights of its own."""

    def __init__(self, size: Size, num_sites: int, device: torch.device):
        super().__init__((), num_sites, device)
        self.num_tokens, self.num_pairs, self.differs = size.rows, size.pairs, True
        self.token = torch.zeros(size.pairs, dtype=torch.int32, device=device)
        self.slot = torch.full((size.pairs,), -1, dtype=torch.int32, device=device)
        self.weight = torch.zeros(num_sites, size.pairs, dtype=torch.float32, device=device)
        order = torch.arange(size.pairs, dtype=torch.int32, device=device)
        begin = torch.zeros(size.rows + 1, dtype=torch.int32, device=device)
        self.destinations = Destinations(order, begin)

    def pairs_at(self, site: int) -> Pairs | None:
        pairs = super().pairs_at(site)
        if pairs is not None:
            set_destinations(pairs, self.destinations)
        return pairs

    def take(self, program: Program) -> None:
        """The same pairs as in a decode step's program, whose pairs come token by token."""
        used = program.num_pairs
        self.slot.fill_(-1)
        self.slot[:used] = program.slot
        self.token[:used] = program.token
        self.weight[:, :used] = program.weight
        counts = torch.zeros(self.num_tokens, dtype=torch.int32)
        for entry in program.entries:
            counts[entry.first] += entry.width
        self.destinations.begin[1:] = counts.cumsum(0, dtype=torch.int32).to(self.device)


class Step:
    """The tensors of a captured step, and how a plan is written into them."""

    def __init__(self, size: Size, num_sites: int, table_width: int, pool: KVPool):
        rows, device = size.rows, pool.device
        self.pool = pool
        self.program = StaticProgram(size, num_sites, device)
        self.numbers = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self.blocks = torch.zeros(rows, table_width, dtype=torch.int32, device=device)
        self.ids, self.positions = self.numbers[0:1], self.numbers[1:2]
        none = torch.zeros(0, dtype=torch.int32)
        table = DecodeTable(
            torch.arange(rows, dtype=torch.int32, device=device), self.numbers[3], self.blocks
        )
        self.rows = PagedRows(self.numbers[2], none, none, none, none, cache={KEY: table})
        self.replay: Work | None = None
        self.held: Program | None = None

    def fill(self, plan: StepPlan, program: Program) -> None:
        """Write a step's numbers; pairs only where they are not those of the step before."""
        size, count = self.pool.block_size, len(plan.chunks)
        owned = [chunk.sequence.blocks[: chunk.start // size + 1] for chunk in plan.chunks]
        width = max(map(len, owned))
        rows = [
            (
                chunk.sequence.tokens[at := chunk.start],
                at,
                own[at // size] * size + at % size,
                at + 1,
            )
            for chunk, own in zip(plan.chunks, owned, strict=True)
        ]
        rows += [SPARE] * (self.numbers.shape[1] - count)
        self.numbers.copy_(torch.tensor(rows).T)
        blocks = torch.tensor([own + [0] * (width - len(own)) for own in owned], dtype=torch.int32)
        self.blocks[:count, :width] = blocks.to(self.blocks.device)
        if program is not self.held:
            self.program.take(program)
            self.held = program


class DecodeGraphs:
    """All captured steps of an engine. `forward` runs the model on a program, rows of the pool, ids and positions."""

    def __init__(
        self, forward: Forward, pool: KVPool, num_sites: int, table_width: int, capture: Capture
    ):
        self.forward, self.pool, self.capture = forward, pool, capture
        self.num_sites, self.table_width = num_sites, table_width
        self.captured = self.replayed = 0
        self._steps: OrderedDict[Size, Step] = OrderedDict()

    def takes(self, program: Program) -> bool:
        """Whether all that a step does is known before it runs."""
        if not program.is_decode or _up(program.num_tokens) > MAX_TRITON_ROWS:
            return False
        if (
            program.late
            or program.layers
            or program.sited
            or program.routed_blocks
            or program.has_hidden
        ):
            return False
        return all(e.is_decided() for e in program.entries if e.facts.routes_on_prompt)

    def run(self, plan: StepPlan, program: Program) -> Tensor:
        """[n, V], the caller's own."""
        self.pool.copy(plan.copies)
        size = Size.of(program)
        step = self._steps.get(size)
        if step is None:
            step = Step(size, self.num_sites, self.table_width, self.pool)
            step.fill(plan, program)
            step.replay = self.capture(self._work(step))
            self._keep(size, step)
        else:
            self._steps.move_to_end(size)
            step.fill(plan, program)
        assert step.replay is not None
        with torch.inference_mode():
            logits = step.replay()[0, : len(plan.chunks)].clone()
        self.replayed += 1
        return logits

    def _work(self, step: Step) -> Work:
        def work() -> Tensor:
            return self.forward(step.program, step.rows, step.ids, step.positions)

        return work

    def _keep(self, size: Size, step: Step) -> None:
        self.captured += 1
        self._steps[size] = step
        if len(self._steps) > MAX_GRAPHS:
            self._steps.popitem(last=False)

    def forget(self) -> None:
        """Nothing runs: programs hold contents, which may go. What was captured stays."""
        for step in self._steps.values():
            step.held = None


def why_not_captured(model: nn.Module, wiring: Wiring) -> str:
    """Empty if decode steps of this model can be captured, else the reason."""
    weight = next(model.parameters())
    if weight.device.type != "cuda" and not is_interpreted():
        return f"the model is on {weight.device.type}"
    obstacle = why_not("triton", weight.device, weight.dtype, needs_grad=False)
    if obstacle:
        return obstacle
    if not all(group.is_fusable for group in wiring.groups):
        return "linears are quantised, or of a dtype that the adapters' kernels do not compute"
    for config in configs_of(model):
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        if any(getattr(config, name, None) for name in EXPERT_COUNTS):
            return (
                "the base is a mixture of experts, which may wait for the host to read its routes"
            )
        if any(f"'{kind}'" in str(rope) for kind in LENGTH_BOUND):
            return "its rotary embedding depends on the longest sequence of the step"
    return ""


def _up(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
