"""A pass of the bare base over the tokens of those whose routers read its last hidden state (X-LoRA), before the step.

Its keys and values lie in a pool of their own, the twin of the engine's: under the same block ids, so that whoever
shares, copies, caches or gives back a block does so in both. It is made when the first such token runs; on a CPU only
the blocks that are written take memory.

Letters: N tokens of the step, M those that are run twice, D width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loramux.core.prepass import HiddenRouter
from loramux.engine.attention import Paging, lay_out
from loramux.engine.kv import KVPool
from loramux.engine.latecalls import ask_router
from loramux.engine.program import Entry, Program
from loramux.engine.sequence import Chunk, StepPlan
from loramux.engine.siteroutes import dense
from loramux.engine.wiring import Wiring
from loramux.ops.paged import PagedRows


class TwinPass:
    """Runs the bare base and fills in what the routers make of it. `pool` is None until somebody needs it."""

    def __init__(self, model: nn.Module, wiring: Wiring, paging: Paging):
        body: Any = getattr(model, getattr(model, "base_model_prefix", ""), None)
        self.body: Any = body if isinstance(body, nn.Module) else model
        self.wiring, self.paging = wiring, paging
        self.pool: KVPool | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.pool is None else self.pool.nbytes

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """As in the engine's own pool, whoever they belong to."""
        if self.pool is not None:
            self.pool.copy(pairs)

    def run(self, plan: StepPlan, program: Program) -> None:
        """Weights of entries with hidden routers are those of this step afterwards; their KV is in the twin."""
        entries = [entry for entry in program.entries if entry.facts.hidden]
        if self.pool is None and not self._make(entries):
            return
        readers = {entry.sample for entry in entries}
        chunks = [chunk for chunk in plan.chunks if chunk.sequence in readers]
        hidden_MD = self._base(chunks)
        first_of, first = {}, 0
        for chunk in chunks:
            first_of[chunk.sequence] = first
            first += chunk.count
        for entry in entries:
            own = slice(first_of[entry.sample], first_of[entry.sample] + entry.count)
            self._weigh(program, entry, hidden_MD[own])

    def _make(self, entries: Sequence[Entry]) -> bool:
        own = self.paging.pool
        try:
            self.pool = KVPool(own.shapes, own.num_blocks, own.block_size, own.dtype, own.device)
        except RuntimeError as error:  # of a GPU that has no such room left
            for entry in entries:
                entry.fail(
                    f"{entry.content.method.title} needs a second KV pool of {own.nbytes:,} bytes, which could not be "
                    f"made ({str(error).splitlines()[0]}); give the engine half as much kv_memory"
                )
            return False
        return True

    def _base(self, chunks: Sequence[Chunk]) -> Tensor:
        assert self.pool is not None
        tokens: list[int] = []
        positions: list[int] = []
        for chunk in chunks:
            end = chunk.start + chunk.count
            tokens += chunk.sequence.tokens[chunk.start : end]
            positions += range(chunk.start, end)
        device = self.wiring.device
        rows: PagedRows = lay_out(chunks, self.pool)
        try:
            self.paging.serve(rows, self.pool)
            self.wiring.begin(None)
            with torch.inference_mode():
                out = self.body(
                    input_ids=torch.tensor([tokens], device=device),
                    position_ids=torch.tensor([positions], device=device),
                    use_cache=False,
                )
        except BaseException:
            self.wiring.forget()
            raise
        finally:
            self.wiring.end()
            self.paging.end()
        hidden: Tensor = out[0]
        return hidden[0]

    def _weigh(self, program: Program, entry: Entry, hidden_nD: Tensor) -> None:
        for path, router in entry.facts.hidden.items():
            assert isinstance(router, HiddenRouter)
            route = ask_router(entry, router, hidden_nD)
            if entry.sample.failure is not None:
                return
            apart = router.spread(route)
            if not apart:
                program.fill(entry, entry.facts.governed[path], dense(route, entry))
            for site, own in apart.items():
                index = self.wiring.site_index[site]
                program.fill(entry, (index,), dense(own, entry))
