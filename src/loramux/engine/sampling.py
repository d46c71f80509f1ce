"""Chooses the next token of every sequence of a step, and reports probabilities to those that asked.

The order is that of transformers: repetition penalty, the two OpenAI penalties, bans before `min_tokens`; then
temperature, top_k, top_p, min_p. Greedy rows stop after the bans and draw nothing.

Why not row by row: at 64 rows and 49152 tokens that costs more than the model's step. Rows with the same kind of
processing go together; only cut rows look at sorted logits, and then at the few hundred largest (see cuts.py). What a
row draws depends on its own logits and its own generator alone: ties go to the lower token id, sums run in an order
that does not depend on the batch.

Letters: B rows, V vocabulary, S rows of one kind, E edited rows or edited logits, N blocks of W logits.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramux.engine.cuts import draw_cut, host_view
from loramux.engine.request import NOT_FINITE, Reason, SamplingParams, TokenLogprob
from loramux.engine.sequence import Sequence

LEAST_TEMPERATURE = 1e-5  # ours: below this fp32 logits divided by it lose their differences
BLOCK = 256
_KEY = "sampling"

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Sampled:
    """One row's outcome: a token, with its probability if asked for, or an error and no token."""

    token: int | None
    logprob: TokenLogprob | None = None
    error: str | None = None


@torch.no_grad()
def sample(
    logits_BV: Tensor, sequences: Many[Sequence], eos_token_ids: Collection[int] = ()
) -> list[Sampled]:
    """The next token of each sequence, from the logits of its last one; `logits_BV` is left as it is.

    `eos_token_ids` are banned until `min_tokens` are there, like the request's own stop tokens. A row whose logits hold
    NaN, +inf or nothing finite gets an error; the others do not notice.
    """
    if logits_BV.dim() != 2 or logits_BV.shape[0] != len(sequences):
        given = tuple(logits_BV.shape)
        raise ValueError(
            f"logits must have one row per sequence, got {given} for {len(sequences)} sequences"
        )
    if not sequences:
        return []
    x_BV = logits_BV.float()
    states = [_state_of(sequence) for sequence in sequences]
    tokens, is_good = _argmax(x_BV)
    asked = [i for i, s in enumerate(sequences) if s.request.params.logprobs is not None]
    logs_SV = x_BV[asked].log_softmax(-1) if asked else None
    edited, x_BV = _edit(x_BV, logits_BV, sequences, states, eos_token_ids)
    if edited:
        x_EV = x_BV if len(edited) == len(sequences) else x_BV[edited]
        tokens[edited], is_allowed = _argmax(x_EV)
        is_good[edited] &= is_allowed
    _draw(x_BV, sequences, states, tokens, is_good)
    probabilities = _report(logs_SV, asked, sequences, tokens)
    return [
        Sampled(int(token), probabilities.get(row)) if good else Sampled(None, error=_BAD)
        for row, (token, good) in enumerate(zip(tokens, is_good, strict=True))
    ]


_BAD = Reason("the model's logits are not finite for this request; it ends here", NOT_FINITE)


@dataclass(eq=False)
class _State:
    """What sampling keeps of a sequence between steps.

    A generator of Python's own: a token needs one uniform number, and making or calling a torch generator costs
    several times that of the whole remaining row.
    """

    rng: random.Random
    counts: _Counts | None


def _state_of(sequence: Sequence) -> _State:
    state = sequence.scratch.get(_KEY)
    if state is None:
        params = sequence.request.params
        seed = None if params.seed is None else params.seed + sequence.index
        counts = _Counts() if _penalises(params) else None
        state = sequence.scratch[_KEY] = _State(random.Random(seed), counts)
    assert isinstance(state, _State)
    return state


def _penalises(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
    )


