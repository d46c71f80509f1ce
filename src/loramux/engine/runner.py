"""Runs one step: packs its tokens into one row, tells linears and attention who is who, returns logits to sample from.

Letters: N tokens of the step, L rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loramux.engine.attention import Paging
from loramux.engine.program import Program
from loramux.engine.sequence import Sequence, StepPlan
from loramux.engine.wiring import Wiring


class Runner:
    """Owns the packed forward. Programs of decode steps are kept while the same sequences decode."""

    def __init__(self, model: nn.Module, wiring: Wiring, paging: Paging):
        self.model, self.wiring, self.paging = model, wiring, paging
        self.device = wiring.device
        self._kept: tuple[tuple[int, ...], Program] | None = None

    def run(self, plan: StepPlan) -> tuple[Tensor, list[Sequence]]:
        """(logits [L, V], the sequences they belong to). KV of all tokens of the plan lies in the pool afterwards."""
        program = self._program(plan)
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        samplers: list[Sequence] = []
        for chunk in plan.chunks:
            end = chunk.start + chunk.count
            tokens += chunk.sequence.tokens[chunk.start : end]
            positions += range(chunk.start, end)
            if chunk.samples:
                wanted.append(len(tokens) - 1)
                samplers.append(chunk.sequence)
        try:
            self.paging.begin(plan)
            self.wiring.begin(program)
            with torch.inference_mode():
                out = self.model(
                    input_ids=torch.tensor([tokens], device=self.device),
                    position_ids=torch.tensor([positions], device=self.device),
                    use_cache=False,
                    # Without samplers the last row is computed and dropped: 0 would mean all rows.
                    logits_to_keep=torch.tensor(wanted or [len(tokens) - 1], device=self.device),
                )
        except BaseException:
            self.wiring.forget()
            raise
        finally:
            self.wiring.end()
            self.paging.end()
        program.settle()
        return out.logits[0, : len(wanted)], samplers

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
        """Nothing runs: what the last step held may go."""
        self._kept = None
