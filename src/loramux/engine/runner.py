"""Runs one step: packs its tokens into one row, tells linears and attention who is who, returns logits to sample from.

Letters: N tokens of the step, L rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loramux.engine.attention import Paging, lay_out
from loramux.engine.graph import DecodeGraphs
from loramux.engine.program import Program
from loramux.engine.promptlogs import Wanted, note_prompts, wanted_rows
from loramux.engine.sequence import Sequence, StepPlan
from loramux.engine.twin import TwinPass
from loramux.engine.wiring import Wiring
from loramux.ops.paged import PagedRows


class Runner:
    """Owns the packed forward. Programs of decode steps are kept while the same sequences decode."""

    def __init__(self, model: nn.Module, wiring: Wiring, paging: Paging):
        self.model, self.wiring, self.paging = model, wiring, paging
        self.device = wiring.device
        self.twin = TwinPass(model, wiring, paging)
        self.graphs: DecodeGraphs | None = None  # None: every step runs launch by launch
        self._kept: tuple[tuple[int, ...], Program] | None = None

    def run(self, plan: StepPlan) -> tuple[Tensor, list[Sequence]]:
        """(logits [L, V], the sequences they belong to). KV of all tokens of the plan lies in the pool afterwards."""
        program = self._program(plan)
        samplers = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        if self.graphs is not None and self.graphs.takes(program):
            self.twin.copy(plan.copies)
            return self.graphs.run(plan, program), samplers
        self.paging.pool.copy(plan.copies)
        self.twin.copy(plan.copies)
        if program.has_hidden:
            self.twin.run(plan, program)
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        scored: list[int] = []  # rows about tokens of a prompt
        scored_of: Wanted = []
        for chunk in plan.chunks:
            end = chunk.start + chunk.count
            tokens += chunk.sequence.tokens[chunk.start : end]
            positions += range(chunk.start, end)
            if chunk.samples:
                wanted.append(len(tokens) - 1)
            first = len(tokens) - end
            scored += [first + position for position in wanted_rows(chunk)]
            scored_of += [(chunk.sequence, position) for position in wanted_rows(chunk)]
        logits = self.forward(
            program,
            lay_out(plan.chunks, self.paging.pool),
            torch.tensor([tokens], device=self.device),
            torch.tensor([positions], device=self.device),
            # Without samplers the last row is computed and dropped: 0 would mean all rows.
            torch.tensor([*wanted, *scored] or [len(tokens) - 1], device=self.device),
        )
        program.settle()
        if scored:
            note_prompts(logits[0, len(wanted) :], scored_of)
        return logits[0, : len(wanted)], samplers

    def forward(
        self,
        program: Program,
        rows: PagedRows,
        ids: Tensor,
        positions: Tensor,
        keep: Tensor | int = 0,
    ) -> Tensor:
        """Logits [1, L, V] of the rows `keep`, 0 meaning all, of ids and positions [1, N]."""
        try:
            self.paging.serve(rows)
            self.wiring.begin(program)
            with torch.inference_mode():
                out = self.model(
                    input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep
                )
        except BaseException:
            self.wiring.forget()
            raise
        finally:
            self.wiring.end()
            self.paging.end()
        logits: Tensor = out.logits
        return logits

    def _program(self, plan: StepPlan) -> Program:
        key = tuple(chunk.sequence.order for chunk in plan.chunks)
        is_decode = all(chunk.count == 1 and chunk.samples for chunk in plan.chunks)
        if is_decode and self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        program = Program(plan.chunks, len(self.wiring.sites), self.device)
        # A decode program is right as long as no entry has still to decide on its prompt.
        reusable = is_decode and not any(
            e.facts.routes_on_prompt and not e.is_decided() for e in program.entries
        )
        self._kept = (key, program) if reusable else None
        return program

    def forget(self) -> None:
        """Nothing runs: what the last step held may go. Captured steps stay."""
        self._kept = None
        if self.graphs is not None:
            self.graphs.forget()

    def close(self) -> None:
        self.forget()
        self.graphs = None