@dataclass(eq=False)
class _Counts:
    """The different tokens of a sequence and how often each is in the answer; grows with the sequence."""

    place: dict[int, int] = field(default_factory=dict)
    ids: Ints = field(default_factory=lambda: np.empty(64, np.int64))
    times: Floats = field(default_factory=lambda: np.zeros(64))
    num_seen: int = 0

    def update(self, sequence: Sequence, vocab: int) -> None:
        """Count what was appended since the last call. Tokens the head cannot produce are left out."""
        tokens, num_prompt = sequence.tokens, sequence.num_prompt
        for position in range(self.num_seen, len(tokens)):
            token = tokens[position]
            if not 0 <= token < vocab:
                continue
            at = self.place.setdefault(token, len(self.place))
            if at == len(self.ids):
                self.ids = np.concatenate([self.ids, np.empty_like(self.ids)])
                self.times = np.concatenate([self.times, np.zeros_like(self.times)])
            self.ids[at] = token
            self.times[at] += position >= num_prompt
        self.num_seen = len(tokens)


def _argmax(x_BV: Tensor) -> tuple[Ints, NDArray[np.bool_]]:
    """The first largest of each row, and whether it is finite; NaN counts as largest, so none is missed."""
    values = host_view(x_BV)
    if values is not None:
        best: Ints = values.argmax(-1)  # torch's takes ten times as long
        return best, np.isfinite(values[np.arange(len(best)), best])
    best_B = x_BV.argmax(-1)
    is_finite = x_BV.gather(1, best_B[:, None]).isfinite()[:, 0]
    return best_B.cpu().numpy(), is_finite.cpu().numpy()


def _edit(
    x_BV: Tensor,
    given: Tensor,
    sequences: Many[Sequence],
    states: Many[_State],
    eos: Collection[int],
) -> tuple[list[int], Tensor]:
    """Apply penalties and bans; returns the rows they touch, and the logits (a copy where `given` would change)."""
    vocab = x_BV.shape[1]
    banned = {row: _banned(s, eos, vocab) for row, s in enumerate(sequences)}
    penalised = [row for row, state in enumerate(states) if state.counts is not None]
    rows = sorted({row for row, ids in banned.items() if ids} | set(penalised))
    if not rows:
        return [], x_BV
    if x_BV.data_ptr() == given.data_ptr():
        x_BV = x_BV.clone()
    if penalised:
        _penalise(x_BV, [(row, sequences[row], states[row]) for row in penalised])
    flat = [row * vocab + token for row in rows for token in banned[row]]
    if flat:
        x_BV.view(-1)[torch.tensor(flat, device=x_BV.device)] = -torch.inf
    return rows, x_BV


def _banned(sequence: Sequence, eos: Collection[int], vocab: int) -> list[int]:
    params = sequence.request.params
    if sequence.num_generated >= params.min_tokens:
        return []
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos))
    return [token for token in sorted(ends) if 0 <= token < vocab]


def _penalise(x_BV: Tensor, rows: list[tuple[int, Sequence, _State]]) -> None:
    """Rescale what was seen: one gather and one scatter for the whole batch, over the tokens seen only."""
    vocab = x_BV.shape[1]
    flat: list[Ints] = []
    columns: list[Floats] = []  # [4, E of the row]: times, repetition, frequency, presence
    for row, sequence, state in rows:
        counts, params = state.counts, sequence.request.params
        assert counts is not None
        counts.update(sequence, vocab)
        num = len(counts.place)
        flat.append(counts.ids[:num] + row * vocab)
        column = np.empty((4, num))
        column[0] = counts.times[:num]
        column[1:] = np.array(
            [[params.repetition_penalty], [params.frequency_penalty], [params.presence_penalty]]
        )
        columns.append(column)
    at_E = torch.from_numpy(np.concatenate(flat)).to(x_BV.device)
    joined = torch.from_numpy(np.concatenate(columns, axis=1)).float().to(x_BV.device)
    times_E, repetition_E, frequency_E, presence_E = joined
    x_V = x_BV.view(-1)
    seen_E = x_V[at_E]
    seen_E = torch.where(seen_E < 0, seen_E * repetition_E, seen_E / repetition_E)
    x_V[at_E] = seen_E - frequency_E * times_E - presence_E * (times_E > 0)


