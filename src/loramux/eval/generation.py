"""Greedy answers in batches, and how they are judged: exact match and BLEU.

Why first lines only: a model that was never taught to stop goes on with a new question; what
follows the first line is not part of its answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_NUMBER_IN_TEXT = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip()


def matches(text: str, answer: str) -> bool:
    """A number must be the last number of the first line; a text must be that line, in any case."""
    line = first_line(text)
    if _NUMBER.fullmatch(answer):
        found = _NUMBER_IN_TEXT.findall(line)
        return bool(found) and abs(float(found[-1].replace(",", "")) - float(answer)) < 1e-4
    return line.lower() == answer.strip().lower()


def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    first_line_only: bool = False,
    tasks: Sequence[str | None] | None = None,
    adapters: Sequence[str | None] | None = None,
    **options: Any,
) -> list[list[int]]:
    """New token ids for every prompt of one left-padded batch, cut before the end token.

    `first_line_only` lets a row stop as soon as its first line is complete. `tasks`, one per prompt, reach routers
    that go by tasks; `adapters` are names on the model's handle, None the base; without them the one in use. `options`
    go to `model.generate`; without them the continuation is greedy.
    """
    import torch
    from transformers import StoppingCriteriaList

    from loramux.core.attach import handle_of

    width = max(map(len, prompts))
    pad = pad_token(tokenizer)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[i, width - len(prompt) :] = 1
    stops = StoppingCriteriaList(
        [_first_line_complete(tokenizer, width)] if first_line_only else []
    )
    options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | options
    handle = handle_of(model)
    known = (
        nullcontext()
        if handle is None or (tasks is None and adapters is None)
        else handle.batch(adapters=adapters, tasks=tasks)
    )
    with torch.inference_mode(), known:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            stopping_criteria=stops,
            **options,
        )
    ends = end_tokens(model, tokenizer)
    return [_until_end(row, ends) for row in out[:, width:].tolist()]


def pad_token(tokenizer: Any) -> int:
    """Any id serves as padding because it is masked."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end an answer: the tokenizer's, and those `model.generate` stops at."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = given if isinstance(given, list | tuple) else [given]
    return {int(i) for i in (*listed, tokenizer.eos_token_id) if i is not None}


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    for at, token in enumerate(tokens):
        if token in ends:
            return tokens[:at]
    return tokens


def _first_line_complete(tokenizer: Any, width: int) -> Any:
    """A stopping rule per row; leading empty lines do not count, as in `first_line`."""
    import torch
    from transformers import StoppingCriteria

    class FirstLineComplete(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            texts = tokenizer.batch_decode(input_ids[:, width:], skip_special_tokens=True)
            done = ["\n" in text.lstrip() for text in texts]
            return torch.tensor(done, device=input_ids.device)

    return FirstLineComplete()


def bleu(
    texts: Sequence[str], references: Sequence[Sequence[str]], *, seed: int = 0
) -> tuple[float, float | None]:
    """Corpus BLEU (0 to 100, sacrebleu's defaults) and its standard error; None for a single row.

    The error is the spread over 1000 resamples of the rows: corpus BLEU is no mean over rows.
    """
    import numpy as np

    from loramux.errors import require

    require("sacrebleu", "eval", "BLEU")
    from sacrebleu.metrics.bleu import BLEU

    if not texts or len(texts) != len(references):
        raise ValueError(
            f"BLEU needs a text for every reference list, got {len(texts)} and {len(references)}"
        )
    most = max(map(len, references))
    # sacrebleu takes the j-th references of all rows together; None marks rows that have fewer.
    streams: Any = [[row[j] if j < len(row) else None for row in references] for j in range(most)]
    value = float(BLEU().corpus_score(list(texts), streams).score)
    if len(texts) == 1:
        return value, None
    rows = [
        BLEU().corpus_score([t], [[r] for r in refs])
        for t, refs in zip(texts, references, strict=True)
    ]
    stats = np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows])
    draws = np.random.default_rng(seed).integers(len(rows), size=(1000, len(rows)))
    scores = [_bleu_of(stats[draw].sum(0).tolist()) for draw in draws]
    return value, float(np.std(scores, ddof=1))


def _bleu_of(stats: Sequence[int]) -> float:
    """Corpus BLEU from sums: matches and totals of each n-gram order, then both lengths."""
    from sacrebleu.metrics.bleu import BLEU

    *grams, sys_len, ref_len = stats
    half = len(grams) // 2
    score = BLEU.compute_bleu(
        list(grams[:half]),
        list(grams[half:]),
        sys_len,
        ref_len,
        smooth_method="exp",
        effective_order=False,
    )
    return float(score.score)
