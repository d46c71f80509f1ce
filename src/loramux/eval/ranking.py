"""Likelihood ranking: which of the given choices is most likely after the question?

Why two layouts: `tree` runs a question and all its choices as one row (a 4-D mask lets each
choice see the question and itself only), so every question is computed once; `rows` runs one
plain row per choice and is the definition that `tree` is tested against. Both give each choice
the value of a pass of its own.

Routing: only the question is marked as prompt, so a mixture routes a choice exactly as it would
route the question alone, and the choices of one question share one request.

Letters: B rows, T width, U kept columns, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["tree", "rows"]
METRICS = ("token", "raw", "byte")
# The families that the tests run in both layouts. Elsewhere a 4-D mask can change the meaning: ALiBi counts columns,
# local attention builds its own window, and some models take no such mask at all.
TREE_MODEL_TYPES = frozenset(
    {"llama", "qwen2", "qwen3", "gemma", "gemma3_text", "mistral", "phi3", "gpt2"}
)


@dataclass(frozen=True)
class ChoiceRow:
    """A question and its choices as token ids; `num_bytes` counts the text of each choice.

    task: what a router that goes by tasks is told; None where it is not known.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    num_bytes: tuple[int, ...]
    task: str | None = None

    def __post_init__(self) -> None:
        if not self.prompt or not self.choices or not all(self.choices):
            raise ValueError(
                "a row to rank needs a prompt and at least one choice, each of one token or more; "
                f"got {len(self.prompt)} prompt tokens and choices of "
                f"{[len(c) for c in self.choices]} tokens"
            )
        assert len(self.num_bytes) == len(self.choices)

    @property
    def num_tokens(self) -> int:
        """Width in the tree layout: the last token of a choice is never an input."""
        return len(self.prompt) + sum(len(c) - 1 for c in self.choices)

    @property
    def max_position(self) -> int:
        return len(self.prompt) + max(map(len, self.choices))


@dataclass(frozen=True)
class ChoiceScores:
    """Sum of the token log-probabilities of every choice of one row.

    `greedy` says of each choice whether greedy decoding would have produced it.
    """

    row: ChoiceRow
    sums: tuple[float, ...]
    greedy: tuple[bool, ...] = ()

    def values(self, metric: str) -> list[float]:
        """Scores: `raw` is the sum, `token` the mean per token, `byte` the sum over the bytes."""
        if metric == "raw":
            return list(self.sums)
        if metric == "token":
            sizes: Sequence[int] = [len(choice) for choice in self.row.choices]
        elif metric == "byte":
            sizes = self.row.num_bytes
        else:
            raise ValueError(f"unknown ranking metric {metric!r}; use one of {', '.join(METRICS)}")
        return [total / size for total, size in zip(self.sums, sizes, strict=True)]

    def best(self, metric: str) -> int:
        """Index of the winner; the first one on a tie."""
        values = self.values(metric)
        return values.index(max(values))


def choice_scores(
    model: Any,
    rows: Sequence[ChoiceRow],
    *,
    layout: Layout | None = None,
    pad_token_id: int = 0,
    adapters: Sequence[str | None] | None = None,
) -> list[ChoiceScores]:
    """Scores of one batch: all rows given here go through the model at once.

    adapters: that of each row, by its name on the model's handle, None for the base; without it the one in use.
    """
    import torch

    if layout is None:
        layout = best_layout(model, max(row.max_position for row in rows))
    build = {"tree": _tree_batch, "rows": _rows_batch}[layout]
    with torch.inference_mode():
        results = _score(model, build(model, rows, pad_token_id), adapters)
    return [
        ChoiceScores(row, tuple(sums), tuple(greedy))
        for row, (sums, greedy) in zip(rows, results, strict=True)
    ]


def best_layout(model: Any, num_tokens: int) -> Layout:
    """`tree` wherever a 4-D mask is known to mean the same as the model's own masking, else `rows`."""
    if model.config.model_type not in TREE_MODEL_TYPES:
        return "rows"
    config = model.config.get_text_config()
    if getattr(config, "_attn_implementation", "eager") not in ("eager", "sdpa"):
        return "rows"
    window = getattr(config, "sliding_window", None)
    # A given 4-D mask replaces the sliding window; shorter rows never reach it.
    return "rows" if window is not None and num_tokens > window else "tree"


@dataclass
class _Batch:
    """What one forward pass is given, and which log-probabilities to take from it.

    `where[i] = (row, column)` predicts the token `targets[i]` of choice `owners[i]`, which is
    (question, choice).
    """

    inputs: dict[str, Tensor]
    prompt_mask: Tensor
    where: list[tuple[int, int]]
    targets: list[int]
    owners: list[tuple[int, int]]
    num_choices: list[int]
    tasks: list[str | None]