def _draw(
    x_BV: Tensor,
    sequences: Many[Sequence],
    states: Many[_State],
    tokens: Ints,
    is_good: NDArray[np.bool_],
) -> None:
    """Overwrite `tokens` where the request samples: all rows without a sorted cut at once, all others at once."""
    kinds: dict[bool, list[int]] = {False: [], True: []}
    for row, sequence in enumerate(sequences):
        params = sequence.request.params
        if is_good[row] and not params.is_greedy:
            kinds[params.top_k > 0 or params.top_p < 1 or params.min_p > 0].append(row)
    for is_cut, rows in kinds.items():
        if rows:
            x_SV = x_BV if len(rows) == len(sequences) else x_BV[rows]
            wanted = [sequences[row].request.params for row in rows]
            heat_S = np.array([max(p.temperature, LEAST_TEMPERATURE) for p in wanted])
            uniform_S = np.array([states[row].rng.random() for row in rows])
            if is_cut:
                tokens[rows] = draw_cut(x_SV, wanted, heat_S, uniform_S)
            else:
                tokens[rows] = _draw_open(x_SV, heat_S, uniform_S)


def _draw_open(x_SV: Tensor, heat_S: Floats, uniform_S: Floats) -> Ints:
    """Draw from whole rows, in token order: first a block of the vocabulary, then a token in it."""
    heat_S1 = torch.from_numpy(heat_S).float().to(x_SV.device)[:, None]
    p_SV = (x_SV / heat_S1).softmax(-1)
    p_SV = torch.nn.functional.pad(p_SV, (0, -p_SV.shape[1] % BLOCK))
    p_SNW = p_SV.unflatten(1, (-1, BLOCK))
    rows = np.arange(len(heat_S))
    block, left = _invert(_array(p_SNW.sum(-1)), uniform_S, is_share=True)
    inside, _ = _invert(_array(p_SNW[rows, block]), left, is_share=False)
    return block * BLOCK + inside


def _invert(weights: Floats, targets: Floats, is_share: bool) -> tuple[Ints, Floats]:
    """Per row: the first index whose running sum exceeds the target, and what the target exceeds the one before by.

    A target beyond the sum (rounding) gets the last index of any weight. is_share: targets are shares of the sum.
    """
    sums = weights.cumsum(-1)
    if is_share:
        targets = targets * sums[:, -1]
    rows = np.arange(len(weights))
    last = weights.shape[1] - 1 - (weights[:, ::-1] > 0).argmax(-1)
    index = np.minimum((sums <= targets[:, None]).sum(-1), last)
    return index, targets - (sums[rows, index] - weights[rows, index])


def _array(x: Tensor) -> Floats:
    made: Floats = x.cpu().numpy().astype(np.float64)
    return made


def _report(
    logs_SV: Tensor | None, asked: list[int], sequences: Many[Sequence], tokens: Ints
) -> dict[int, TokenLogprob]:
    """Row -> logarithm of the chosen token's probability and the most likely ones; rows of one count together."""
    if logs_SV is None:
        return {}
    chosen: list[float] = logs_SV[range(len(asked)), tokens[asked].tolist()].tolist()
    tops: dict[int, tuple[tuple[int, float], ...]] = dict.fromkeys(range(len(asked)), ())
    counts: list[Any] = [sequences[row].request.params.logprobs for row in asked]
    for count in sorted(set(counts) - {0}):
        places = [place for place, c in enumerate(counts) if c == count]
        best = logs_SV[places].topk(min(count, logs_SV.shape[1]), dim=-1)
        for place, values, ids in zip(
            places, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            tops[place] = tuple(zip(ids, values, strict=True))
    return {
        row: TokenLogprob(int(tokens[row]), chosen[place], tops[place])
        for place, row in enumerate(asked)
    }
