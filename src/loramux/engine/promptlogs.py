"""Log-probabilities of the tokens of a prompt, for those that ask for them.

Why: scoring a text that is there already (evaluation harnesses do nothing else) needs no generation, only what the
model thought of each of its tokens. The row of position p says it of token p + 1.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from loramux.engine.request import TokenLogprob
from loramux.engine.sequence import Chunk, Sequence

ROWS_AT_ONCE = 64  # fp32 copies of more rows than this would double the memory of a long prompt

Wanted = list[tuple[Sequence, int]]  # whose row, and its position


def wanted_rows(chunk: Chunk) -> range:
    """Positions of this chunk whose rows are about a token of the prompt; empty where nobody asked."""
    sequence = chunk.sequence
    if sequence.request.params.prompt_logprobs is None:
        return range(0)
    return range(chunk.start, min(chunk.start + chunk.count, sequence.num_prompt - 1))


@torch.no_grad()
def note_prompts(logits_RV: Tensor, wanted: Wanted) -> None:
    """Write what these rows say into their sequences; a prompt that runs again says the same again."""
    for first in range(0, len(wanted), ROWS_AT_ONCE):
        part = wanted[first : first + ROWS_AT_ONCE]
        _note(logits_RV[first : first + ROWS_AT_ONCE].float().log_softmax(-1), part)


def _note(logs_RV: Tensor, wanted: Many[tuple[Sequence, int]]) -> None:
    tokens = [sequence.tokens[position + 1] for sequence, position in wanted]
    chosen = logs_RV[range(len(wanted)), tokens].tolist()
    most = max(sequence.request.params.prompt_logprobs or 0 for sequence, _ in wanted)
    best = logs_RV.topk(min(most, logs_RV.shape[1]), dim=-1)
    values, ids = best.values.tolist(), best.indices.tolist()
    for row, (sequence, position) in enumerate(wanted):
        count = sequence.request.params.prompt_logprobs or 0
        top = tuple(zip(ids[row][:count], values[row][:count], strict=True))
        sequence.prompt_logprobs[position + 1] = TokenLogprob(tokens[row], chosen[row], top)