def _tree_batch(model: Any, rows: Sequence[ChoiceRow], pad_token_id: int) -> _Batch:
    """Questions end at the same column (padding on the left), then come their choices in turn.

    With the ends aligned, the columns whose logits are needed are nearly the same for all rows.
    """
    import torch

    start = max(len(row.prompt) for row in rows)
    width = start + max(row.num_tokens - len(row.prompt) for row in rows)
    ids_BT = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    positions_BT = torch.zeros_like(ids_BT)
    prompt_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
    # Every position sees itself, padding too: a row of the mask without a single entry gives NaN.
    see_BTT = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    tasks = [row.task for row in rows]
    batch = _Batch({}, prompt_BT, [], [], [], [len(row.choices) for row in rows], tasks)
    for b, row in enumerate(rows):
        n = len(row.prompt)
        begin = start - n
        ids_BT[b, begin:start] = torch.tensor(row.prompt)
        positions_BT[b, begin:start] = torch.arange(n)
        prompt_BT[b, begin:start] = True
        see_BTT[b, begin:start, begin:start] = torch.ones(n, n, dtype=torch.bool).tril()
        at = start
        for c, tokens in enumerate(row.choices):
            k = len(tokens) - 1
            ids_BT[b, at : at + k] = torch.tensor(tokens[:-1], dtype=torch.long)
            positions_BT[b, at : at + k] = torch.arange(n, n + k)
            see_BTT[b, at : at + k, begin:start] = True
            see_BTT[b, at : at + k, at : at + k] = torch.ones(k, k, dtype=torch.bool).tril()
            batch.where += [(b, start - 1)] + [(b, at + i) for i in range(k)]
            batch.targets += tokens
            batch.owners += [(b, c)] * len(tokens)
            at += k
    lowest = torch.finfo(model.dtype).min
    mask_BTT = torch.zeros(see_BTT.shape, dtype=model.dtype).masked_fill_(~see_BTT, lowest)
    batch.inputs = {
        "input_ids": ids_BT,
        "attention_mask": mask_BTT[:, None],
        "position_ids": positions_BT,
    }
    return batch


def _rows_batch(model: Any, rows: Sequence[ChoiceRow], pad_token_id: int) -> _Batch:
    """One row per question and choice, padded on the right."""
    import torch

    flat = [
        (b, c, row.prompt, choice)
        for b, row in enumerate(rows)
        for c, choice in enumerate(row.choices)
    ]
    width = max(len(prompt) + len(choice) - 1 for _, _, prompt, choice in flat)
    ids_BT = torch.full((len(flat), width), pad_token_id, dtype=torch.long)
    seen_BT = torch.zeros_like(ids_BT)
    prompt_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
    tasks = [rows[b].task for b, *_ in flat]
    batch = _Batch({}, prompt_BT, [], [], [], [len(row.choices) for row in rows], tasks)
    for i, (b, c, prompt, choice) in enumerate(flat):
        n, tokens = len(prompt), prompt + choice[:-1]
        ids_BT[i, : len(tokens)] = torch.tensor(tokens)
        seen_BT[i, : len(tokens)] = 1
        prompt_BT[i, :n] = True
        batch.where += [(i, n - 1 + j) for j in range(len(choice))]
        batch.targets += choice
        batch.owners += [(b, c)] * len(choice)
    batch.inputs = {"input_ids": ids_BT, "attention_mask": seen_BT}
    return batch


def _score(
    model: Any, batch: _Batch, adapters: Sequence[str | None] | None = None
) -> list[tuple[list[float], list[bool]]]:
    """One forward pass, then log-probabilities added up and argmaxes compared per choice."""
    import torch

    from loramux.core.attach import handle_of

    where = torch.tensor(batch.where)
    # One list of columns for the batch: not every transformers version takes one per row.
    columns_U, kept = where[:, 1].unique(return_inverse=True)
    device = model.device
    inputs: dict[str, Any] = {name: t.to(device) for name, t in batch.inputs.items()}
    if handle_of(model) is not None:
        inputs["prompt_mask"] = batch.prompt_mask.to(device)
        inputs["tasks"] = batch.tasks
    with _requests_of(model, batch, adapters):
        logits_BUV = model(**inputs, use_cache=False, logits_to_keep=columns_U.to(device)).logits
    # Choices share the prediction after the question, so every distinct place is normalised once.
    pairs = torch.stack((where[:, 0], kept), 1)
    places, place = pairs.unique(dim=0, return_inverse=True)
    picked = logits_BUV[places[:, 0].to(device), places[:, 1].to(device)].float()
    targets, place = torch.tensor(batch.targets, device=device), place.to(device)
    values = (picked[place, targets] - picked.logsumexp(-1)[place]).tolist()
    firsts = (picked.argmax(-1)[place] == targets).tolist()
    results = [([0.0] * count, [True] * count) for count in batch.num_choices]
    for (b, c), value, is_first in zip(batch.owners, values, firsts, strict=True):
        if math.isnan(value):
            raise ValueError("the model returned NaN log-probabilities; check adapter and dtype")
        results[b][0][c] += value
        results[b][1][c] &= is_first
    return results


def _requests_of(
    model: Any, batch: _Batch, adapters: Sequence[str | None] | None
) -> AbstractContextManager[None]:
    """Inside, every row of the call runs the adapter of its question."""
    from loramux.core.attach import handle_of

    if adapters is None:
        return nullcontext()
    handle = handle_of(model)
    if len(batch.tasks) == len(adapters):
        return handle.batch(adapters=adapters)  # type: ignore[no-any-return]
    named = [
        name for name, count in zip(adapters, batch.num_choices, strict=True) for _ in range(count)
    ]
    return handle.batch(adapters=named)  # type: ignore[no-any-return]
